"""The record of a run comes back as it was written, and tells nothing that is nobody's business."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models import tiny
from tests.ship.runs import record
from tunesmith.data.preflight import Preflight, SplitReport
from tunesmith.data.tokenize import Counts
from tunesmith.errors import TunesmithError
from tunesmith.runs.describe import adapter_settings_of, counts_of, method_of, prompts_of, settings_of, versions
from tunesmith.runs.files import write_whole
from tunesmith.runs.record import Method, Origin, Prompt, RunRecord
from tunesmith.settings.config import SFTConfig
from tunesmith.types import Conversation, Message, Row, Text, Tokens


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record()
    assert written.write(tmp_path / "new") == tmp_path / "new" / "run.json"
    assert RunRecord.read(tmp_path / "new") == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_a_folder_without_a_record_has_none(tmp_path: Path) -> None:
    assert RunRecord.read(tmp_path) is None


def test_numbers_of_any_library_are_written_and_those_that_are_none_are_null(tmp_path: Path) -> None:
    history = ({"loss": torch.tensor(2.5), "grad_norm": float("nan"), "step": 1, "path": Path("a/b")},)
    record(history=history, metrics={"eval_loss": math.inf}).write(tmp_path)
    found = RunRecord.read(tmp_path)
    assert found is not None
    assert found.history == ({"loss": 2.5, "grad_norm": None, "step": 1, "path": "b"},)
    assert found.metrics == {"eval_loss": None}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    record().write(tmp_path)
    before = (tmp_path / "run.json").read_bytes()

    class Odd:
        def item(self) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record(settings={"x": Odd()}).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_who_may_read_a_file_says_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "new" / "page.html", "one \ud800 two")
    finally:
        os.umask(before)
    path = tmp_path / "new" / "page.html"
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert path.read_text() == r"one \ud800 two"
    assert [item.name for item in path.parent.iterdir()] == ["page.html"]


def test_a_link_is_written_through_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("before")
    (tmp_path / "link").symlink_to("page.html")
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page.html").read_text() == "after"


def test_tokens_and_passwords_are_blacked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", 'a"quoted"key')
    token = "hf_" + "a1" * 17
    record(settings={"note": f'with {token} and a"quoted"key'}).write(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text)["settings"]["note"] == "with <secret> and <secret>"


@pytest.mark.parametrize(
    ("name", "kind", "public"),
    [
        ("demo", "demo", "demo"),
        ("/home/me/.cache/tunesmith/demo-b179c9523d0e-v1", "demo", "demo"),
        ("org/model", "hub", "org/model"),
        ("gpt2", "hub", "gpt2"),
        ("/home/me/models/mine", "folder", "mine"),
        ("~/mine/", "folder", "mine"),
        ("../mine", "folder", "mine"),
        (r"C:\Users\me\mine", "folder", "mine"),
    ],
)
def test_of_a_model_the_record_keeps_no_path(name: str, kind: str, public: str) -> None:
    assert Origin.of_model(name) == Origin(kind=kind, name=public)  # type: ignore[arg-type]


def test_a_folder_here_is_not_the_model_of_that_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Origin.of_model("org/model") == Origin(kind="folder", name="model")


@pytest.mark.parametrize(
    ("name", "kind", "public"),
    [
        ("org/rows", "hub", "org/rows"),
        ("org/rows:main", "hub", "org/rows:main"),
        ("/home/me/rows.jsonl", "file", "rows.jsonl"),
        ("rows.csv", "file", "rows.csv"),
        ("private/*.jsonl", "file", "*.jsonl"),
        ("rows.jsonl.zst", "file", "rows.jsonl.zst"),
        (r"C:\rows.parquet", "file", "rows.parquet"),
        (None, "memory", "rows made by a program"),
    ],
)
def test_of_data_the_record_keeps_no_path(name: str | None, kind: str, public: str) -> None:
    assert Origin.of_data(name) == Origin(kind=kind, name=public)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "it holds list"),
        ('{"format": 99}', "its format is 99"),
        ('{"format": 1}', "it is incomplete"),
        ('{"format": 1, "history": 3}', "history is '3'"),
        ('{"format": 1, "trainable_parameters": true}', "trainable_parameters is 'True'"),
        ('{"format": 1, "data": [{"split": 1}]}', r"data\[0\].split is '1'"),
        ('{"format": 1, "base_model": {"kind": "x", "name": "y"}}', "base_model.kind is 'x'"),
    ],
)
def test_a_file_that_is_no_record_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TunesmithError, match=f"run.json can't be read: {said}"):
        RunRecord.read(tmp_path)


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    values = json.loads(record().to_json()) | {"carbon": 3}
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert RunRecord.read(tmp_path) == record()


# From the trainer


def test_the_method_and_the_parameters_are_those_of_the_model() -> None:
    model = tiny("llama")
    assert method_of(model) == Method()
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    method = method_of(adapted)
    assert (method.kind, method.rank, method.alpha, method.bits) == ("lora", 2, 4, None)
    assert method.targets == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_the_settings_are_those_that_had_an_effect(tmp_path: Path) -> None:
    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, assistant_only_loss=True, max_steps=7, hub_token="hf_never"
    )
    found = settings_of(config)
    assert found["train_on"] == "assistant"
    assert found["lr_scheduler_type"] == "linear"
    assert found["max_steps"] == 7
    assert not {"num_train_epochs", "packing_strategy", "hub_token", "output_dir"} & found.keys()
    json.dumps(found)


def test_settings_that_are_not_as_by_default_are_told_without_secrets_and_places(tmp_path: Path) -> None:
    made: dict[str, Any] = {"adam_epsilon": 1e-6, "columns": {"prompt": "q"}, "pad_token": "<pad>"}
    kept: dict[str, Any] = {"token": "hf_never", "api_key": "never", "dtype": "float32", "max_memory": ["/home/me/a"]}
    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, run_name="mine", report_to="none", model_init_kwargs=kept, **made
    )
    found = settings_of(config)
    assert {name: found.get(name) for name in made} == made
    assert "eval_strategy" not in found
    assert found["model_init_kwargs"] == {"dtype": "float32", "max_memory": ["a"]}
    assert settings_of(SFTConfig(output_dir=str(tmp_path), max_length=None))["max_length"] == "none"
    assert not {"run_name", "report_to", "bf16", "disable_tqdm", "use_cpu"} & found.keys()


def test_adapters_tell_what_is_not_as_by_default() -> None:
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True, exclude_modules=["up_proj"]
    )
    adapted = get_peft_model(tiny("llama"), lora)
    assert adapter_settings_of(adapted) == {
        "lora.modules_to_save": ["lm_head"],
        "lora.exclude_modules": ["up_proj"],
        "lora.use_dora": True,
    }
    assert adapter_settings_of(tiny("llama")) == {}


def test_every_source_of_every_split_is_counted() -> None:
    counts = Counts(rows=9, examples=5, tokens=50, supervised=20, dropped={"long": (3, ["a"]), "empty": (1, ["b"])})
    report = SplitReport(counts=counts, longest=10, lengths=[], duplicates=0, without_end=0, double_bos=0, weightless=0)
    preflight = Preflight(splits={"train/math": report, "math": report, "train/odd": report}, problems=[], notes=[])
    math_rows = Origin.of_data("math.jsonl")
    found = counts_of(preflight, {"math": math_rows})
    assert [(count.split, count.source, count.origin.name) for count in found] == [
        ("train", "math", "math.jsonl"),
        ("math", "math", "math.jsonl"),
        ("train", "odd", "rows made by a program"),
    ]
    assert (found[0].examples, found[0].tokens, found[0].supervised_tokens, found[0].dropped) == (5, 50, 20, 4)


def test_versions_name_what_computes() -> None:
    assert versions()["torch"] == torch.__version__
    assert {"tunesmith", "python", "transformers", "peft"} <= versions().keys()


def test_prompts_end_before_the_last_answer_and_come_once() -> None:
    def turn(role: str, content: Any) -> Message:
        return Message(fields={"role": role, "content": content})

    asked = (turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d"))
    rows: list[Row] = [
        Tokens(input_ids=[1, 2]),
        Conversation(messages=(turn("user", [{"type": "text"}]), turn("assistant", "x"))),
        Conversation(messages=asked),
        Conversation(messages=asked),
        Conversation(messages=(turn("assistant", "alone"),)),
        Text(text="no prompt"),
        Text(text="2 + 2 = 4", prompt="2 + 2 ="),
        Text(text="never reached", prompt="never"),
    ]
    first, second = prompts_of(rows, 2)
    assert first == Prompt(prompt=tuple(message.fields for message in asked[:3]), expected="d")
    assert second == Prompt(prompt="2 + 2 =", expected="4")
