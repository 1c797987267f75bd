"""A step whose numbers go wrong changes nothing, is counted, and can be looked at."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.runs import PAIR_ROWS, weights_of
from tunesmith.errors import TunesmithError
from tunesmith.train.guard import REMEMBERED, Losses


def poison(trainer: Any, steps: set[int], *, value: float = math.nan, of: str = "loss") -> None:
    """Let the loss, or a gradient, be `value` in these steps, from 1 on."""
    if of == "loss":
        original = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)
            bad = trainer.model.training and trainer.state.global_step + 1 in steps
            return loss * value if bad else loss

        trainer.compute_loss = compute_loss
    else:
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda g: g * value if trainer.state.global_step + 1 in steps else g)


def stepwise(trainer: Any) -> list[dict[str, Tensor]]:
    """The weights after each step."""
    found: list[dict[str, Tensor]] = []
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append(weights_of(trainer))

    trainer.add_callback(Look())
    trainer.train()
    return found


@pytest.mark.parametrize(("of", "value"), [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan)])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_bad_step_changes_neither_weights_nor_optimizer_and_its_rows_are_kept(
    of: str, value: float, clip: float, trainer_of: Callable[..., Any], tokenizer: Any
) -> None:
    settings = {"max_steps": 4, "optim": "adamw_torch", "max_grad_norm": clip, "per_device_train_batch_size": 2}
    trainer = trainer_of(**settings)
    poison(trainer, {2}, value=value, of=of)
    first, second, third, _ = stepwise(trainer)
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert any(not torch.equal(third[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in third.values())
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}
    assert trainer.bad_steps == 1
    [line] = (Path(trainer.args.output_dir) / "bad_batches.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 2
    assert len(entry["rows"]) == 2
    texts = {row["prompt"] + row["completion"] for row in PAIR_ROWS}
    assert all(row["text"].removesuffix("<|im_end|>") in texts for row in entry["rows"])
    assert "the step was left out, its rows are in" in trainer.events[0][1]


def test_rows_that_can_not_be_written_down_do_not_end_the_run(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=3, per_device_train_batch_size=2)
    (Path(trainer.args.output_dir) / "bad_batches.jsonl").mkdir(parents=True)
    poison(trainer, {2}, value=math.nan, of="loss")
    trainer.train()
    assert trainer.bad_steps == 1
    assert "the step was left out, its rows can't be written down: [Errno 21] Is a directory" in trainer.events[0][1]


def test_of_several_micro_batches_the_one_that_is_bad_is_kept(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=2, gradient_accumulation_steps=4, per_device_train_batch_size=1)
    original, calls = trainer.compute_loss, [0]

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs) * (math.nan if calls[0] == 3 else 1.0)

    trainer.compute_loss = compute_loss
    trainer.train()
    lines = (Path(trainer.args.output_dir) / "bad_batches.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert len(json.loads(lines[0])["rows"]) == 1


def test_bad_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(trainer_of: Callable[..., Any]) -> None:
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "max_bad_steps": 3}
    trainer = trainer_of(**settings)
    poison(trainer, {2, 4, 5, 6, 7, 8})
    with pytest.raises(TunesmithError, match=r"3 steps in a row had no finite gradient, up to step 6.*checkpoint-4"):
        trainer.train()
    assert trainer.bad_steps == 4


def test_a_run_without_one_good_step_is_no_success(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=2)
    poison(trainer, {1, 2})
    with pytest.raises(TunesmithError, match="no step of the run had a finite gradient, so nothing was learned"):
        trainer.train()
    assert trainer.journal.ended == "error"


@pytest.mark.parametrize("steps", [1, 4])
def test_weights_that_a_step_broke_stop_the_run_at_once(steps: int, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=steps, learning_rate=1e300)
    with pytest.raises(TunesmithError, match=r"weights of the model are not finite after step 1.*which is 1e\+300"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_good_step_begins_the_count_anew(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=6, max_bad_steps=2)
    poison(trainer, {1, 3, 5})
    trainer.train()
    assert trainer.bad_steps == 3


def test_spikes_and_zeros_are_odd() -> None:
    losses = Losses()
    assert [losses.judge(2.0 + i / 100) for i in range(REMEMBERED)] == [None] * REMEMBERED
    assert losses.judge(3.0) is None
    assert "the loss is 4.500, after a median of 2.1" in str(losses.judge(4.5))
    assert "exactly 0" in str(losses.judge(0.0))
    assert losses.judge(math.nan) is None  # the step was left out, which is said
    small = Losses()
    for _ in range(REMEMBERED):
        small.judge(0.01)
    assert small.judge(0.5) is None


def test_a_loss_that_is_not_finite_is_not_compared_with() -> None:
    losses = Losses()
    for loss in [2.0] * 10 + [math.nan] * REMEMBERED + [2.0] * 10:
        assert losses.judge(loss) is None
    assert "after a median of 2.000" in str(losses.judge(5.0))


def test_bad_steps_before_a_checkpoint_count_after_it(trainer_of: Callable[..., Any]) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "max_bad_steps": 3}
    trainer = trainer_of(**settings)
    poison(trainer, {3, 4})
    trainer.train()
    resumed = trainer_of(**settings)
    poison(resumed, {5})
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-4")
    with pytest.raises(TunesmithError, match="3 steps in a row had no finite gradient, up to step 5"):
        resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.bad_steps == 3


def test_a_loss_of_zero_is_an_event(trainer_of: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(max_steps=2)
    poison(trainer, {2}, value=0.0)
    trainer.train()
    assert trainer.events == [
        (2, "the loss is exactly 0: no token of the step is supervised, or none is left to learn")
    ]
    assert "Step 2: the loss is exactly 0" in caplog.text


# Weights without a gradient


def test_weights_that_the_models_code_cuts_off_stop_the_run_before_anything_moves(
    trainer_of: Callable[..., Any],
) -> None:
    trainer = trainer_of(max_steps=2)
    before = weights_of(trainer)
    for name in ("q_proj", "k_proj"):
        layer = getattr(trainer.model.model.layers[1].self_attn, name)
        layer.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(TunesmithError, match=r"2 of 21 weights .* although their layers ran.*layers\.1\.self_attn\.q"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def test_a_layer_that_did_not_run_is_told_and_no_reason_to_stop(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=2)
    trainer.model.model.image_encoder = torch.nn.Linear(2, 2)
    trainer.train()
    assert trainer.events == [
        (
            1,
            "2 of 23 weights that are to be trained got no gradient, because their layers did not run: "
            "model.image_encoder.weight, model.image_encoder.bias",
        )
    ]
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
