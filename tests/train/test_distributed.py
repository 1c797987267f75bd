"""Two processes on the CPU give what one gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.forked import together
from tests.models import tiny
from tests.train.runs import PAIR_ROWS, UNEVEN_ROWS, largest_difference, trained
from tunesmith import SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow
# Rows of unequal weight, a last batch that is not full, and an evaluation whose rows don't split evenly.
ROWS = [row | {"weight": 1.0 + i} for i, row in enumerate(PAIR_ROWS)]
# Adam's first steps are signs of gradients: rounding could turn one.
SETTINGS: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
BY_ROWS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
}
BY_TOKENS: dict[str, Any] = {"max_tokens_per_batch": 72, "max_steps": 8, "save_strategy": "steps", "save_steps": 6}


def measured(trainer: Any) -> dict[str, Any]:
    """What a run logged, and what it evaluates to."""
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
    logs = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    return {
        "logs": logs,
        "eval": [evaluated[f"eval_{name}"] for name in names[:3]],
        "shapes": [list(predicted.predictions.shape), list(predicted.label_ids.shape)],
        "test_loss": predicted.metrics["test_loss"],
    }


def _train(folder: Path, tokenizer: Path, rows: Any, evaluated: Any, settings: dict[str, Any], resumed: Any) -> None:
    """One of several processes. The first writes what came of the run to `folder`."""
    args = SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True, logging_steps=1,
        max_grad_norm=0.0, **{"save_strategy": "no"} | SETTINGS | settings,
    )  # fmt: skip
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    trainer = SFTTrainer(
        tiny("llama", len(loaded)), args, train_dataset=rows, eval_dataset=evaluated, processing_class=loaded
    )
    weights, numbers = trained(trainer, resume_from_checkpoint=resumed), measured(trainer)
    if trainer.is_world_process_zero():
        save_file({name.removeprefix("module."): value for name, value in weights.items()}, folder / "weights")
        (folder / "numbers.json").write_text(json.dumps(numbers))


def by_two(folder: Path, *arguments: Any, resumed: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """The weights and numbers of a run of two processes."""
    folder.mkdir()
    together(2, _train, folder, *arguments, None if resumed is None else str(resumed))
    return load_file(folder / "weights"), json.loads((folder / "numbers.json").read_text())


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["shapes"] == expected["shapes"]
    ours, theirs = (numbers["logs"][-len(found["logs"]) :] for numbers in (found, expected))
    for entry, other in zip([*ours, found["eval"]], [*theirs, expected["eval"]], strict=True):
        assert entry == pytest.approx(other, abs=1e-5)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-5)


def test_two_processes_train_and_evaluate_as_one_does(
    trainer_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    one = trainer_of(train_dataset=ROWS, eval_dataset=ROWS[:5], gradient_accumulation_steps=4, **SETTINGS | BY_ROWS)
    expected = trained(one), measured(one)
    settings = BY_ROWS | {"gradient_accumulation_steps": 2}
    weights, numbers = by_two(tmp_path / "two", tiny_model, ROWS, ROWS[:5], settings)
    assert largest_difference(weights, expected[0]) < 1e-6
    assert numbers["shapes"] == [[5, 23, 259], [5, 23]]
    same(numbers, expected[1])


def test_two_processes_train_by_tokens_as_one_does_and_resume(
    trainer_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    data = {"train_dataset": UNEVEN_ROWS, "eval_dataset": UNEVEN_ROWS[:11]}
    one = trainer_of(**data, gradient_accumulation_steps=2, **SETTINGS | BY_TOKENS)
    in_epoch = len(one.get_train_dataloader())
    assert in_epoch < 12 < 2 * in_epoch
    expected = trained(one), measured(one)
    resumed = None
    for name in ("whole", "resumed"):
        weights, numbers = by_two(tmp_path / name, tiny_model, *data.values(), BY_TOKENS, resumed=resumed)
        assert largest_difference(weights, expected[0]) < 1e-6
        same(numbers, expected[1])
        resumed = tmp_path / "whole" / "checkpoint-6"
