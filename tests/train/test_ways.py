"""Ways to the same weights: options that change time and memory, and nothing that is learned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from torch._dynamo.utils import counters

from tests.train.runs import REASONING, TALKS, largest_difference, trained
from tunesmith import SFTTrainer, TunesmithError
from tunesmith.data.samplers import by_document
from tunesmith.train import offload

Make = Callable[..., SFTTrainer]
PREAMBLE = "You are a helpful assistant that answers in one word. "
ROWS = [
    {"prompt": PREAMBLE + question, "completion": answer}
    for question, answer in zip("abcdefgh", "stuvwxyz", strict=True)
]


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 256}], ids=["rows", "packs"])
def test_shared_prefixes_give_the_weights_of_whole_documents(trainer_of: Make, settings: dict[str, Any]) -> None:
    common = {"train_dataset": ROWS, "max_steps": 3, **settings}
    alone, shared = (trainer_of(share_prefix=share, **common) for share in ("off", "auto"))
    batch = next(iter(shared.get_train_dataloader()))
    assert batch["input_ids"].numel() < batch["labels"].numel() / 2
    assert largest_difference(trained(alone), trained(shared)) < 1e-5
    assert alone.state.log_history[0]["num_tokens"] == shared.state.log_history[0]["num_tokens"]


OTHER = "Translate what follows into the language of machines. "
MIXED = [row | {"prompt": (front + row["prompt"][-1])} for row in ROWS for front in (PREAMBLE, OTHER)]
"""16 rows, of two beginnings in turn."""


def computed(trainer: SFTTrainer) -> list[list[int]]:
    """The tokens that each micro-batch of a step will compute, step by step, from now on."""
    steps: list[list[int]] = []
    take: Any = trainer.get_batch_samples

    def noting(*args: Any, **kwargs: Any) -> Any:
        batches, items = take(*args, **kwargs)
        steps.append([batch.computed_tokens for batch in batches])
        return batches, items

    trainer.get_batch_samples = noting  # type: ignore[method-assign]
    return steps


def test_rows_of_a_step_that_begin_alike_share_a_micro_batch(trainer_of: Make) -> None:
    common: dict[str, Any] = {"train_dataset": MIXED, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    common |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    whole = trained(trainer_of(share_prefix="off", **common | {"per_device_train_batch_size": 16}))
    trainer = trainer_of(gradient_accumulation_steps=4, **common)
    steps = computed(trainer)
    assert largest_difference(trained(trainer), whole) < 1e-5
    before = [batch.computed_tokens for batch in trainer.get_train_dataloader()]
    fronts, own = len(PREAMBLE) + len(OTHER), len(MIXED[0]["completion"]) + 2  # and the end of the text
    assert before == [fronts + 4 * own] * 4
    assert [sorted(step) for step in steps] == [[n + 4 * own for n in sorted([len(PREAMBLE), len(OTHER)] * 2)]] * 2


def test_rows_may_be_grouped_by_what_they_begin_with(trainer_of: Make) -> None:
    common: dict[str, Any] = {"train_dataset": MIXED, "max_steps": 4, "per_device_train_batch_size": 4}
    grouped, drawn = (trainer_of(train_sampling_strategy=kind, **common) for kind in ("group_by_prefix", "random"))
    steps, others = computed(grouped), computed(drawn)
    trained(grouped)
    trained(drawn)
    own = len(MIXED[0]["completion"]) + 2
    assert sorted(steps) == [[n + 4 * own] for n in sorted([len(PREAMBLE), len(OTHER)] * 2)]
    assert sum(map(sum, steps)) < 0.75 * sum(map(sum, others))


def test_an_evaluation_groups_rows_by_what_they_begin_with(trainer_of: Make) -> None:
    common: dict[str, Any] = {"eval_dataset": MIXED, "per_device_eval_batch_size": 4}
    together, alone = (trainer_of(share_prefix=share, **common) for share in ("auto", "off"))
    own = len(MIXED[0]["completion"]) + 2
    found = [batch.computed_tokens for batch in together.get_eval_dataloader()]
    assert sorted(found) == [n + 4 * own for n in sorted([len(PREAMBLE), len(OTHER)] * 2)]
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    expected = alone.evaluate()
    measured = together.evaluate()
    assert [measured[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-5)
    by_tokens = trainer_of(eval_dataset=MIXED, max_tokens_per_batch=300)
    assert by_tokens.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    batches = list(by_tokens.get_eval_dataloader())
    assert max(int(batch.tokens) for batch in batches) <= 300
    assert sum(batch.computed_tokens for batch in batches) < 0.6 * sum(int(batch.tokens) for batch in batches)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gpt_neo", {}, "batches are padded here"),
        ("llama", {"train_dataset": "stream"}, "a stream does not tell its rows before they are read"),
        ("llama", {"data_collator": list}, "a data_collator makes the batches"),
    ],
    ids=["padded", "stream", "collator"],
)
def test_grouping_by_what_can_not_be_shared_is_refused(
    name: str, settings: dict[str, Any], reason: str, trainer_of: Callable[..., Any]
) -> None:
    if "train_dataset" in settings:
        settings = {"train_dataset": IterableDataset.from_generator(lambda: iter(ROWS)), "max_steps": 1}
    with pytest.raises(TunesmithError, match=f"compute.* once what they share, but {reason}; write random"):
        trainer_of(name, train_sampling_strategy="group_by_prefix", **settings)


def test_compiled_layers_give_the_weights_of_plain_ones(trainer_of: Make) -> None:
    counters.clear()
    # Adam's first steps are signs: rounding would be all there is.
    common = {"max_steps": 2, "optim": "sgd", "self_test": "off"}
    plain, compiled = trainer_of(**common), trainer_of(torch_compile_backend="aot_eager", **common)
    assert compiled.accelerator.state.dynamo_plugin.backend == "NO"
    assert largest_difference(trained(plain), trained(compiled)) < 1e-5
    assert counters["stats"]["unique_graphs"] > 0


def test_a_run_begins_with_a_self_test_that_changes_nothing(trainer_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tunesmith")
    tested = trained(trainer_of(max_steps=2))
    assert "Self-test on 4 examples" in caplog.text
    assert largest_difference(tested, trained(trainer_of(max_steps=2, self_test="off"))) == 0.0
    assert caplog.text.count("Self-test") == 1


def test_a_model_that_fails_the_self_test_is_not_trained(trainer_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}  # type: ignore[union-attr]
    head: Any = trainer.model.lm_head  # type: ignore[union-attr]
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: 1.5 * forward(x))  # what the fused loss knows nothing of
    from tunesmith.model import head as heads

    monkeypatch.setattr(heads, "_check", lambda model, original, path, *_, **__: setattr(path, "fused", True))
    with pytest.raises(TunesmithError, match="self-test"):
        trainer.train()
    after: dict[str, torch.Tensor] = trainer.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_forward_runs_with_activations_offloaded_when_asked(
    trainer_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = offload.offloading

    def offloading(model: Any, enabled: bool) -> Any:
        asked.append(enabled)
        return real(model, enabled)

    monkeypatch.setattr("tunesmith.train.trainer.offloading", offloading)
    trainer: Any = trainer_of()
    trainer.args.activation_offloading = True  # the config refuses it on a CPU
    trainer.train()
    assert asked == [True]


def test_each_way_of_batching_conversations_gives_the_weights_of_their_documents(
    trainer_of: Make, tokenizer: Any
) -> None:
    tokenizer.chat_template = REASONING
    common = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "train_on": "assistant", "max_length": 512}
    shared = trainer_of(train_dataset=TALKS, **common)
    (batch,) = shared.get_train_dataloader()
    assert [len(group) for group in batch.groups] == [3, 3, 3, 3]
    documents = by_document(shared.train_dataset)
    rows = trainer_of(train_dataset=list(documents), per_device_train_batch_size=12, **common | {"train_on": None})
    assert rows.data.counts["train"].examples == 12
    expected = trained(rows)
    ways: list[dict[str, Any]] = [
        {"share_prefix": "auto"},
        {"share_prefix": "off"},
        {"packing": True},
        {"padding_free": False},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_tokens_per_batch": 512, "gradient_accumulation_steps": 4},
    ]
    for settings in ways:
        assert largest_difference(trained(trainer_of(train_dataset=TALKS, **common | settings)), expected) < 1e-5, (
            settings
        )
