"""`tunesmith init` writes a recipe that passes `check`, asks at a terminal, and overwrites nothing unasked."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.cli.terminal import Terminal
from tests.refusing import needs_proc
from tunesmith.cli.main import app
from tunesmith.model import devices


def tunesmith(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return written(tmp_path / "mail.jsonl", [{"text": f"mail {i}", "label": ("spam", "ham")[i % 2]} for i in range(60)])


def recipe_of(path: str = "recipe.yaml") -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return read


def test_a_file_is_enough_and_the_recipe_passes_check(labelled: Path, tiny_model: Path) -> None:
    done = tunesmith("init", "--data", "mail.jsonl", "--model", tiny_model)
    assert done.exit_code == 0, done.output
    assert "there is no terminal to ask at" in done.output
    assert "taken are 'text' as 'instruction', 'label' as 'output'" in done.output
    assert "goal: classify (there are only 2 different answers in 60 rows)" in done.output
    assert "note: 2 labels: spam 50%, ham 50%" in done.output
    assert "tunesmith check recipe.yaml" in done.output
    found = recipe_of()
    assert found["data"] == {"mail": {"path": "mail.jsonl", "held_out": 0.1}}
    assert found["columns"] == {"instruction": "text", "output": "label"}
    assert (found["train_on"], found["output"], found["precision"]) == ("completion", "runs/mail", "auto")
    checked = tunesmith("check", "recipe.yaml")
    assert checked.exit_code == 0, checked.output
    assert "train: 54 rows, 54 examples" in checked.output


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_preferences_become_a_recipe_of_their_trainer(trainer: str, tmp_path: Path, tiny_model: Path) -> None:
    answers: dict[str, Any] = {"chosen": "yes", "rejected": "no"}
    if trainer == "kto":
        answers = {"completion": "yes", "label": True}
    written(tmp_path / "rows.jsonl", [{"prompt": f"ask {i}", **answers} for i in range(60)])
    done = tunesmith("init", "--data", "rows.jsonl", "--model", tiny_model)
    assert done.exit_code == 0, done.output
    assert f"goal: {trainer} (" in done.output
    found = recipe_of()
    assert (found["trainer"], found["max_length"]) == (trainer, 64)
    checked = tunesmith("check", "recipe.yaml")
    assert checked.exit_code == 0, checked.output


def test_one_row_is_not_many(tmp_path: Path, tiny_model: Path) -> None:
    written(tmp_path / "one.jsonl", [{"text": "a text"}])
    done = tunesmith("init", "--data", "one.jsonl", "--model", tiny_model)
    assert done.exit_code == 0, done.output
    assert "1 row, format text" in done.output
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert "1 row is too few to hold some out" in text
    assert "for 1 row: " in text
    checked = tunesmith("check", "recipe.yaml").output
    assert "train: 1 row, 1 example, " in checked
    assert not re.search(r"\b1 \w+s\b", done.output + text + checked)


def test_quiet_prints_only_what_was_written(labelled: Path, tiny_model: Path) -> None:
    done = tunesmith("init", "--data", "mail.jsonl", "--model", tiny_model, "--quiet")
    assert (done.exit_code, done.output) == (0, "wrote recipe.yaml\n")
    assert recipe_of()["output"] == "runs/mail"


def test_json_has_what_was_found_and_set(labelled: Path, tiny_model: Path) -> None:
    options = ("--goal", "instruct", "--method", "full", "--output", "runs/a", "--json")
    done = tunesmith("init", "a.yaml", "--data", labelled, "--model", tiny_model, *options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["goal"], found["fit"]["method"], found["rows"]["rows"]) == ("instruct", "full", 60)
    assert found["settings"] | {"learning_rate": 5e-5} == recipe_of("a.yaml") | {"learning_rate": 5e-5}
    assert "lora" not in found["settings"]


def test_a_file_that_is_there_stays_unless_forced(labelled: Path, tiny_model: Path) -> None:
    Path("recipe.yaml").write_text("mine")
    done = tunesmith("init", "--data", labelled, "--model", tiny_model)
    assert done.exit_code == 2
    assert "recipe.yaml is there already; --force writes over it" in done.output
    assert Path("recipe.yaml").read_text() == "mine"
    assert tunesmith("init", "--data", labelled, "--model", tiny_model, "--yes", "--force").exit_code == 0
    assert recipe_of()["model"] == str(tiny_model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml"], "no data; write --data rows.jsonl"),
        (["r.json", "--data", "mail.jsonl"], "r.json is no name for a recipe"),
        (["no/r.yaml", "--data", "mail.jsonl"], "there is no folder no"),
        pytest.param(["/proc/r.yaml", "--data", "none"], "/proc/r.yaml can't be written: No such", marks=needs_proc),
        (["--data", "mial.jsonl"], "did you mean 'mail.jsonl'?"),
        (["--data", "mail.jsonl", "--goal", "clasify"], "did you mean 'classify'?"),
        (["--data", "mail.jsonl", "--method", "qlora"], "choose lora | full | 8bit | 4bit"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: 'prompt' is text (a) and 'completion' is a number"),
        (["--data", "odd.jsonl"], "Here: --columns instruction=left,output=right, if 'left' is the question"),
        (["--data", "shop.csv"], "Here: --columns instruction=Asked,output=Said, if 'Asked' is the question"),
        (["--data", "title.csv"], "--columns text='FAQ 2025'; if that is a title, delete the lines above the header"),
        (["--data", "mail.jsonl", "--columns", "instruction=txt,output=label"], "no column 'txt'"),
        (["--data", "mail.jsonl", "--columns", "txt"], "--columns txt: write ours=yours,..."),
        (["--data", "mail.jsonl", "--columns", "{instruction: text, output: [1]}"], "--columns"),
        (["--data", "mail.jsonl", "--goal", "tools"], "none of these rows has any"),
        (["--data", "calls.jsonl"], "the chat template does not show tool calls"),
    ],
)
def test_a_mistake_is_told_and_nothing_written(
    arguments: list[str], message: str, labelled: Path, tmp_path: Path, tiny_model: Path
) -> None:
    written(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}])
    (tmp_path / "title.csv").write_text("FAQ 2025\nFrage;Antwort\nA?;a\n")
    (tmp_path / "shop.csv").write_text("No,Date,Asked,Where,Said\n1,2026/03/04,Is it here?,web,It is.\n")
    written(tmp_path / "odd.jsonl", [{"left": "a", "right": "b"}])
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    written(tmp_path / "calls.jsonl", [{"messages": [{"role": "user", "content": "a"}, call]}])
    done = tunesmith("init", *arguments, "--model", tiny_model)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not list(tmp_path.glob("**/*.yaml"))


def test_a_model_without_a_chat_template_gets_one_for_conversations(tmp_path: Path, tiny_model: Path) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written(tmp_path / "chat.jsonl", [{"messages": [*turns, *turns]}] * 3)
    done = tunesmith("init", "--data", "chat.jsonl", "--model", "bare", "--yes")
    assert done.exit_code == 0, done.output
    assert "note: 2 rows are exact copies of others" in done.output
    assert recipe_of()["chat_template_path"] == "chatml"
    checked = tunesmith("check", "recipe.yaml")
    assert checked.exit_code == 0, checked.output


def test_too_little_memory_is_told_and_all_is_tried(
    labelled: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = devices.Device(name="small", memory=1_000, precision="fp32", one_kernel=False)
    monkeypatch.setattr("tunesmith.plan.memory.device", lambda name, precision: small)
    done = tunesmith("init", "--data", labelled, "--model", tiny_model)
    assert done.exit_code == 0, done.output
    assert "is planned not to fit into small" in done.output
    found = recipe_of()
    assert (found["per_device_train_batch_size"], found["gradient_checkpointing"]) == (1, True)
    assert found["quantize"] == "4bit"


def test_at_a_terminal_it_asks_for_what_is_left_out(tmp_path: Path, tiny_model: Path) -> None:
    written(tmp_path / "問答.jsonl", [{"問題": f"第{i}題", "答案": f"答案是{i}。"} for i in range(30)])
    terminal = Terminal(["init", "mine.yaml", "--output", "runs/qa"], columns=100)
    for question, answer in (
        ("Your rows", "nowhere.jsonl"),
        ("error: no file nowhere.jsonl", ""),
        ("Your rows", "問答.jsonl"),
        ("Which model", str(tiny_model)),
        ("'問題' as 'instruction', '答案' as 'output'", ""),
        ("Is that right", "y"),
        ("What are they for", "nonsense"),
        ("What are they for", "chat"),
        ("What is trained", ""),
        ("Write mine.yaml", "y"),
    ):
        terminal.expect(question)
        if answer or question == "What is trained":
            terminal.type(f"{answer}\n")
    terminal.expect("wrote mine.yaml")
    assert terminal.finish() == 0
    found = recipe_of("mine.yaml")
    assert found["columns"] == {"instruction": "問題", "output": "答案"}
    assert (found["train_on"], found["lora"]["r"], found["output"]) == ("completion", 16, "runs/qa")
    assert found["data"] == "問答.jsonl"


def test_columns_are_known_in_other_languages_and_a_table_named_txt_is_told(tmp_path: Path, tiny_model: Path) -> None:
    lines = ["Frage;Antwort;"] + [f'Wie {i}?;"So {i},{chr(10)}genau.";' for i in range(20)] + [";;"]
    (tmp_path / "fragen.csv").write_text("\r\n".join(lines), encoding="utf-16")
    done = tunesmith("init", "--data", "fragen.csv", "--model", tiny_model)
    assert done.exit_code == 0, done.output
    assert recipe_of()["columns"] == {"instruction": "Frage", "output": "Antwort"}
    assert "20 rows, format instruction" in done.output
    (tmp_path / "fragen.txt").write_text('Frage\tAntwort\nA?\t"a\nmore"\nB?\tb\n')
    assert "name the file .tsv" in tunesmith("init", "t.yaml", "--data", "fragen.txt", "--model", tiny_model).output
    (tmp_path / "text.txt").write_text("A\tb\nmore\ttabs\there\n")
    assert ".tsv" not in tunesmith("init", "u.yaml", "--data", "text.txt", "--model", tiny_model).output


@pytest.mark.slow
def test_from_rows_to_a_trained_demo_model(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + 1?"},
                {"role": "assistant", "content": f'{{"sum": {i + 1}}}'},
            ]
        }
        for i in range(50)
    ]
    written(tmp_path / "sums.jsonl", rows)
    done = tunesmith("init", "--data", "sums.jsonl", "--yes")
    assert done.exit_code == 0, done.output
    assert "model: demo (SmolLM2-135M-Instruct" in done.output
    assert "goal: json" in done.output
    quick = ("--max-steps", 2, "--sample-prompts", 0, "--self-test", "off", "--eval-strategy", "no")
    trained = tunesmith("train", "recipe.yaml", *quick)
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "runs" / "sums" / "adapter_model.safetensors").is_file()
