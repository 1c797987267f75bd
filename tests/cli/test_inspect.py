"""`tunesmith inspect` shows the tokens that training would get, and needs neither weights nor an output folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.data.styles import TEMPLATES
from tests.models import flat
from tests.refusing import needs_proc
from tests.train.runs import TALKS
from tunesmith.cli.data import training_rows
from tunesmith.cli.inspect import HELP, USAGE, inspect, prepared
from tunesmith.cli.main import Commands
from tunesmith.settings.recipe import resolve
from tunesmith.trainers import SFTTrainer
from tunesmith.types import IGNORE_INDEX

APP = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
APP.callback()(lambda: None)
APP.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, help=HELP, options_metavar=USAGE
)(inspect)

Command = Callable[..., Any]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Seven rows that differ; nothing is learned from the last but one."""
    turns = [
        ("hi", "yes 中"),
        ("a", "b"),
        ("tell", "a longer story🚀"),
        ("x", "y"),
        ("?", "!"),
        ("mute", "no"),
        ("q", "r"),
    ]
    path = tmp_path / "rows.jsonl"
    lines = []
    for asked, answer in turns:
        weight = {"weight": 0} if asked == "mute" else {}
        lines.append([{"role": "user", "content": asked}, {"role": "assistant", "content": answer} | weight])
    path.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer_only(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def command(tokenizer_only: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `tunesmith inspect` with more options, in an empty folder."""
    empty = tmp_path / "cwd"
    empty.mkdir()
    monkeypatch.chdir(empty)
    needed = ["inspect", "--model", str(tokenizer_only), "--data", str(rows), "--train-on", "assistant"]
    colourless = {"NO_COLOR": "", "FORCE_COLOR": "", "TERM": "dumb"}
    return lambda *options, env=None: CliRunner().invoke(APP, [*needed, *options], env=env or colourless)


def titles(output: str) -> list[str]:
    return [line.split(":")[0] for line in output.splitlines() if line.startswith(("example ", "pack "))]


def test_the_first_three_examples_are_shown_with_their_mask_and_the_counts(command: Command, rows: Path) -> None:
    result = command()
    assert result.exit_code == 0, result.output
    assert titles(result.stdout) == ["example 1 of 6", "example 2 of 6", "example 3 of 6"]
    assert "<|im_start|>user⏎\nhi<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦yes 中<|im_end|>⟧⏎\n" in result.stdout
    assert "7, which make 6 examples" in result.stdout
    (dropped,) = (line for line in result.stdout.splitlines() if line.startswith("dropped"))
    assert dropped.startswith("dropped     1: ")
    assert dropped.endswith(f" ({rows}, line 6)")
    assert "no weights are loaded" in result.stdout
    assert "prepared exactly as tunesmith train does" in result.stdout


def test_nothing_is_written_without_html(command: Command, tmp_path: Path) -> None:
    assert command("--output", "run").exit_code == 0
    assert list((tmp_path / "cwd").iterdir()) == []


def test_row_counts_from_1_and_ids_are_shown_on_demand(command: Command) -> None:
    result = command("--row", "6", "--ids")
    assert titles(result.stdout) == ["example 6 of 6"]
    assert "<|im_end|>⟨2⟩⟧⏎⟨" in result.stdout
    assert "⟨" not in command("--row", "6").stdout


@pytest.mark.parametrize("number", ["0", "7", "-1"])
def test_a_row_out_of_range_is_an_error_with_the_range(command: Command, number: str) -> None:
    result = command("--row", number)
    assert result.exit_code == 2
    assert f"--row {number}: there are examples 1 to 6" in result.stderr


def test_random_rows_are_drawn_with_the_seed(command: Command) -> None:
    drawn = {seed: titles(command("--random", "3", "--seed", seed).stdout) for seed in ("1", "2", "3", "4")}
    assert drawn["1"] == titles(command("--random=3", "--seed=1").stdout)
    assert all(len(set(shown)) == 3 for shown in drawn.values())
    assert len({tuple(shown) for shown in drawn.values()}) > 1
    assert len(titles(command("--random", "99").stdout)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row", "1", "--random", "2"], "--row and --random both say what to show"),
        (["--random", "0"], "--random is 0"),
        (["--html", "recipe.yaml"], "--html recipe.yaml: name the page *.html"),
        (["--html", "nowhere/page.html"], "there is no folder nowhere"),
        pytest.param(["--html", "/proc/page.html"], "--html /proc/page.html can't be written", marks=needs_proc),
        (["--max-lenght", "9"], "unknown setting 'max_lenght'; did you mean 'max_length'?"),
    ],
)
def test_a_mistake_is_named_before_anything_is_prepared(command: Command, options: list[str], message: str) -> None:
    result = command(*options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_html_is_written_instead_of_the_rows(command: Command, tmp_path: Path) -> None:
    result = command("--row", "3", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "wrote example 3 of 6 to page.html" in result.stdout
    assert "🚀" not in result.stdout
    page = (tmp_path / "cwd" / "page.html").read_text(encoding="utf-8")
    assert "🚀" in page
    assert "example 3 of 6" in page
    assert "line 6)" in page


def test_with_colours_there_are_no_marks_and_no_color_brings_them_back(command: Command) -> None:
    colours = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "", "NO_COLOR": ""}
    coloured = command(env=colours).stdout
    assert "\x1b[" in coloured
    assert "⟦" not in coloured
    assert "⟦" in command(env=colours | {"NO_COLOR": "1"}).stdout


def test_a_recipe_for_a_gpu_is_inspected_without_one(command: Command, rows: Path, tokenizer_only: Path) -> None:
    recipe = {"model": str(tokenizer_only), "data": str(rows), "bf16": True, "tf32": True, "packing": True}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"max_length": 128, "train_on": "all"}))
    result = CliRunner().invoke(APP, ["inspect", "recipe.yaml", "--train-on", "assistant", "--row", "1"])
    assert result.exit_code == 0, result.output
    assert titles(result.stdout)[0].startswith("pack 1 of ")
    assert "── document 2 of " in result.stdout
    assert "of up to 128 tokens" in result.stdout


@pytest.mark.parametrize(
    "settings",
    [
        {"train_on": "assistant", "shuffle_dataset": True, "seed": 5},
        {"train_on": "all", "packing": True, "max_length": 64},
        {"train_on": "assistant", "packing": True, "packing_strategy": "wrapped", "max_length": 24},
        {"train_on": "assistant", "max_length": 40, "overlong": "split", "padding_free": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_rows_are_those_that_the_trainer_gets(
    tiny_model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {"model": str(tiny_model), "data": str(rows), "output_dir": str(tmp_path / "run"), "use_cpu": True}
    recipe = resolve(None, given | settings)
    trainer = SFTTrainer(model=recipe.model, args=recipe.config, train_dataset=training_rows(recipe))
    dataset: Any = trainer.train_dataset
    for number in range(1, len(dataset) + 1):
        _, (row,) = prepared(recipe, number, None)
        batch = flat([dataset[number - 1]])
        pieces = [piece for document in row.documents for piece in document.pieces]
        assert [token for piece in pieces for token in piece.ids] == batch["input_ids"][0].tolist()
        mask = [piece.supervised for piece in pieces for _ in piece.ids]
        assert mask == [label != IGNORE_INDEX for label in batch["labels"][0].tolist()]
        assert [document.tokens for document in row.documents] == batch.lengths


def test_a_conversation_of_several_documents_is_shown_document_by_document(command: Command, rows: Path) -> None:
    rows.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS[:1]), encoding="utf-8")
    result = command("--chat-template-path", str(TEMPLATES / "qwen3.jinja"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (title,) = (line for line in lines if line.startswith("example 1 of 1"))
    assert "computed: what documents share, once), " in title
    assert title.endswith(", 3 documents, 3 of them with an end token")
    assert sum(line.startswith("── document ") for line in lines) == 3
    text = result.stdout
    for turn, reasoning in enumerate(("so", "so ", "so s")):
        assert f"⟦<think>⏎\n{reasoning.replace('so ', 'so·') if turn == 1 else reasoning}⏎\n" in text
    ends = [text.index(f"a{turn}<|im_end|>⟧") for turn in range(3)]
    assert ends == sorted(ends), "documents are not in the order of their turns"


@pytest.mark.parametrize(("packed", "cut"), [(True, False), (False, True)])
def test_what_is_held_out_is_cut_as_in_evaluation(tiny_model: Path, rows: Path, packed: bool, cut: bool) -> None:
    sources = {"talks": {"path": str(rows), "held_out": 0.5}}
    packing = {"packing": True, "packing_strategy": "bfd_split", "max_length": 24, "eval_packing": packed}
    given = {"model": str(tiny_model), "data": sources, "output_dir": "unused", "use_cpu": True, "train_on": "all"}
    facts, _ = prepared(resolve(None, given | packing), 1, None)
    held_out = facts[facts.index(("split", "eval")) :]
    assert any("truncated" in f"{name} {found}" for name, found in held_out) == cut
