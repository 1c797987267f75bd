"""What a command prints is tunesmith's own, to the last line: the real command, its output in pipes or files."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Command
from tests.models import tiny
from tunesmith.model.load import load_tokenizer
from tunesmith.terminal.noise import hide_noise

pytestmark = pytest.mark.slow
TRAINED = [
    r"(learning_rate|eval_strategy): \S+ \(.*\)",
    r"(train|eval): 16 rows, .*",
    r" +\d+ to +\d+ tokens  #+ \d+",
    r"note: .*examples? (is|are) (an exact copy|exact copies|in the training data).*",
    r"trains [\d,]+ of [\d,]+ parameters .*",
    r"step \d+/3  loss \d+\.\d{4}  .* s left",
    r"step \d+  eval loss \d+\.\d{4}",
    r"how it went:  \S+/report\.html",
    r"saved the adapters to \S+",
    r"try it:  tunesmith chat \S+",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}
    path.write_text(f"{json.dumps(row)}\n" * 16, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    """A model whose layers are wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = load_tokenizer(str(tiny_model))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    tiny("llama", len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def environment() -> dict[str, str]:
    """A user's: nothing hides what libraries say."""
    hiding = ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    return {name: value for name, value in os.environ.items() if name not in hiding}


def said(folder: Path, *arguments: object, text: str = "") -> Command:
    done = Command(folder, *arguments, env=environment(), text=text)
    assert done.finish() == 0, done.stderr
    return done


def training(bits: str, lora: str, base: str, rows: str, output: Path) -> list[str]:
    quantized = ["train", "--model", base, "--lora", lora, "--quantize", bits, "--precision=bf16"]
    data = ["--data", rows, "--eval-data", rows, "--output", str(output)]
    return [*quantized, *data, "--max-steps=3", "--logging-steps=1"]


def strange(text: str, patterns: list[str]) -> list[str]:
    """The lines that are none of ours."""
    return [line for line in text.splitlines() if not any(re.fullmatch(pattern, line) for pattern in patterns)]


@pytest.fixture(scope="module")
def trained(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A run, and what it said in a process that imported its libraries itself."""
    output = tmp_path_factory.mktemp("runs") / "4bit"
    command = [sys.executable, "-m", "tunesmith", *training("4bit", "r=8", base, rows, output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), errors="replace")
    assert done.returncode == 0, done.stderr
    return str(output), done


def test_training_on_4_bits(trained: tuple[str, Any]) -> None:
    _, done = trained
    assert done.stderr == ""
    assert strange(done.stdout, TRAINED) == []
    assert re.findall(r"^step (\d)/3", done.stdout, re.MULTILINE) == ["1", "2", "3"]  # --logging-steps 1


def test_training_embeddings_on_8_bits(base: str, rows: str, tmp_path: Path) -> None:
    done = said(tmp_path / "said", *training("8bit", "target=q_proj,embed_tokens", base, rows, tmp_path / "run"))
    assert done.stderr == ""
    assert strange(done.stdout, TRAINED) == []


def test_evaluating_and_merging(trained: tuple[str, Any], rows: str, tmp_path: Path) -> None:
    run, _ = trained
    done = said(tmp_path / "eval", "eval", run, "--data", rows, "--max-new-tokens", "3")
    trained_on = r"note: \S+ was trained on rows of \S+, so that scores say little of others; leave --data out, .*"
    assert strange(done.stderr, [trained_on, r"metrics: .*", r"answers, (tuned|base) ━+ 16/16 0:00:0\d"]) == []
    known = [r"16 rows that \S+ was asked *", r" *", r".*  (rows|\d+)  .*", " *─+ *", "In brackets: .*", "cut off: .*"]
    assert strange(done.stdout, known) == []
    done = said(tmp_path / "merge", "merge", run, "--output", tmp_path / "merged")
    assert strange(done.stderr, [r"Merging the adapters of 14 layers .* \.\.\.", r"Comparing what .* \.\.\."]) == []
    assert len(done.stdout.splitlines()) == 2


def test_chatting_without_a_terminal(trained: tuple[str, Any], tmp_path: Path) -> None:
    run, _ = trained
    done = said(tmp_path / "said", "chat", run, "--max-new-tokens", "3", text="say it\n/reset\n/exit\n")
    assert done.stderr == f"{run}: /reset starts anew, /exit or Ctrl-D leaves.\n"


def test_serving(trained: tuple[str, Any], tmp_path: Path) -> None:
    run, _ = trained
    command = Command(tmp_path / "said", "serve", run, "--port", "0", env=environment())
    command.until(lambda: "\n" in command.stdout)
    command.interrupt()
    assert command.finish() == 130
    [url], errors = command.stdout.splitlines(), command.stderr
    assert errors.splitlines()[0] == "4bit answers, until Ctrl-C, at"
    assert next(line for line in errors.splitlines() if url in line).startswith("curl ")
    assert errors.splitlines()[-2:] == ["print(answer.choices[0].message.content)", "interrupted"]
    assert len(errors.splitlines()) == 10


def test_what_is_hidden_is_named_and_the_rest_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        hide_noise()
        hide_noise()  # once, however often
        texts = ("Setting `save_embedding_layers` to `True` as", "Model has `tie_word_embeddings=True` and a tied")
        for text in (*texts, "The disk is nearly full"):
            warnings.warn(text, UserWarning, stacklevel=1)
        for text in ("The speedups for torchdynamo mostly come with GPU", "eval_steps is odd"):
            logging.getLogger("transformers.training_args").warning(text)
    assert [str(warning.message) for warning in heard] == ["The disk is nearly full"]
    assert len(logging.getLogger("transformers.training_args").filters) == 1
    assert caplog.messages == ["eval_steps is odd"]
