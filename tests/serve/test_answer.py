"""The pieces of a streamed answer are final: whole characters, and nothing of a stop text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tunesmith.model.generate import Sampling
from tunesmith.model.load import load_tokenizer
from tunesmith.serve.answer import Cancelled, Finished, Question, TextStream, _Complete


def streamed(tokenizer: Any, ids: list[int], ends: tuple[int, ...] = (), **asked: Any) -> tuple[list[str], Finished]:
    """The pieces, and the result, of an answer that has the tokens `ids`."""
    pieces: list[str] = []
    question = Question(ids=[1], sampling=Sampling(), **asked)
    stream = TextStream(tokenizer, list(ends), question, pieces.append)
    try:
        for token in [1, *ids]:
            stream.put(torch.tensor([token]))
        stream.end()
    except _Complete:
        pass
    return pieces, stream.finished()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def test_no_piece_splits_a_character(tokenizer: Any) -> None:
    text = "naïve 字 😀 é"
    ids = ids_of(tokenizer, text)
    assert len(ids) == len(text.encode())  # a token a byte, so that every character comes in parts
    pieces, finished = streamed(tokenizer, ids)
    assert pieces == list(text)
    assert finished == Finished(text=text, sent=len(text), tokens=len(ids), reason="length")


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer: Any) -> None:
    pieces, finished = streamed(tokenizer, ids_of(tokenizer, "a😀")[:-1])
    assert pieces[0] == "a"
    assert "".join(pieces) == finished.text == tokenizer.decode(ids_of(tokenizer, "a😀")[:-1])


def test_what_was_sent_stays_where_a_tokenizer_takes_it_back() -> None:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = list("字字".encode())
    assert "字" not in tokenizer.decode(ids[:4])  # the taking back
    assert streamed(tokenizer, ids)[0] == ["字", "字"]
    pieces, finished = streamed(tokenizer, ids[:4])
    assert ("".join(pieces), finished.text, finished.tokens) == ("字", "字", 4)


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("abENxEND tail", ("END",), "abENx", "stop"),
        ("ab EN", ("END",), "ab EN", "length"),
        ("aaab", ("aab",), "a", "stop"),
        ("one\n\ntwo", ("two", "\n\n"), "one", "stop"),
        ("one two", ("two", "ne tw"), "o", "stop"),
        ("x字y", ("字",), "x", "stop"),
        ("END", ("END",), "", "stop"),
    ],
)
def test_nothing_of_a_stop_text_is_sent(
    tokenizer: Any, text: str, stops: tuple[str, ...], expected: str, reason: str
) -> None:
    pieces, finished = streamed(tokenizer, ids_of(tokenizer, text), stops=stops)
    assert ("".join(pieces), finished.text, finished.reason) == (expected, expected, reason)
    assert finished.sent == len(expected)


def test_a_stop_text_ends_the_generation_at_once(tokenizer: Any) -> None:
    _, finished = streamed(tokenizer, ids_of(tokenizer, "one END two"), stops=("END",))
    assert finished.tokens == len("one END")


def test_the_end_token_is_counted_and_not_text(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "ok")
    plain = ids_of(tokenizer, "!")[0]  # not a special one
    assert streamed(tokenizer, [*ids, plain], ends=(plain,))[1] == Finished(text="ok", sent=2, tokens=3, reason="stop")


def test_from_the_opening_on_nothing_is_sent(tokenizer: Any) -> None:
    pieces, finished = streamed(tokenizer, ids_of(tokenizer, "hm <to <tool>x"), opening="<tool>")
    assert "".join(pieces) == "hm <to "
    assert (finished.text, finished.sent) == ("hm <to <tool>x", 7)


def test_a_cancelled_answer_ends_at_its_next_token(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], Question(ids=[1], sampling=Sampling()), lambda piece: None)
    stream.put(torch.tensor([[1, 2]]))
    stream.cancel()
    with pytest.raises(Cancelled):
        stream.put(torch.tensor([3]))
