"""The HTTP interface of a model: who may ask, the routes, and the way from a request to its answer."""

import asyncio
import copy
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from tunesmith.data.call_syntax import Call, CallSyntax, Functions, syntax_of
from tunesmith.data.prompts import PromptTooLong, prompt_ids, text_ids
from tunesmith.data.tool_turns import reads_tools
from tunesmith.errors import TunesmithError
from tunesmith.model.generate import Model, Sampling, room_of, stop_ids
from tunesmith.serve import answer, protocol
from tunesmith.serve.access import HEALTH, Access, Guard, error
from tunesmith.serve.answer import Cancelled, Finished, Job, Question
from tunesmith.serve.protocol import Options, Outcome, Reply, RequestError, event

LARGEST = 16 * 2**20
"""Bytes of a request's body."""
LONG = 2**18
"""Bytes of a body from which on its prompt is tokenized beside the others, which do not wait for it."""
COMPOSED = 4
"""So many characters of a text may become one before it is divided into tokens: a letter with its marks."""
GONE = 499
"""The status of an answer that nobody waits for, as nginx logs it."""
GRACE = 5
"""Seconds for the last bytes of answers, once the server ends."""
HEAD_SECONDS = 30.0
"""Until the head of a request has come; else its connection is closed, so that those who say nothing keep none out."""
BODY_SECONDS = 120.0
"""Until a request's body has come."""
MOST_REQUESTS = 256
"""Connections and requests at a time; more are answered with 503."""
ENDING = "the server is ending"
FAILED = "the answer could not be generated; the server's log says why"

T = TypeVar("T")
logger = logging.getLogger(__name__)


# The interface


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`name` is the model's id, and the only one that is served. `defaults` are what a request leaves out."""

    name: str
    defaults: Sampling
    access: Access


class Service:
    """A model behind the interface: `app` is its ASGI application. The model must be in evaluation mode."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self._settings = settings
        self._worker = answer.Worker(model, tokenizer)
        # A tokenizer is for one thread at a time: the worker decodes with the other one.
        self._readers = {is_long: _Reader(copy.deepcopy(tokenizer)) for is_long in (False, True)}
        self._room, self._vocabulary = room_of(model), len(tokenizer)
        # More characters than these are more tokens than the model has room for, whatever they are.
        longest = max(map(len, tokenizer.get_vocab()))
        self._most_characters = None if self._room is None else COMPOSED * longest * self._room
        self._has_roles = tokenizer.chat_template is not None
        self._has_tools = self._has_roles and reads_tools(tokenizer)
        stops = [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stop_ids(model, tokenizer)]
        syntax = syntax_of(tokenizer, stops, specials=False) if self._has_tools else None
        # A call that stands bare is known at its end only, and what was streamed until then was text.
        self._syntax = syntax if syntax is not None and syntax.opening else None
        self._started = int(time.time())
        self.app = self._build()

    def close(self) -> None:
        """Ends the answers that are under way; those still asked for are refused."""
        self._worker.close()
        for reader in self._readers.values():
            reader.thread.shutdown(wait=False, cancel_futures=True)

    def _build(self) -> Starlette:
        routes = [
            Route(HEALTH, self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]
        failures = (RequestError, HTTPException, Cancelled, ClientDisconnect, Exception)
        handlers: dict[Any, Callable[[Request, Any], Any]] = dict.fromkeys(failures, _explained)
        guard = Middleware(Guard, access=self._settings.access)
        return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "unfinished": self._worker.unfinished})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self._settings.name, "object": "model", "created": self._started, "owned_by": "tunesmith"}
        return card | {"max_model_len": self._room}

    def _check_name(self, name: Any) -> None:
        if name != self._settings.name:
            raise RequestError(
                f"there is no model {protocol.shown(name)} here; the one that is served is {self._settings.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def _body(self, request: Request) -> tuple[dict[str, Any], "_Reader"]:
        """The request's object, whose model is the one that is served; without a model, that one is meant. And who
        reads its prompt."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page may send without asking first is none
            raise RequestError("send the body as Content-Type: application/json", status=415)
        raw = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    raw += part
                    if len(raw) > LARGEST:
                        raise RequestError(f"the body is larger than {LARGEST} bytes", status=413)
        except TimeoutError as slow:
            raise RequestError(f"the body took longer than {BODY_SECONDS:g} seconds", status=408) from slow
        body = protocol.parse_json(bytes(raw))
        if body.get("model") is not None:
            self._check_name(body["model"])
        return body, self._readers[len(raw) >= LONG]

    async def _chat(self, request: Request) -> Response:
        body, reader = await self._body(request)
        options = protocol.parse_options(body, protocol.CHAT, self._settings.defaults)
        chat = protocol.parse_chat(body)
        if not self._has_roles:
            raise RequestError("this model has no chat template; ask /v1/completions to go on with a text")
        if chat.functions and not self._has_tools:
            raise RequestError("this model's chat template has no place for tools", param="tools")
        keep, most = chat.keep_specials, self._most_characters
        ids = await self._read(
            reader,
            lambda tokenizer: prompt_ids(tokenizer, chat.messages, chat.arguments, keep_specials=keep, most=most),
            "messages",
        )
        syntax = self._syntax if chat.functions else None
        question = self._question(ids, options, "messages", syntax.opening if syntax else None)
        reply = Reply(model=self._settings.name, is_chat=True, include_usage=options.include_usage)
        delivery = _Delivery(options=options, reply=reply, functions=chat.functions, syntax=syntax)
        return await self._answer(request, question, delivery)

    async def _completion(self, request: Request) -> Response:
        body, reader = await self._body(request)
        options = protocol.parse_options(body, protocol.COMPLETION, self._settings.defaults)
        prompt = protocol.parse_prompt(body, self._vocabulary)
        ids = (
            await self._read(reader, lambda tokenizer: text_ids(tokenizer, prompt, self._most_characters), "prompt")
            if isinstance(prompt, str)
            else prompt
        )
        question = self._question(ids, options, "prompt")
        reply = Reply(model=self._settings.name, is_chat=False, include_usage=options.include_usage)
        return await self._answer(request, question, _Delivery(options=options, reply=reply))

    async def _read(self, reader: "_Reader", read: Callable[[PreTrainedTokenizerBase], T], param: str) -> T:
        """What `read` returns in the thread of a reader, which may use its tokenizer. A template may raise anything on
        what it was not made for, so that all of it is the request's mistake."""
        try:
            return await asyncio.get_running_loop().run_in_executor(reader.thread, read, reader.tokenizer)
        except PromptTooLong as mistake:
            raise RequestError(
                f"this model's maximum context length is {self._room} tokens, answer included; {mistake}",
                param=param,
                code="context_length_exceeded",
            ) from mistake
        except TunesmithError as mistake:
            raise RequestError(str(mistake), param=param) from mistake
        except Exception as failure:
            raise RequestError(
                f"the chat template does not take this: {failure or type(failure).__name__}", param=param
            ) from failure

    def _question(self, ids: list[int], options: Options, param: str, opening: str | None = None) -> Question:
        if self._room is not None and len(ids) >= self._room:
            raise RequestError(
                f"this model's maximum context length is {self._room} tokens, answer included; the prompt has "
                f"{len(ids)} tokens",
                param=param,
                code="context_length_exceeded",
            )
        return Question(ids=ids, sampling=options.sampling, seed=options.seed, stops=options.stops, opening=opening)

    async def _answer(self, request: Request, question: Question, delivery: "_Delivery") -> Response:
        job = self._worker.ask(question)
        if delivery.options.stream:
            return _Events(job, _events(job, question, delivery))
        finished = await _wait(request, job)
        return JSONResponse(delivery.reply.whole(delivery.outcome(question, finished)))


class _Reader:
    """A tokenizer, and the one thread that may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Delivery:
    """How an answer goes back. `functions` are the tools that it may call, in the form of `syntax`."""

    options: Options
    reply: Reply
    functions: Functions = field(default_factory=dict)
    syntax: CallSyntax | None = None

    def outcome(self, question: Question, finished: Finished) -> Outcome:
        text, reason = finished.text, str(finished.reason)
        # A call that was cut off is none.
        calls: list[Call] = []
        if self.syntax is not None and finished.reason == "stop":
            before, calls = self.syntax.split(text, self.functions)
            if all(call.name in self.functions for call in calls):
                text = before
            else:
                calls = []
        return Outcome(
            text=text,
            rest=text[finished.sent :],
            calls=calls,
            reason="tool_calls" if calls else reason,
            usage=protocol.usage(len(question.ids), finished.tokens),
        )


class _Events(StreamingResponse):
    """Ends the answer when the client leaves, wherever the sending was."""

    def __init__(self, job: Job, content: AsyncIterator[str]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(job: Job, question: Question, delivery: _Delivery) -> AsyncIterator[str]:
    for value in delivery.reply.start():
        yield event(value)
    try:
        async for piece in job.pieces():
            yield event(delivery.reply.piece(piece))
        finished = await job.result
    except Cancelled:
        yield event(error(ENDING, status=503))
        return
    except Exception:
        logger.exception("an answer failed")
        yield event(error(FAILED, status=500))
        return
    for value in delivery.reply.end(delivery.outcome(question, finished)):
        yield event(value)
    yield protocol.DONE


async def _wait(request: Request, job: Job) -> Finished:
    """The answer. Raises ClientDisconnect as soon as the client has left, and RequestError where generating fails."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(left())
    either: set[asyncio.Future[Any]] = {job.result, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not job.result.done():
            raise ClientDisconnect
        return job.result.result()
    except (Cancelled, ClientDisconnect):
        raise
    except Exception as failure:
        # Left to the framework, it would close the connection, on which the client may have asked again already.
        logger.exception("an answer failed")
        raise RequestError(FAILED, status=500) from failure
    finally:
        gone.cancel()
        job.cancel()


def _explained(request: Request, failure: Exception) -> Response:
    """The answer to a request that failed."""
    if isinstance(failure, RequestError):
        value = error(str(failure), status=failure.status, param=failure.param, code=failure.code)
        return JSONResponse(value, failure.status)
    if isinstance(failure, HTTPException):
        message = f"{request.method} {request.url.path}: {failure.detail}"
        return JSONResponse(error(message, status=failure.status_code), failure.status_code, failure.headers)
    if isinstance(failure, ClientDisconnect):
        return Response(status_code=GONE)
    status, message = (503, ENDING) if isinstance(failure, Cancelled) else (500, FAILED)
    return JSONResponse(error(message, status=status), status)


# The server


class Server(uvicorn.Server):
    """Serves `service` on a socket of `bind`, until a signal ends it, or `should_exit` set by another thread. `ready`
    is called once requests are accepted."""

    def __init__(self, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                service.app,
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=MOST_REQUESTS,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._service, self._ready = service, ready
        self._silent: dict[Any, float] = {}

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        cycles = {each: getattr(each, "cycle", None) for each in self.server_state.connections}
        silent = [each for each, cycle in cycles.items() if cycle is None or cycle.response_complete]
        self._silent = {each: self._silent.get(each, now) for each in silent}
        for connection, since in self._silent.items():
            if now - since > HEAD_SECONDS:
                connection.transport.close()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.close()  # else it would wait until every answer has come to its own end
        await super().shutdown(sockets)
