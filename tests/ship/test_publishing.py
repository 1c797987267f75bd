"""What the trainer writes of itself, and sends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.ship.conftest import TOKEN
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.errors import TunesmithError
from tunesmith.practice.hub_state import Hub
from tunesmith.runs.record import Origin, Prompt, RunRecord

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("yes", "no", "maybe", "perhaps")
]
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def trainer_of(tiny_model: Path, tmp_path: Path) -> Callable[..., SFTTrainer]:
    """Makes a trainer of two steps on ROWS, with the tiny model."""

    def make(peft_config: Any = None, **settings: Any) -> SFTTrainer:
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "report_to": "none",
            "use_cpu": True,
            "precision": "fp32",
            "disable_tqdm": True,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
        }
        args = SFTConfig(**common | settings)
        return SFTTrainer(str(tiny_model), args, train_dataset=ROWS, eval_dataset=ROWS[:1], peft_config=peft_config)

    return make


def test_the_record_says_what_was_trained_on_what_and_how_it_went(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(LORA, eval_strategy="steps", eval_steps=1, train_on="assistant")
    trainer.origins["train"] = Origin.of_data("org/rows")
    trainer.train()
    trainer.save_model()
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.base_model == Origin(kind="folder", name=Path(trainer.model.base_model.name_or_path).name)
    assert (record.method.kind, record.method.rank) == ("lora", 4)
    assert (record.trainable_parameters, record.total_parameters) == (
        sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        sum(p.numel() for p in trainer.model.parameters()),
    )
    assert {(part.split, part.origin.name, part.examples) for part in record.data} == {
        ("train", "org/rows", 4),
        ("eval", "rows made by a program", 1),
    }
    report = trainer.preflight.splits["train"]
    [train] = [part for part in record.data if part.split == "train"]
    assert (train.tokens, train.supervised_tokens) == (report.counts.tokens, report.counts.supervised)
    assert record.settings["learning_rate"] == 1e-2
    assert record.settings["train_on"] == "assistant"
    assert [entry["loss"] for entry in record.history if "loss" in entry]
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert record.metrics["eval_loss"] == last
    assert record.seconds is not None
    assert record.prompts[0] == Prompt(prompt=({"role": "user", "content": "say yes"},), expected="yes")
    assert len(record.prompts) == 3


@pytest.mark.reports
def test_the_record_is_the_runs_and_not_of_its_checkpoints(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    trainer_of(save_strategy="steps", save_steps=1).train()
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert list((tmp_path / "run").glob("**/run.json")) == [tmp_path / "run" / "run.json"]


@pytest.mark.parametrize("adapters", [LORA, None], ids=["adapters", "full"])
def test_push_to_hub_sends_the_model_with_a_card_that_shows_answers(
    adapters: Any, hub: Hub, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(adapters, hub_model_id="mine")
    trainer.train()
    report = trainer.push_to_hub(
        "First", private=True, license="apache-2.0", dataset_name="org/rows", base_model="org/b"
    )
    owner = report.url.removeprefix(hub.url).split("/")[1]
    files = hub.files(f"{owner}/mine")
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "org/rows" in card
    weights = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert files[weights] == (tmp_path / "run" / weights).read_bytes()
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    # The base of the whole model is a folder, which only this machine has: what it would have said is not known.
    assert len(record.samples) == (3 if adapters else 0)
    assert ("before" in card.lower()) == bool(adapters)
    assert b'"samples": []' not in files["run.json"] or not adapters
    assert not any(TOKEN.encode() in content for content in files.values())


def test_the_draft_of_a_card_takes_trls_arguments_and_gives_way_to_a_full_one(
    hub: Hub, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(hub_model_id="org/drafted")
    trainer.train()
    trainer.create_model_card(model_name="drafted", dataset_name="org/rows", tags=["shop"])
    draft = (tmp_path / "run" / "README.md").read_text()
    assert all(text in draft for text in ("drafted", "org/rows", "shop", "More information needed"))
    trainer.push_to_hub()
    card = hub.files("org/drafted")["README.md"].decode()
    assert "org/rows" in card
    assert "More information needed" not in card


def test_every_save_sends_the_checkpoints_model_and_nothing_of_the_optimizer(
    hub: Hub, trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(push_to_hub=True, hub_model_id="org/run", save_strategy="steps", save_steps=1)
    trainer.train()
    files = hub.files("org/run")
    assert files["model.safetensors"]
    assert not [name for name in files if name.endswith((".pt", ".pth", ".bin")) or "checkpoint" in name]


def test_every_save_goes_to_the_branch_that_hub_revision_names(hub: Hub, trainer_of: Callable[..., Any]) -> None:
    saves = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1}
    trainer_of(**saves, hub_model_id="org/run", hub_revision="tried").train()
    assert hub.files("org/run", "tried")["model.safetensors"]
    assert "model.safetensors" not in hub.files("org/run")


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_send_the_optimizer_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match=f"hub_strategy is {strategy}, which sends the optimizer's state"):
        SFTConfig(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)


def test_merge_and_save_writes_the_model_that_was_trained(
    trainer_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(LORA)
    trainer.train()
    report = trainer.merge_and_save(tmp_path / "merged")
    assert report.drift is not None
    ids = torch.arange(10, 30)[None]
    trainer.model.eval()
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
        torch.testing.assert_close(merged, trainer.model(ids).logits, rtol=0, atol=1e-5)
    assert float((merged - base).abs().max()) > 1e-3
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llama"


def test_a_whole_model_is_saved_as_it_is(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.train()
    assert trainer.merge_and_save(tmp_path / "merged") is None
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, value in saved.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name))
