"""`tunesmith plan` shows every way to train in 80 columns, says what to change, and refuses what it can't plan for."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tunesmith.cli.main import Commands
from tunesmith.cli.plan import HELP, USAGE, plan
from tunesmith.model import devices
from tunesmith.terminal.output import Application

app = Application(cls=Commands)
app.callback()(lambda: None)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, help=HELP, options_metavar=USAGE
)(plan)


def planned(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {tiny_model}\ndata: nowhere.jsonl\noutput: {tmp_path}/run\nlora: {{r: 4}}\nmax_length: 64\n"
        "per_device_train_batch_size: 3\n"
    )
    return file


def test_a_recipe_is_planned_for_every_method_in_80_columns(recipe: Path) -> None:
    result = planned(recipe)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "fp32, 3 rows of 64 tokens, gradient checkpointing off" in lines[0]
    table = [line.rstrip() for line in lines[1:]]
    assert all(len(line) <= 80 for line in table)
    assert next(line.split() for line in table if line.strip()) == ["GB", "full", "lora", "8bit", "4bit"]
    assert any(line.split() == ["fits", "yes", "yes", "yes", "yes"] for line in table)
    assert any(line.split() == ["largest", "max_length,", "3", "rows", *["256"] * 4] for line in table)
    assert lines[-1] == "lora fits."
    assert not Path(recipe.parent / "run").exists()


def test_options_alone_and_json(tiny_model: Path) -> None:
    result = planned("--model", tiny_model, "--max-length", 32, "--gpu", "t4", "--method", "4bit", "--json", "--lora")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["device"], found["precision"], found["max_length"], found["rows"]) == ("t4", "fp16", 32, 8)
    assert list(found["methods"]) == ["4bit"]
    only = found["methods"]["4bit"]
    assert only["total"] == sum(only["memory"].values())
    assert only["fits"]
    assert found["advice"] == []


def test_the_recipes_precision_and_batches_are_those_planned_for(recipe: Path) -> None:
    more = ("--method", "lora", "--json", "--precision", "bf16", "--gpu", "t4")
    result = planned(recipe, *more, "--max-length", 16)
    assert json.loads(result.stdout)["precision"] == "bf16"
    by_tokens = recipe.parent / "tokens.yaml"
    by_tokens.write_text(recipe.read_text().replace("per_device_train_batch_size: 3", "max_tokens_per_batch: 200"))
    found = json.loads(planned(by_tokens, *more).stdout)
    assert (found["rows"], found["max_length"]) == (3, 64)


def test_a_recipe_that_does_not_fit_says_what_to_change(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = devices.Device(name="small", memory=530_000_000, precision="fp32", one_kernel=False)
    monkeypatch.setitem(devices.GPUS, "small", room)
    text = recipe.read_text().replace("size: 3", "size: 256").replace("lora: {r: 4}", "gradient_accumulation_steps: 2")
    recipe.write_text(text)
    asked = (recipe, "--gpu", "small", "--max-length", 256, "--method", "full")
    result = planned(*asked)
    assert result.exit_code == 2
    told = result.stdout[result.stdout.index("full does not fit. What would change that:") :]
    assert "gradient_checkpointing: true" in told
    [rows] = [line for line in told.splitlines() if "per_device_train_batch_size" in line]
    number = int(rows.split(": ")[1].split(",")[0])
    assert 0 < number < 256
    steps = int(rows.split("steps: ")[1].split()[0])
    assert steps * number >= 512 > (steps - 1) * number
    changed = recipe.read_text().replace("size: 256", f"size: {number}")
    recipe.write_text(changed)
    assert planned(*asked).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "a101"), "--gpu a101: choose"),
        (("--method", "loar"), "--method loar: choose full | lora | 8bit | 4bit; did you mean 'lora'?"),
        (("--shard", "all", "--processes", 2), "--shard all: choose none | grad | full"),
        (("--shard", "full", "--method", "4bit"), "4bit weights can't be cut into rows; leave shard out"),
        (("--max-length", "none"), "max_length is None"),
        (("--max-lenght", "3"), "did you mean 'max_length'"),
        (("--model", "owner/nowhere"), "owner/nowhere could not be loaded"),
    ],
)
def test_mistakes_are_named(recipe: Path, arguments: tuple[str, ...], message: str) -> None:
    result = planned(recipe, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_several_processes_have_a_table_of_their_own(recipe: Path) -> None:
    asked = (recipe, "--gpu", "h100", "--processes", 4, "--shard", "full", "--method", "full")
    result = planned(*asked)
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    first = lines.index("full, shard full, the same rows in each process:")
    rows = [line.split() for line in lines[first:] if line.endswith("/s") or line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["processes", "1", "4", "8", "64", "512"]
    assert any(line.startswith("sent by each of 512: all-gather") for line in lines)
    found = json.loads(planned(*asked, "--json").stdout)["processes"]
    assert (found["processes"], found["shard"]) == (4, "full")
    one, four = found["scales"][:2]
    assert one["sent"] == {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
    assert four["sent"]["all_reduce"] == 0 < four["sent"]["reduce_scatter"]
    assert four["tokens"] == 4 * one["tokens"] == 4 * 3 * 64


def test_pairs_are_planned_as_two_answers(recipe: Path) -> None:
    found = json.loads(planned(recipe, "--trainer", "dpo", "--json").stdout)["methods"]
    assert found["lora"]["memory"]["reference"] == 0
    assert found["full"]["memory"]["reference"] * 2 == found["full"]["memory"]["optimizer"]
    assert "3 rows of 2 answers of 64 tokens" in planned(recipe, "--trainer", "dpo").stdout
