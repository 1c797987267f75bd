"""`tunesmith eval` scores the model's own answers, the base model's beside them, and says what it left out."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from typer.testing import CliRunner

from tests.ship.runs import adapter_run, full_run, record
from tunesmith.cli.data import data_recipe, preparer_of, training_rows
from tunesmith.cli.eval import evaluate
from tunesmith.cli.main import Commands
from tunesmith.model.generate import generate
from tunesmith.model.load import load_model, load_run, load_tokenizer
from tunesmith.runs.record import Method, Origin, Prompt
from tunesmith.terminal.output import Application

RUNNER = CliRunner()
NEW = 6
app = Application(cls=Commands)
app.command("eval")(evaluate)


@app.callback()
def options() -> None:
    """So that the command keeps its name."""


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for content in contents]


PROMPTS = [chat(f"say {word}") for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with weights large enough that answers depend on the prompt."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(tiny_model, folder)
    model = load_model(str(tiny_model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return adapter_run(tmp_path_factory.mktemp("runs") / "adapters", base)


def answers(run: Path, prompts: Sequence[Any] = PROMPTS, count: int = NEW) -> list[str]:
    model, tokenizer = load_run(str(run))
    return generate(model, tokenizer, prompts, max_new_tokens=count)


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversations(path: Path, expected: Sequence[str], prompts: Sequence[Any] = PROMPTS) -> str:
    pairs = zip(prompts, expected, strict=True)
    return written(path, [{"messages": [*prompt, {"role": "assistant", "content": text}]} for prompt, text in pairs])


def invoke(run: Path | str, data: str, *arguments: str) -> Any:
    return RUNNER.invoke(app, ["eval", str(run), "--data", data, "--max-new-tokens", str(NEW), *arguments])


def result_of(run: Path | str, data: str, *arguments: str) -> dict[str, Any]:
    result = invoke(run, data, "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_run_with_adapters_is_measured_beside_its_base_model(adapters: Path, base: Path, tmp_path: Path) -> None:
    tuned, before = answers(adapters), answers(base)
    assert not {*tuned} & {*before}
    data = conversations(tmp_path / "rows.jsonl", [*tuned[:5], before[5], "x", "y"])
    output = tmp_path / "answers.jsonl"
    found = result_of(adapters, data, "--metric", "exact_match", "--metric", "rouge", "--output", str(output))
    exact, rouge = found["metrics"]
    assert (exact["name"], exact["kind"], exact["rows"]) == ("exact_match", "share", 8)
    assert (exact["tuned"]["value"], exact["base"]["value"], exact["difference"]["value"]) == (0.625, 0.125, 0.5)
    assert exact["tuned"]["low"] < 0.625 < exact["tuned"]["high"]
    assert rouge["kind"] == "mean"
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["tuned"]["answer"] for line in lines] == tuned
    assert [line["base"]["answer"] for line in lines] == before
    assert [line["tuned"]["scores"]["exact_match"] for line in lines] == [1.0] * 5 + [0.0] * 3
    assert lines[0]["prompt"] == PROMPTS[0]
    assert lines[0]["place"] == f"{data}, line 1"


def test_without_the_base_model_the_run_stands_alone(adapters: Path, tmp_path: Path) -> None:
    found = result_of(adapters, conversations(tmp_path / "rows.jsonl", ["x"] * 8), "--no-base")
    assert [metric["base"] for metric in found["metrics"]] == [None, None]
    assert found["cut_off"].keys() == {"tuned"}


def test_virtual_tokens_are_not_the_base_models(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(str(base)), settings)
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(str(tmp_path / "run"))
    data = conversations(tmp_path / "rows.jsonl", answers(base))
    [exact, _] = result_of(tmp_path / "run", data)["metrics"]
    assert exact["base"]["value"] == 1.0
    assert exact["tuned"]["value"] < 1.0


def test_the_base_model_of_a_full_run_is_the_one_its_record_names(
    base: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "known")
    monkeypatch.chdir(tmp_path)  # where a name of the hub is a folder, too
    data = conversations(tmp_path / "rows.jsonl", answers(base))
    origin = Origin(kind="hub", name="known")
    run = full_run(tmp_path / "run", tiny_model, run_record=record(method=Method(), base_model=origin))
    (tmp_path / "run" / "checkpoint-20").rename(tmp_path / "elsewhere")
    [exact, _] = result_of(run, data)["metrics"]
    assert (exact["tuned"]["value"], exact["base"]["value"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        (None, "has no record (run.json) that names one"),
        (Origin(kind="folder", name="mine"), "it was the local folder mine"),
        (Origin(kind="hub", name="owner/nowhere"), "owner/nowhere could not be loaded"),
    ],
)
def test_a_base_model_that_cannot_be_had_is_said_and_left_out(
    tiny_model: Path, tmp_path: Path, origin: Origin | None, reason: str
) -> None:
    kept = None if origin is None else record(method=Method(), base_model=origin)
    run = full_run(tmp_path / "run", tiny_model, run_record=kept)
    found = result_of(run, conversations(tmp_path / "rows.jsonl", ["x"] * 8), "--metric", "exact_match")
    assert found["metrics"][0]["base"] is None
    assert any(reason in note for note in found["notes"])


def test_the_table_fits_a_terminal_and_says_what_was_left_out_and_cut_off(adapters: Path, tmp_path: Path) -> None:
    tuned = answers(adapters)
    good = conversations(tmp_path / "good.jsonl", [*tuned[:4], "x", "x", "x", "x"])
    rows = [json.loads(line) for line in Path(good).read_text().splitlines()]
    rows[2:2] = [
        {"messages": PROMPTS[0]},
        {"messages": [*chat("long " * 50), {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {
            "messages": [
                *PROMPTS[1],
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            ]
        },
    ]
    data = written(tmp_path / "rows.jsonl", rows)
    result = invoke(adapters, data)
    assert result.exit_code == 0, result.output
    table = result.stdout[: result.stdout.index("In brackets")]
    assert max(map(len, table.splitlines())) <= 80
    exact = next(line for line in table.splitlines() if "exact_match" in line)
    assert re.split(" {2,}", exact.strip())[1:] == ["8", "0% (0, 32)", "50% (22, 78)", "+50 (+4, +76)"]
    rouge = next(line for line in table.splitlines() if "rouge" in line)
    assert rouge.count("(") == rouge.count(")") == 3  # none is broken
    assert f"left out: 1 with no answer ({data}, line 3)" in result.stdout
    assert f"left out: 1 with no prompt ({data}, line 5)" in result.stdout
    assert "left out: 1 with a call of a tool for its answer" in result.stdout
    assert "left out: 1 with a prompt too long to answer in 6 of the model's 256 tokens" in result.stdout
    [cut] = [line for line in result.stdout.splitlines() if line.startswith("cut off")]
    assert "cut off: 8 tuned and 8 base answers did not end within 6 tokens" in cut
    assert cut.count(data) == 3
    alone = invoke(adapters, data, "--no-base").stdout
    assert "cut off: 8 tuned answers did not end" in alone
    assert "metrics: exact_match, rouge, because the expected answers are texts" in result.stderr
    assert "answers, base" in result.stderr


def test_an_answer_that_ends_is_not_cut_off(base: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", base)
    texts = answers(run)
    letters = [letter for letter in "".join(texts) if letter.isascii() and not any(t.startswith(letter) for t in texts)]
    stop = next(letter for letter in letters if not all(letter in text for text in texts))
    tokenizer = load_tokenizer(str(run))
    settings = json.loads((run / "generation_config.json").read_text())
    settings["eos_token_id"] = [tokenizer.eos_token_id, tokenizer(stop, add_special_tokens=False)["input_ids"][0]]
    (run / "generation_config.json").write_text(json.dumps(settings))
    ended = [stop in text for text in texts]
    shorter = [text.partition(stop)[0] for text in texts]
    output = tmp_path / "answers.jsonl"
    found = result_of(run, conversations(tmp_path / "rows.jsonl", shorter), "--output", str(output))
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [not line["tuned"]["cut_off"] for line in lines] == ended
    assert found["cut_off"]["tuned"] == ended.count(False)
    assert found["metrics"][0]["tuned"]["value"] == 1.0


def test_texts_are_asked_as_the_run_was_trained(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_run(str(base))
    as_chat = answers(base)
    tokenizer.chat_template = None
    as_text = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)
    assert not {*as_text} & {*as_chat}
    rows = [{"q": prompt[0]["content"], "a": f"{text} "} for prompt, text in zip(PROMPTS, as_text, strict=True)]
    data = written(tmp_path / "rows.jsonl", rows)
    arguments = ("--columns", "{prompt: q, completion: a}", "--metric", "contains")
    texts = full_run(tmp_path / "texts", base, run_record=record(method=Method(), prompts=(Prompt(prompt="text"),)))
    talks = full_run(tmp_path / "talks", base, run_record=record(method=Method(), prompts=(Prompt(prompt=({},)),)))
    for run, more, share in (
        (texts, (), 1.0),
        (talks, (), 0.0),
        (base, (), 0.0),
        (talks, ("--text",), 1.0),
        (texts, ("--chat",), 0.0),
    ):
        assert result_of(run, data, *arguments, *more)["metrics"][0]["tuned"]["value"] == share
    assert "as a user's message (as in training); --text does otherwise" in invoke(talks, data, *arguments).stderr


def test_columns_are_those_of_the_training_where_the_rows_have_them(base: Path, tmp_path: Path) -> None:
    rows = [
        {"Frage": prompt[0]["content"], "Antwort": text} for prompt, text in zip(PROMPTS, answers(base), strict=True)
    ]
    data = written(tmp_path / "rows.jsonl", rows)
    settings = {"columns": {"instruction": "Frage", "output": "Antwort"}}
    run = full_run(tmp_path / "run", base, run_record=record(method=Method(), settings=settings))
    found = result_of(run, data)
    assert (found["rows"], found["metrics"][0]["tuned"]["value"]) == (8, 1.0)
    assert "columns: 'Frage' as 'instruction', 'Antwort' as 'output', as in training" in invoke(run, data).stderr
    turned = result_of(run, data, "--columns", "instruction=Antwort,output=Frage")
    assert turned["metrics"][0]["tuned"]["value"] == 0.0
    assert result_of(run, conversations(tmp_path / "talks.jsonl", answers(base)))["metrics"][0]["tuned"]["value"] == 1.0


def test_without_data_it_asks_the_rows_that_training_held_out(base: Path, tmp_path: Path) -> None:
    rows = [{"Frage": f"question {i}", "Antwort": f"answer {i}"} for i in range(20)]
    data, run = written(tmp_path / "rows.jsonl", rows), full_run(tmp_path / "run", base, run_record=None)
    recipe = {
        "model": str(base),
        "output": "runs/x",
        "seed": 7,
        "columns": {"instruction": "Frage", "output": "Antwort"},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"data": {"a": {"path": data, "held_out": 0.2}}}))
    trained = data_recipe([str(run / "recipe.yaml")])
    preparer = preparer_of(trained)
    preparer.everything(training_rows(trained), None)
    held_out = {preparer.tokenizer.decode(row["input_ids"]) for row in preparer.examples["eval"]}
    output = tmp_path / "answers.jsonl"
    result = RUNNER.invoke(app, ["eval", str(run), "--max-new-tokens", "2", "--no-base", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert f"asking the 4 rows that {run} held out" in result.stderr
    asked = [json.loads(line)["expected"] for line in output.read_text().splitlines()]
    assert len(asked) == len(held_out) == 4
    assert all(any(text in example for example in held_out) for text in asked)
    again = invoke(run, data, "--limit", "1", "--no-base").stderr
    assert f"was trained on rows of {data}, so that scores say little of others; leave --data out" in again
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"data": data}))
    for arguments, message in (
        ([], "has held no rows out; write --data FILE"),
        (["--split", "test"], "--split is for --data, which is missing"),
    ):
        refused = RUNNER.invoke(app, ["eval", str(run), *arguments])
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert "give rows that it has not seen" in invoke(run, data, "--limit", "1", "--no-base").stderr


def test_a_system_message_takes_the_place_of_the_rows_own(base: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    expected = answers(base, [[system, *prompt] for prompt in PROMPTS])
    own = [[{"role": "system", "content": "be long"}, *prompt] for prompt in PROMPTS]
    data = conversations(tmp_path / "rows.jsonl", expected, own)
    [exact, _] = result_of(base, data, "--system", "be brief")["metrics"]
    assert exact["tuned"]["value"] == 1.0
    assert result_of(base, data)["metrics"][0]["tuned"]["value"] < 1.0


def test_the_template_sees_the_rows_tools_and_its_refusal_names_the_row(base: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", base)
    tokenizer = load_tokenizer(str(run))
    refusing = "{% if not tools %}{{ raise_exception('where are the tools?') }}{% endif %}"
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    tokenizer.save_pretrained(run)
    row = {"messages": [*PROMPTS[0], {"role": "assistant", "content": "x"}]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    data = written(tmp_path / "rows.jsonl", [row | {"tools": tools}, row])
    result = invoke(run, data)
    assert result.exit_code == 2
    assert re.search(r"line 2: the chat template of \S+ refuses the conversation: where are the tools\?", result.stderr)


def test_a_limit_draws_rows_by_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "rows.jsonl", ["x"] * 8)

    def drawn(seed: int) -> list[str]:
        output = tmp_path / "answers.jsonl"
        output.unlink(missing_ok=True)
        arguments = ("--limit", "3", "--seed", str(seed), "--output", str(output))
        assert result_of(tiny_model, data, *arguments)["rows"] == 3
        return [json.loads(line)["place"] for line in output.read_text().splitlines()]

    assert drawn(0) == sorted(drawn(0))
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "exact"), "metric is 'exact'"),
        (("--metric", "number"), "metric number needs a number in the expected answers, and none of 8 has one"),
        (("--limit", "0"), "limit is 0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--columns", "prompt"), "--columns prompt: write ours=yours,..."),
        (("--columns", "{promt: q}"), "did you mean 'prompt'"),
        (("--split", "test"), "which has no splits"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("owner/nowhere", conversations(tmp_path / "rows.jsonl", ["x"] * 8), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_files_that_are_missing_or_in_the_way_are_told_first(tmp_path: Path) -> None:
    assert "no file nothing.jsonl" in invoke("owner/nowhere", "nothing.jsonl").stderr
    data = conversations(tmp_path / "rows.jsonl", ["x"] * 8)
    assert f"output {data} is there already" in invoke("owner/nowhere", data, "--output", data).stderr
    absent = str(tmp_path / "absent" / "out.jsonl")
    assert "is no folder that can be written to" in invoke("owner/nowhere", data, "--output", absent).stderr
    result = invoke("owner/nowhere", data)
    assert result.exit_code == 2
    assert "owner/nowhere could not be loaded" in result.stderr


def test_data_without_questions_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    texts = written(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": "b"}])
    result = invoke(tiny_model, texts)
    assert result.exit_code == 2
    assert "no row with a prompt and an answer: 2 with one text, not a prompt and an answer" in result.stderr
    data = conversations(tmp_path / "rows.jsonl", ["x"], [chat("long " * 60)])
    assert "every prompt is too long: the model has room for 256 tokens" in invoke(tiny_model, data).stderr
    pairs = written(tmp_path / "pairs.jsonl", [{"messages": [*PROMPTS[0], {"role": "assistant", "content": "x"}]}])
    assert "--text is for prompts that are texts" in invoke(tiny_model, pairs, "--text").stderr
