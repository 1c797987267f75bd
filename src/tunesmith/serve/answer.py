"""One answer after another, piece by piece: stop strings end it, and it ends when nobody waits for it any more."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from tunesmith.model.generate import PLAIN, Model, Sampling, answer_ids, stop_ids

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet one."""


class Cancelled(Exception):
    """Nobody waits for the answer: its client left, or the server ends."""


class _Complete(Exception):
    """A stop string came: ends the generation from within it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """`ids` is the prompt. The answer ends before the first of the texts `stops`. From the text `opening` on, nothing
    is sent as it comes; `Finished.text` has it. The same `seed` gives the same answer; None draws anew."""

    ids: list[int]
    sampling: Sampling
    seed: int | None = None
    stops: tuple[str, ...] = ()
    opening: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The whole answer. `sent` characters of `text` went out as pieces. `tokens` counts all that the model generated,
    the end token and those of a stop string included. `reason` is `length` where the answer was cut off."""

    text: str
    sent: int
    tokens: int
    reason: Literal["stop", "length"]


class TextStream(BaseStreamer):
    """The text of an answer as its tokens come, as a streamer of `generate`.

    `write` gets pieces that are final: never a part of a character, never the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: list[int], question: Question, write: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._ends, self._question, self._write = tokenizer, frozenset(ends), question, write
        self._cancelled = Event()
        self._ids: list[int] = []
        self._is_prompt = True
        self._shown = ""
        self.text = ""
        self.tokens = 0
        self.ended = False

    def cancel(self) -> None:
        """From any thread: raises Cancelled in the generation, at its next token."""
        self._cancelled.set()

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def put(self, value: Tensor) -> None:
        """The prompt first, then each new token, of shape (1,)."""
        self.check()
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.tokens += 1
            self.ended = token in self._ends
            if not self.ended:
                self._ids.append(token)
                self._read(final=False)

    def end(self) -> None:
        self._read(final=True)

    @property
    def sent(self) -> int:
        return len(self._shown)

    def finished(self) -> Finished:
        reason: Literal["stop", "length"] = "stop" if self.ended else "length"
        return Finished(text=self.text, sent=self.sent, tokens=self.tokens, reason=reason)

    def _read(self, final: bool) -> None:
        # All tokens are decoded anew for each: only so is the text the one that `generate` gives, whatever the
        # tokenizer does at the beginning of a text. A thousand tokens take less than a millisecond.
        text = str(self._tokenizer.decode(self._ids, **PLAIN))
        if not final:
            text = text.rstrip(INCOMPLETE)
        if not text.startswith(self._shown):
            # Some tokenizers turn a character back into bytes while the next one is incomplete. What is shown stays.
            text = self.text
        at = min((i for stop in self._question.stops if (i := text.find(stop)) >= 0), default=None)
        self.text = text if at is None else text[:at]
        self._show(len(self.text) if final or at is not None else _certain(self.text, self._question.stops))
        if at is not None:
            self.ended = True
            raise _Complete

    def _show(self, upto: int) -> None:
        opening = self._question.opening
        if opening is not None:
            at = self.text.find(opening)
            upto = min(upto, at if at >= 0 else _certain(self.text, (opening,)))
        if upto > len(self._shown):
            self._write(self.text[len(self._shown) : upto])
            self._shown = self.text[:upto]


def _certain(text: str, stops: tuple[str, ...]) -> int:
    """How many characters of `text`, in which there is none of `stops`, can't be the beginning of one."""
    longest = max(
        (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])),
        default=0,
    )
    return len(text) - longest


class Worker:
    """The model, which answers one question at a time, in the order in which they came."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._ends = stop_ids(model, tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._running: set[Job] = set()
        self._closed = False

    def ask(self, question: Question) -> "Job":
        """Puts the question at the end of the queue, from the event loop. Raises Cancelled after `close`."""
        if self._closed:
            raise Cancelled
        job = Job()
        job.stream = TextStream(self._tokenizer, self._ends, question, job.write)
        job.result = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, question, job)
        self._running.add(job)
        job.result.add_done_callback(lambda result: self._done(job, result))
        return job

    @property
    def unfinished(self) -> int:
        """How many questions are being answered, or wait for it."""
        return len(self._running)

    def close(self) -> None:
        """Ends all answers, and those still asked for, at once."""
        self._closed = True
        for job in list(self._running):
            job.cancel()
        self._thread.shutdown(wait=False)

    def _done(self, job: "Job", result: "asyncio.Future[Finished]") -> None:
        self._running.discard(job)
        if not result.cancelled():
            result.exception()  # that nobody waits for a cancelled one is no news
        job.close()

    def _answer(self, question: Question, job: "Job") -> Finished:
        stream = job.stream
        stream.check()
        # Always: an answer without a seed must not go on with the draws of one that had it.
        torch.manual_seed(secrets.randbits(63) if question.seed is None else question.seed)
        with suppress(_Complete):
            for _ in answer_ids(self._model, self._tokenizer, [question.ids], question.sampling, streamer=stream):
                pass
        return stream.finished()


class Job:
    """An answer that is under way. Belongs to the event loop that asked."""

    stream: TextStream
    result: "asyncio.Future[Finished]"

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def write(self, piece: str) -> None:
        """From the thread that generates."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def close(self) -> None:
        self._pieces.put_nowait(None)

    def cancel(self) -> None:
        self.stream.cancel()

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes. Afterwards, `result` is there; it raises Cancelled, and what generating raises."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
