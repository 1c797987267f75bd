"""When memory is out, a step is done again in smaller parts, with the same gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from torch import Tensor

from tests.models import flat
from tests.train.runs import REASONING, TALKS, UNEVEN_ROWS, largest_difference, trained, weights_of
from tunesmith import SFTTrainer
from tunesmith.errors import TunesmithError
from tunesmith.train import limits as memory
from tunesmith.train.limits import is_out_of_memory
from tunesmith.train.recovery import _state_bytes

SETTINGS: dict[str, Any] = {
    "train_dataset": UNEVEN_ROWS,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.1,
    "self_test": "off",  # it is a batch, too
}
WAYS: list[dict[str, Any]] = [{}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 64}]


class Small:
    """A device that has room for micro-batches of `tokens` tokens; `seen` are those that ran."""

    def __init__(self, trainer: SFTTrainer, tokens: int) -> None:
        self.seen: list[int] = []
        model: Any = trainer.model
        original = model.forward
        self.checkpointed = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            size = kwargs["input_ids"].numel()
            if model.is_gradient_checkpointing:
                self.checkpointed += 1
            elif size > tokens:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {size} tokens")
            self.seen.append(size)
            return original(*args, **kwargs)

        model.forward = forward


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 64}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_split_micro_batches_end_in_the_same_weights(
    name: str, settings: dict[str, Any], trainer_of: Callable[..., Any]
) -> None:
    if settings.get("packing") and name == "gpt_neo":
        settings = {"max_tokens_per_batch": 128}
    expected = trained(trainer_of(name, **SETTINGS, **settings))
    trainer = trainer_of(name, **SETTINGS, **settings)
    device = Small(trainer, tokens=60)
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert max(device.seen) <= 60
    assert any("same gradients" in text for _, text in trainer.events)


@pytest.mark.parametrize(("name", "room", "parts"), [("llama", 250, 4), ("gpt_neo", 130, 12)])
def test_a_conversation_is_split_only_where_its_documents_share_nothing(
    name: str, room: int, parts: int, trainer_of: Callable[..., Any], tokenizer: Any
) -> None:
    """Documents that share what they begin with stay in one flat part; padded rows are documents of their own."""
    tokenizer.chat_template = REASONING
    settings = SETTINGS | {"train_dataset": TALKS, "train_on": "assistant", "max_steps": 1, "rehearse": "off"}
    expected = trained(trainer_of(name, **settings))
    trainer = trainer_of(name, **settings)
    device = Small(trainer, tokens=room)
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert len(device.seen) == parts
    assert device.checkpointed == 0


def test_what_was_counted_is_counted_once(trainer_of: Callable[..., Any]) -> None:
    whole, split = trainer_of(**SETTINGS, logging_steps=1), trainer_of(**SETTINGS, logging_steps=1)
    Small(split, tokens=60)
    for trainer in (whole, split):
        trainer.train()
    for one, other in zip(whole.state.log_history[:3], split.state.log_history[:3], strict=True):
        for name in ("loss", "num_tokens", "entropy", "mean_token_accuracy", "grad_norm"):
            assert other[name] == pytest.approx(one[name], abs=1e-5), name


def test_memory_that_is_out_in_a_later_micro_batch_takes_nothing_from_the_earlier(
    trainer_of: Callable[..., Any],
) -> None:
    """The second of two micro-batches fails in its backward, when its gradients are half there."""
    settings = SETTINGS | {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_train_batch_size": 4}
    expected = trained(trainer_of(**settings))
    trainer = trainer_of(**settings)
    weight = trainer.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    calls = [0]

    def fail(gradient: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient

    weight.register_hook(fail)
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert calls[0] > 3


def test_dropout_is_drawn_from_where_the_step_began(
    trainer_of: Callable[..., Any], model_of: Callable[..., Any]
) -> None:
    """The first try is undone: a run whose only micro-batch failed once, unsplit, is the run that never failed."""
    settings = SETTINGS | {"max_steps": 2, "per_device_train_batch_size": 1}

    def run(failing: bool) -> dict[str, Tensor]:
        trainer = trainer_of(model=model_of("llama", attention_dropout=0.3), **settings)
        model, tries = trainer.model, [0]
        original = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            tries[0] += 1
            if failing and tries[0] == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        model.forward = forward
        return trained(trainer)

    # One document: checkpointing is turned on, which recomputes to the same values.
    assert largest_difference(run(True), run(False)) < 1e-6


def test_one_example_turns_checkpointing_on_and_then_stops_the_run(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(**SETTINGS | {"max_steps": 1})
    device = Small(trainer, tokens=10)
    expected = trained(trainer_of(**SETTINGS | {"max_steps": 1}))
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert device.checkpointed > 0
    assert "which is one example: gradient checkpointing is on from now on" in trainer.events[-1][1]

    trainer = trainer_of(**SETTINGS, gradient_checkpointing=True)
    trainer.model.forward = lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(TunesmithError, match=r"tokens, which is one example, with gradient checkpointing on. Lower"):
        trainer.train()


def test_copies_of_an_example_that_are_computed_once_are_not_split_for_ever(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(**SETTINGS | {"train_dataset": UNEVEN_ROWS[-1:] * 8, "max_steps": 1, "rehearse": "off"})
    device = Small(trainer, tokens=10)
    trainer.train()
    assert device.checkpointed > 0
    assert [text for _, text in trainer.events if "gradient checkpointing is on" in text]


def test_other_errors_are_not_swallowed(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(**SETTINGS)
    trainer.model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.train()
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())


# The limit of main memory


def test_over_the_memory_limit_batches_are_split(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(trainer_of(**SETTINGS))
    monkeypatch.setattr(memory, "resident", lambda: 10**9)
    trainer = trainer_of(**SETTINGS, memory_limit="2GB", rehearse="off")
    sizes: list[int] = []
    original = trainer.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].numel())
        return original(*args, **kwargs)

    trainer.model.forward = forward
    monkeypatch.setattr(memory, "resident", lambda: 10**9 if sizes[-1] <= 60 else 3 * 10**9)
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert "(3.00 GB, and memory_limit is 2.00 GB)" in trainer.events[0][1]


@pytest.mark.parametrize(("limit", "message"), [("12", "12 GB|0.00 GB"), ("much", "memory_limit is 'much'; write for")])
def test_a_limit_that_is_none_is_refused(limit: str, message: str, trainer_of: Callable[..., Any]) -> None:
    with pytest.raises(TunesmithError, match=message):
        trainer_of(memory_limit=limit)


# Rehearsal


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"per_device_train_batch_size": 2}, 40 + 40),
        ({"max_tokens_per_batch": 64}, 64),
        ({"packing": True, "max_length": 64, "per_device_train_batch_size": 1}, 64),
    ],
    ids=str,
)
def test_the_rehearsal_is_the_largest_micro_batch_and_leaves_no_trace(
    settings: dict[str, Any], largest: int, trainer_of: Callable[..., Any], model_of: Callable[..., Any]
) -> None:
    def run(rehearse: str) -> tuple[Any, list[int]]:
        model = model_of("llama", attention_dropout=0.3)
        trainer = trainer_of(model=model, **SETTINGS | {"optim": "adamw_torch"} | settings, rehearse=rehearse)
        device = Small(trainer, tokens=10**6)
        trainer.train()
        return trainer, device.seen

    plain, seen = run("off")
    rehearsed, seen_too = run("always")
    assert largest_difference(weights_of(rehearsed), weights_of(plain)) == 0.0
    assert [entry.get("num_tokens") for entry in rehearsed.state.log_history] == [
        entry.get("num_tokens") for entry in plain.state.log_history
    ]
    assert seen_too[1:] == seen
    longest = sorted((len(ids) for ids in rehearsed.train_dataset["input_ids"]), reverse=True)
    assert seen_too[0] >= max(seen)
    assert seen_too[0] <= largest or seen_too[0] == sum(longest[:2])


def test_what_fails_in_the_rehearsal_is_split_from_the_first_step_on(trainer_of: Callable[..., Any]) -> None:
    expected = trained(trainer_of(**SETTINGS))
    trainer = trainer_of(**SETTINGS, rehearse="always")
    device = Small(trainer, tokens=60)
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert trainer.events[0][0] == 1
    assert device.seen[0] <= 60
    assert max(device.seen) <= 60


def test_a_rehearsal_that_can_not_be_is_refused_when_it_must_be(trainer_of: Callable[..., Any]) -> None:
    stream = IterableDataset.from_generator(lambda: iter(UNEVEN_ROWS))
    for arguments in ({"train_dataset": stream}, {"data_collator": flat}):
        with pytest.raises(TunesmithError, match="rehearse is 'always', but"):
            trainer_of(**SETTINGS | arguments, rehearse="always")


@pytest.mark.parametrize(("kind", "size"), [(torch.optim.AdamW, 8.0), (torch.optim.SGD, 0.0)])
def test_the_size_of_an_optimizers_state_is_found_out(kind: Any, size: float) -> None:
    assert _state_bytes(kind, {"lr": 1e-3}) == size
