"""The real client gets from the server what the model generates, and its mistakes explained."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from peft import PromptTuningConfig, get_peft_model

from tests.serve.running import serving
from tunesmith.data import prompts
from tunesmith.data.prompts import prompt_ids, text_ids
from tunesmith.model.generate import Answer, Sampling, generate_from_ids
from tunesmith.model.load import load_run
from tunesmith.serve import server
from tunesmith.serve.access import Access
from tunesmith.serve.server import LONG

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_run(str(tiny_model))


@pytest.fixture(scope="module")
def url(loaded: tuple[Any, Any]) -> Iterator[str]:
    with serving(*loaded) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def answer_of(loaded: tuple[Any, Any], ids: list[int], most: int) -> Answer:
    return generate_from_ids(*loaded, [ids], Sampling(max_new_tokens=most))[0]


def test_a_chat_is_answered_as_the_model_answers_and_counted(client: OpenAI, loaded: tuple[Any, Any]) -> None:
    ids = prompt_ids(loaded[1], HELLO)
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12)
    assert reply.choices[0].message.content == answer_of(loaded, ids, 12).text
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 12)


@pytest.mark.parametrize("prompt", ["Once", ["Once"], [40, 41, 42], [[40, 41, 42]]])
def test_a_completion_goes_on_with_a_text_or_with_tokens(client: OpenAI, loaded: tuple[Any, Any], prompt: Any) -> None:
    ids = text_ids(loaded[1], "Once") if "Once" in (prompt, prompt[0]) else [40, 41, 42]
    reply = client.completions.create(model="tiny", prompt=prompt)
    assert reply.choices[0].text == answer_of(loaded, ids, 8).text
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)


def test_a_stream_is_the_same_answer_in_pieces_and_ends_with_its_usage(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, temperature=1.0, seed=3)
    events = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=40,
            temperature=1.0,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [event.choices[0].delta.content or "" for event in events[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 5
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(pieces) - 1) + ["length"]
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert {event.id for event in events} == {events[0].id}


def test_a_completion_streams_too(client: OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Once", max_tokens=20).choices[0].text
    events = list(client.completions.create(model="tiny", prompt="Once", max_tokens=20, stream=True))
    assert "".join(event.choices[0].text for event in events) == whole
    assert events[-1].choices[0].finish_reason == "length"


def test_a_seed_decides_the_answer_and_only_its_own(client: OpenAI) -> None:
    def ask(**settings: Any) -> str | None:
        reply = client.chat.completions.create(model="tiny", messages=HELLO, temperature=1.0, **settings)
        return reply.choices[0].message.content

    first, after_first, second, after_second = ask(seed=1), ask(), ask(seed=1), ask()
    assert first == second != ask(seed=2)
    assert after_first != after_second


def test_an_answer_ends_before_a_stop_text(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "temperature": 1.0, "seed": 3}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert whole is not None
    stop = whole[20:23]
    reply = client.chat.completions.create(**asked, stop=["never there", stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens < 40
    events = client.chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole[: whole.index(stop)]


def test_the_models_own_end_is_a_stop_even_as_the_last_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    head = model.lm_head.weight.detach().clone()
    ids = prompt_ids(tokenizer, HELLO)
    try:
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            model.lm_head.weight[tokenizer.eos_token_id] = hidden * 100
        with serving(model, tokenizer) as address:
            asking = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            reply = asking.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(head)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("", "stop")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 2}, "n can't be honoured"),
        ({"n": True}, "n can't be honoured"),
        ({"logprobs": True}, "logprobs can't"),
        ({"response_format": {"type": "json_object"}}, "response_format can't"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": 3}, "from 0 to 2"),
        ({"temperature": True}, "from 0 to 2"),
        ({"top_p": -1}, "from 0 to 1"),
        ({"max_tokens": 0}, "whole number from 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": "x" * 10**6}, r"seed is 'x{76}\.\.\.; write"),
        ({"chat_template_kwargs": {"messages": []}}, "template does not take this"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": ["x"] * 65}, "stop has 65 texts of 65 characters; at most 64 of together 10,000"),
        ({"stop": "x" * 10_001}, "stop has 1 texts of 10,001 characters; at most 64 of together 10,000"),
        ({"stream": "yes"}, "true or false"),
        ({"stream_options": {}}, "only for stream"),
        ({"messages": []}, "at least one"),
        ({"messages": "Hello"}, "at least one"),
        ({"messages": ["Hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "'judge'; it must be one of"),
        ({"messages": [{"role": "user"}]}, r"content of messages\[0\] must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'; here are texts only"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "its role is user"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "JSON text of an object"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no place for tools"),
        ({"tool_choice": "required"}, "auto or none"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "can't set chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "can't set tokenize"),
        ({"model": "other"}, "the one that is served is 'tiny'"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "maximum context length is 256 tokens"),
    ],
)
def test_what_cant_be_honoured_is_refused(client: OpenAI, fields: dict[str, Any], says: str) -> None:
    asked = {"model": "tiny", "messages": HELLO} | fields
    with pytest.raises(openai.APIStatusError, match=says) as caught:
        client.post("/chat/completions", body=asked, cast_to=object)
    assert caught.value.status_code == (404 if "model" in fields else 400)


def test_a_prompt_beyond_the_context_has_its_own_code(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 256)
    assert caught.value.code == "context_length_exceeded"
    reply = client.completions.create(model="tiny", prompt="x" * 250, max_tokens=100)
    assert reply.usage is not None
    assert reply.usage.total_tokens == 256
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", ["", [], [1, -1], [10**6], ["a", "b"], [True], None, 3])
def test_a_prompt_that_is_none_is_refused(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt must be one text"):
        client.post("/completions", body={"model": "tiny", "prompt": prompt}, cast_to=object)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "a JSON object"),
        (b"\xff", "not valid JSON"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    ],
)
def test_a_body_that_is_no_request_is_refused(url: str, body: bytes, says: str) -> None:
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_what_changes_nothing_is_taken(client: OpenAI) -> None:
    taken = {"user": "me", "metadata": {}, "store": False, "n": 1, "presence_penalty": 0.0, "logprobs": None}
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    plain = client.chat.completions.create(model="tiny", messages=HELLO)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": parts}], **taken}
    reply: Any = client.post("/chat/completions", body=asked, cast_to=object)
    assert reply["choices"][0]["message"]["content"] == plain.choices[0].message.content


def test_the_one_model_is_listed(client: OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tunesmith"
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve("some/other")
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "unfinished": 0}
    assert httpx.get(f"{url}/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ],
)
def test_pages_of_elsewhere_are_refused(url: str, headers: dict[str, str], status: int) -> None:
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status


def test_a_body_that_a_page_may_send_unasked_is_refused(url: str) -> None:
    body = json.dumps({"messages": HELLO})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        reply = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": kind})
        assert reply.status_code == 415


def test_a_key_is_asked_for(loaded: tuple[Any, Any]) -> None:
    with serving(*loaded, access=Access(local=False, api_key="s3cret")) as address:
        for wrong in ("s3cre", "none"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                OpenAI(base_url=f"{address}/v1", api_key=wrong, max_retries=0).models.list()
        assert OpenAI(base_url=f"{address}/v1", api_key="s3cret", max_retries=0).models.list().data
        assert httpx.get(f"{address}/health", headers={"Host": "elsewhere"}).status_code == 200


def unfinished(url: str, expected: int) -> bool:
    """Whether so many answers are under way, now or soon."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if httpx.get(f"{url}/health").json()["unfinished"] == expected:
            return True
        time.sleep(0.02)
    return False


def test_who_does_not_finish_asking_is_left(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    asked = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(*loaded) as address:
        for sent, status in ((asked[:9], b""), (f"{asked}Content-Length: 9\r\n\r\n{{", b"HTTP/1.1 408 ")):
            with socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0), timeout=20) as connection:
                connection.sendall(sent.encode())
                assert connection.recv(13) == status


@pytest.fixture
def slow(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[int]]]:
    """A server whose model needs 50 ms a token, and the lengths that it was called with."""
    model, tokenizer = loaded
    forward, calls = model.forward, []

    def slowly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slowly)
    with serving(model, tokenizer) as address:
        yield address, calls


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(slow: tuple[str, list[int]], stream: bool) -> None:
    url, calls = slow
    body = {"messages": HELLO, "max_tokens": 200, "stream": stream, "temperature": 1.0, "seed": 3}
    with suppress(httpx.ReadTimeout), httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=0.5) as got:
        for _ in got.iter_lines():
            if len(calls) > 5:
                break
    assert len(calls) > 0
    assert unfinished(url, 0)
    assert len(calls) < 100


def test_answers_come_one_at_a_time_and_none_is_lost(slow: tuple[str, list[int]], loaded: tuple[Any, Any]) -> None:
    url, calls = slow
    found: dict[int, str | None] = {}

    def ask(i: int) -> None:
        asking = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        messages: list[Any] = [{"role": "user", "content": f"Number {i}"}]
        found[i] = (
            asking.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices[0].message.content
        )

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 16
    for i, text in found.items():
        ids = prompt_ids(loaded[1], [{"role": "user", "content": f"Number {i}"}])
        assert text == answer_of(loaded, ids, 4).text
    assert len(found) == 4


def test_the_servers_end_ends_answers_and_says_so(loaded: tuple[Any, Any], slow: tuple[str, list[int]]) -> None:
    lines: list[str] = []
    calls = slow[1]

    def read(address: str) -> None:
        body = {"messages": HELLO, "max_tokens": 200, "stream": True, "temperature": 1.0, "seed": 3}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=20) as reply:
            lines.extend(line for line in reply.iter_lines() if line)

    with serving(*loaded) as address:
        thread = threading.Thread(target=read, args=(address,))
        thread.start()
        assert unfinished(address, 1)
        until = time.monotonic() + 10
        while len(calls) < 3 and time.monotonic() < until:
            time.sleep(0.02)
    thread.join(10)
    assert "the server is ending" in lines[-1]
    assert len(calls) < 100


def test_a_failure_while_generating_is_an_error_for_its_request_alone(
    client: OpenAI, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory, with secrets")

    with monkeypatch.context() as patched:
        patched.setattr(loaded[0], "forward", fail)
        with pytest.raises(openai.InternalServerError, match="could not be generated") as caught:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert "secrets" not in str(caught.value)
        with pytest.raises(openai.APIError, match="could not be generated"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices


def test_a_run_with_virtual_tokens_is_served(tiny_model: Path) -> None:
    model, tokenizer = load_run(str(tiny_model))
    adapted: Any = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    ids = prompt_ids(tokenizer, HELLO)
    with serving(adapted, tokenizer) as address:
        asking = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        reply = asking.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6)
        assert reply.choices[0].message.content == answer_of((adapted, tokenizer), ids, 6).text
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 6)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 251 tokens"):
            asking.completions.create(model="tiny", prompt=[1] * 251)


def test_a_template_that_refuses_is_the_requests_mistake(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% if shout %}{{ raise_exception('no shouting') }}{% endif %}" + template
        with serving(model, tokenizer) as address:
            asking = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.BadRequestError, match="no shouting"):
                asking.chat.completions.create(
                    model="tiny", messages=HELLO, extra_body={"chat_template_kwargs": {"shout": True}}
                )
            assert asking.chat.completions.create(model="tiny", messages=HELLO).choices
        tokenizer.chat_template = None
        with serving(model, tokenizer) as address:
            asking = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.BadRequestError, match="no chat template; ask /v1/completions"):
                asking.chat.completions.create(model="tiny", messages=HELLO)
            assert asking.completions.create(model="tiny", prompt="Once").choices[0].text
    finally:
        tokenizer.chat_template = template


def test_what_is_too_long_in_characters_is_never_tokenized(url: str) -> None:
    text = "word " * 200_000
    for path, body, param in (
        ("chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("completions", {"prompt": text}, "prompt"),
    ):
        reply = httpx.post(f"{url}/v1/{path}", json=body, timeout=30)
        assert reply.status_code == 400
        found = reply.json()["error"]
        assert found["code"] == "context_length_exceeded"
        assert found["param"] == param
        assert "maximum context length is 256 tokens" in found["message"]
        assert "the prompt has 800," in found["message"]


def test_white_space_without_end_is_never_tokenized(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "shown_ids", None)
    body = {"messages": [{"role": "user", "content": "\n" * 1_000_000}]}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert "1,000,050 characters with its white space" in reply.json()["error"]["message"]


def test_a_short_prompt_does_not_wait_for_a_long_one(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, began = threading.Event(), threading.Event()

    def slow(tokenizer: Any, text: str, most: int | None = None) -> list[int]:
        if len(text) > LONG:
            began.set()
            assert goes_on.wait(30)
        return text_ids(tokenizer, text, most)

    monkeypatch.setattr(server, "text_ids", slow)
    with serving(*loaded) as address:
        body = {"prompt": "x" * (LONG + 1)}
        long = threading.Thread(target=httpx.post, args=(f"{address}/v1/completions",), kwargs={"json": body})
        long.start()
        assert began.wait(30)
        short = httpx.post(f"{address}/v1/completions", json={"prompt": "Once"}, timeout=30)
        assert short.status_code == 200
        goes_on.set()
        long.join(30)
