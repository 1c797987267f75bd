"""Several processes prepare the data of any script, and none of them runs the script again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tunesmith.data.workers import Workers
from tunesmith.errors import TunesmithError

WAYS = """
print("started", flush=True)
from operator import methodcaller
from tunesmith.data.workers import Workers
with Workers(2, methodcaller, "upper") as workers:
    print([answer.result() for answer in map(workers.submit, "abc")])
"""
PREPARES = """
print("started", flush=True)
from pathlib import Path
import tunesmith.data.prepare as module
from transformers import AutoTokenizer
from tunesmith.data.cache import Store
from tunesmith.data.formats import FormatOptions
from tunesmith.data.tokenize import EncodeOptions

module.BATCH_ROWS = 4
rows = [(f"row {{i}}", {{"prompt": f"{{i}}+1=", "completion": str(i + 1)}}) for i in range(10)]
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
preparation = module.Preparation(tokenizer=tokenizer, encode=EncodeOptions(), formats=FormatOptions(), processes=2)
dataset, _ = module.prepare(iter(rows), preparation, store=Store(Path({folder!r})))
print([tokenizer.decode(ids) for ids in dataset["input_ids"]])
"""


def output_of(*arguments: str, text: str | None = None) -> list[str]:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, input=text or "", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("way", ["file", "stdin", "-c", "exec"])
def test_a_script_without_a_guard_runs_once(way: str, tmp_path: Path) -> None:
    """`exec`: as a notebook runs its cells, in a `__main__` without a file."""
    file = tmp_path / "script.py"
    file.write_text(WAYS)
    arguments = {
        "file": [str(file)],
        "stdin": ["-"],
        "-c": ["-c", WAYS],
        "exec": ["-c", f"import __main__\nexec(compile({WAYS!r}, '<cell>', 'exec'), vars(__main__))"],
    }[way]
    assert output_of(*arguments, text=WAYS if way == "stdin" else None) == ["started", "['A', 'B', 'C']"]


def test_a_script_without_a_guard_prepares_the_same_data(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "script.py"
    file.write_text(PREPARES.format(folder=str(tmp_path / "store"), tokenizer=tokenizer.name_or_path))
    assert output_of(str(file)) == ["started", str([f"{n}+1={n + 1}<|im_end|>" for n in range(10)])]


def doubled(loud: str) -> Callable[[Any], Any]:
    def double(part: Any) -> Any:
        print(loud)  # which must not get between the answers
        if part == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if part == "mistake":
            raise TunesmithError("row 7: wrong")
        if part == "fault":
            raise KeyError("key")
        return part * 2

    return double


class Unknown:
    """Of a module that another process can't import."""

    __module__ = "__main__"


def test_answers_come_back_and_so_do_errors() -> None:
    with Workers(2, doubled, "noise") as workers:
        answers = [workers.submit(part) for part in (1, "a", [0] * 100_000, "mistake", "fault", 2)]
        assert [answer.result() for answer in (*answers[:3], answers[5])] == [2, "aa", [0] * 200_000, 4]
        with pytest.raises(TunesmithError, match=r"^row 7: wrong$"):
            answers[3].result()
        with pytest.raises(KeyError) as caught:
            answers[4].result()
        assert "in double" in caught.value.__notes__[0]


def test_a_process_that_dies_is_an_error_and_not_a_wait() -> None:
    with (
        Workers(1, doubled, "noise") as workers,
        pytest.raises(TunesmithError, match=r"ended with code -9, perhaps for want of memory"),
    ):
        workers.submit("die").result()


def test_what_another_process_can_not_make_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TunesmithError, match=r"can't be sent to another process .*; leave dataset_num_proc out"):
        Workers(1, doubled, lambda: None)
    monkeypatch.setattr(sys.modules["__main__"], "Unknown", Unknown, raising=False)
    with (
        Workers(1, doubled, Unknown()) as workers,
        pytest.raises(TunesmithError, match=r"can't be made in another process \(AttributeError: .*Unknown"),
    ):
        workers.submit(1).result()
