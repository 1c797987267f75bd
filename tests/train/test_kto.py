"""KTO against a padded reference written here, its estimate over mismatched answers, and what a run on answers does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.models import gradient_error, gradients, tiny
from tests.train.runs import largest_difference, maker, weights_of
from tests.train.test_preference import moved, padded_logprobs
from tunesmith import KTOTrainer, TunesmithError
from tunesmith.data.batches import Batch, documents_of
from tunesmith.objectives.preference import apo_zero_unpaired_loss, kl_estimate, kto_loss
from tunesmith.train.kto import mismatch
from tunesmith.train.meter import BatchLoss
from tunesmith.types import Example

_WORDS = ["yes", "no", "maybe so", "it is", "not at all, no", "of course"]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Is it {_WORDS[i - 1]}?"},
            {"role": "assistant", "content": word},
        ],
        "label": i % 3 != 0,
    }
    for i, word in enumerate(_WORDS)
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def kto_of(model_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., KTOTrainer]:
    return maker(KTOTrainer, ROWS, tmp_path, tokenizer, model_of, per_device_train_batch_size=3)


def test_a_prompt_with_the_answer_of_the_next() -> None:
    documents = [
        Example(input_ids=[1, 2, 3, 9], labels=[-100, -100, -100, 9]),
        Example(input_ids=[4, 8, 7], labels=[-100, 8, 7]),
    ]
    first, second = mismatch(documents, 4)
    assert (first.input_ids, first.labels) == ([2, 3, 8, 7], [-100, -100, 8, 7])  # cut from the prompt's front
    assert (second.input_ids, second.labels) == ([4, 9], [-100, 9])


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("batches", [{}, {"padding_free": False}, {"packing": True, "max_length": 110}], ids=str)
def test_values_and_gradients_are_those_of_padded_rows(
    loss: str, batches: dict[str, Any], kto_of: Any, model_of: Any
) -> None:
    trainer = kto_of(loss_type=loss, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, **batches)
    dataset: Any = trainer.train_dataset
    moved(trainer.model)
    batch = trainer.data_collator(list(dataset))
    assert int(trainer.batch_weight(batch)) == len(ROWS)
    ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    ours.backward()
    found = gradients(trainer.model)
    plain = model_of()
    moved(plain)
    begin = tiny("llama", plain.config.vocab_size)
    documents = [document for row in dataset for [document] in documents_of(row)]

    def ratios(of: list[Example]) -> torch.Tensor:
        with torch.no_grad():
            reference = padded_logprobs(begin, of)
        own = padded_logprobs(plain, of)
        return torch.stack([(one - two).sum() for one, two in zip(own, reference, strict=True)])

    good = torch.tensor([document.score > 0 for document in documents])
    weights: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    if loss == "kto":
        with torch.no_grad():
            kl = kl_estimate(ratios(mismatch(documents, trainer.args.max_length)))
        theirs = kto_loss(ratios(documents), good, kl, **weights).sum()
    else:
        theirs = apo_zero_unpaired_loss(ratios(documents), good, **weights).sum()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert gradient_error(found, gradients(plain)) < 2e-5


def test_good_answers_gain_and_bad_ones_lose(kto_of: Any) -> None:
    trainer = kto_of(
        peft_config=LORA, max_steps=12, per_device_train_batch_size=6, learning_rate=3e-2, eval_dataset=ROWS[:4]
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)  # all rewards are 0
    assert (first["rewards/chosen"], first["rewards/rejected"], first["kl"]) == (0.0, 0.0, 0.0)
    assert last["loss"] < 0.48
    assert last["rewards/chosen"] - last["rewards/rejected"] > 0.2
    measured = trainer.evaluate()
    assert measured["eval_rewards/chosen"] - measured["eval_rewards/rejected"] > 0.2


def test_means_of_each_side_are_over_its_answers(kto_of: Any) -> None:
    """Four answers are good, two bad; a micro-batch of one side leaves the other's means out."""
    trainer = kto_of(per_device_train_batch_size=6, max_steps=1)
    model: Any = trainer.model
    expected = [
        values.sum() for row in trainer.train_dataset for values in padded_logprobs(model, [*documents_of(row)[0]])
    ]
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    good = [float(value) for value, row in zip(expected, ROWS, strict=True) if row["label"]]
    assert entry["logps/chosen"] == pytest.approx(sum(good) / 4, rel=1e-5)
    one_sided = kto_of(folder="good", train_dataset=[row for row in ROWS if row["label"]])
    one_sided.train()
    assert "rewards/rejected" not in one_sided.state.log_history[0]


def test_weights_of_rows_count(kto_of: Any) -> None:
    trainer = kto_of(train_dataset=[row | {"weight": 1.0 + i % 2} for i, row in enumerate(ROWS)])
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert float(trainer.batch_weight(batch)) == 9.0
    assert float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=9.0)) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_out_of_memory_does_not_divide_what_an_estimate_is_over(loss: str, kto_of: Any) -> None:
    whole, split = (kto_of(folder=folder, loss_type=loss, optim="sgd") for folder in ("whole", "split"))
    sizes: list[int] = []
    right = split.batch_loss

    def small(model: nn.Module, batch: Batch, **arguments: Any) -> BatchLoss:
        if len(batch.documents) > 1 and not split.args.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.documents))
        return right(model, batch, **arguments)

    split.batch_loss = small
    whole.train()
    split.train()
    assert {*sizes} == ({3} if loss == "kto" else {1})
    assert largest_difference(weights_of(split), weights_of(whole)) < 1e-5


def test_a_reference_computed_before(kto_of: Any) -> None:
    plain = kto_of(folder="plain", loss_type="apo_zero_unpaired")
    computed = kto_of(folder="computed", loss_type="apo_zero_unpaired", precompute_ref_log_probs=True)
    plain.train()
    computed.train()
    assert largest_difference(weights_of(plain), weights_of(computed)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss_type": "bco"}, "choose kto | apo_zero_unpaired"),
        ({"per_device_train_batch_size": 1}, "write 2 or more"),
        ({"precompute_ref_log_probs": True}, "nobody knows before"),
        ({"desirable_weight": 0.0}, "desirable_weight is 0.0"),
        ({"loss_weights": [1.0]}, "KTOConfig has no setting 'loss_weights'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], problem: str, kto_of: Any) -> None:
    with pytest.raises(TunesmithError, match=problem.replace("|", r"\|")):
        kto_of(**settings)
