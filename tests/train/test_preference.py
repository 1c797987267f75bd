"""DPO and its kin against a padded reference written here, and what a run on pairs does: references, resume, memory."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests.forked import finished, start
from tests.models import gradient_error, gradients, tiny
from tests.train.runs import largest_difference, maker, weights_of
from tunesmith import DPOConfig, DPOTrainer, TunesmithError
from tunesmith.data.batches import Batch, pairs_of
from tunesmith.model import ways
from tunesmith.objectives.preference import LOSSES, Pairs, preference_loss
from tunesmith.train.meter import BatchLoss
from tunesmith.train.preference import without_dropout
from tunesmith.train.reference import AdaptersOff, StartingWeights

_WORDS = ["yes", "no", "maybe so", "it is", "not at all, no", "of course", "why"]
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Is it {word}, or " + "very " * (i % 3) + "so?"}],
        "chosen": [{"role": "assistant", "content": word}],
        "rejected": [{"role": "assistant", "content": _WORDS[i - 1] + "!" * (i % 4)}],
    }
    for i, word in enumerate(_WORDS)
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def dpo_of(model_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., DPOTrainer]:
    return maker(DPOTrainer, PAIRS, tmp_path, tokenizer, model_of, per_device_train_batch_size=4)


def moved(model: nn.Module) -> None:
    """Another model than the one that training begins with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def padded_logprobs(model: Any, documents: list[Any]) -> list[Tensor]:
    """The log-probabilities of the scored tokens of each document, from the logits of one padded batch."""
    ids = pad_sequence([torch.tensor(document.input_ids) for document in documents], batch_first=True)
    mask = pad_sequence([torch.ones(len(document.input_ids), dtype=torch.long) for document in documents], True)
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(dim=-1)
    found = []
    for row, document in enumerate(documents):
        places = [i for i, label in enumerate(document.labels) if label != -100]
        assert places
        found.append(torch.stack([logprobs[row, i - 1, document.labels[i]] for i in places]))
    return found


def expected_loss(model: Any, start: Any, trainer: DPOTrainer) -> Tensor:
    """The sum over all pairs of the trainer's losses, padded."""
    dataset: Any = trainer.train_dataset
    documents = [document for row in dataset for pair in pairs_of(row) for document in pair]
    own = padded_logprobs(model, documents)
    with torch.no_grad():
        reference = padded_logprobs(start, documents)

    def sums(values: list[Tensor]) -> Tensor:
        return torch.stack([value.sum() for value in values])

    def means(values: list[Tensor]) -> Tensor:
        return torch.stack([value.mean() for value in values])

    sizes = torch.tensor([float(len(value)) for value in own])
    pairs = Pairs(
        chosen=sums(own[::2]),
        rejected=sums(own[1::2]),
        ref_chosen=sums(reference[::2]),
        ref_rejected=sums(reference[1::2]),
        chosen_tokens=sizes[::2],
        rejected_tokens=sizes[1::2],
        chosen_mean=means(own[::2]),
        rejected_mean=means(own[1::2]),
    )
    return preference_loss(pairs, trainer.options).sum()


BATCHES: dict[str, dict[str, Any]] = {
    "flat": {"share_prefix": "off"},
    "shared": {"train_dataset": [*PAIRS, PAIRS[2] | {"rejected": PAIRS[3]["rejected"]}]},
    "packed": {"packing": True, "max_length": 120},
    "padded": {"padding_free": False},
}


def compare(trainer: DPOTrainer, plain: Any) -> None:
    """Values and gradients of all pairs in one batch; `plain` is the model as it began."""
    model: Any = trainer.model
    moved(model)
    dataset: Any = trainer.train_dataset
    batch: Any = trainer.data_collator(list(dataset))
    weight = trainer.batch_weight(batch)
    assert int(weight) == len([pair for row in dataset for pair in pairs_of(row)])
    ours = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1))
    ours.backward()
    found = gradients(model)
    moved(plain.eval())
    start = tiny(plain.config.model_type, plain.config.vocab_size).eval()
    theirs = expected_loss(plain, start, trainer)
    theirs.backward()
    expected = gradients(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert gradient_error(found, expected) < 2e-5


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_values_and_gradients_are_those_of_padded_rows(name: str, batches: str, dpo_of: Any, model_of: Any) -> None:
    compare(dpo_of(name, **BATCHES[batches]), model_of(name))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_has_the_values_and_gradients_of_padded_rows(loss: str, dpo_of: Any, model_of: Any) -> None:
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0.0
    compare(dpo_of(loss_type=loss, label_smoothing=smoothing, beta=0.3, discopop_tau=1.0), model_of())


# The reference


def first_log(trainer: DPOTrainer) -> dict[str, float]:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_rewards_begin_at_zero_and_the_chosen_answers_gain(dpo_of: Any) -> None:
    trainer = dpo_of(max_steps=8, per_device_train_batch_size=7, learning_rate=5e-3, eval_dataset=PAIRS[:3])
    first = first_log(trainer)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (first["rewards/margins"], first["rewards/chosen"], first["rewards/rejected"]) == (0.0, 0.0, 0.0)
    assert first["logps/chosen"] < 0
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["loss"] < 0.5
    assert last["rewards/margins"] > 0.5
    measured = trainer.evaluate()
    assert measured["eval_rewards/accuracies"] == 1.0


def test_new_adapters_are_off_and_those_trained_further_are_as_they_were(dpo_of: Any, model_of: Any) -> None:
    trainer = dpo_of(peft_config=LORA)
    assert isinstance(trainer.reference, AdaptersOff)
    assert first_log(trainer)["rewards/margins"] == 0.0
    continued = get_peft_model(model_of(), LORA)
    moved(continued)
    trainer = dpo_of(model=continued, folder="further")
    assert isinstance(trainer.reference, StartingWeights)
    kept = sum(values.numel() for values in trainer.reference._kept.values())
    assert kept == sum(weight.numel() for weight in continued.parameters() if weight.requires_grad)
    assert first_log(trainer)["rewards/margins"] == 0.0  # against the base model, they would not be


@pytest.mark.parametrize("adapters", [None, LORA], ids=["all weights", "lora"])
def test_what_autocast_keeps_of_the_reference_is_not_trained(adapters: Any, dpo_of: Any) -> None:
    trainer = dpo_of(peft_config=adapters, precision="bf16", max_steps=3, per_device_train_batch_size=7)
    first = first_log(trainer)
    assert first["rewards/margins"] == 0.0
    assert first["grad_norm"] > 0.01
    assert [entry for entry in trainer.state.log_history if "loss" in entry][-1]["rewards/margins"] > 0.01


@pytest.mark.parametrize("adapters", [None, LORA], ids=["all weights", "lora"])
def test_a_step_leaves_the_reference_as_it_was(adapters: Any, dpo_of: Any) -> None:
    trainer = dpo_of(peft_config=adapters, learning_rate=1e-1)
    batch = trainer.data_collator(list(trainer.train_dataset))
    before = torch.cat(trainer.by_reference(trainer.model, batch))
    weights = weights_of(trainer)
    trainer.train()
    assert largest_difference(weights_of(trainer), weights) > 1e-3
    now = weights_of(trainer)
    torch.testing.assert_close(torch.cat(trainer.by_reference(trainer.model, batch)), before)
    assert largest_difference(weights_of(trainer), now) == 0.0


def test_a_reference_of_the_users_and_one_computed_before(dpo_of: Any, model_of: Any) -> None:
    other = model_of()
    moved(other)
    given = dpo_of(ref_model=other)
    assert given.ref_model is other
    assert first_log(given)["rewards/margins"] != 0.0
    plain = dpo_of(folder="plain")
    computed = dpo_of(folder="computed", precompute_ref_log_probs=True, eval_dataset=PAIRS[:2])
    assert computed.reference is None
    assert "reference" in computed.train_dataset.column_names
    plain.train()
    computed.train()
    assert largest_difference(weights_of(plain), weights_of(computed)) < 1e-5
    assert "eval_rewards/margins" in computed.evaluate()
    assert "eval_rewards/margins" in computed.evaluate(computed.train_dataset)
    with pytest.raises(TunesmithError, match="were not there when the reference was computed"):
        computed.evaluate(PAIRS[3:5])
    untrained = dpo_of(folder="untrained", precompute_ref_log_probs=True)
    assert untrained.evaluate(PAIRS[3:5])["eval_rewards/margins"] == 0.0  # it is the reference still
    with pytest.raises(TunesmithError, match="compares with none"):
        dpo_of(ref_model=other, loss_type="simpo")


def test_settings_in_the_place_of_the_reference_are_told(model_of: Any, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), loss_type=["simpo"])
    with pytest.raises(TunesmithError, match=r"ref_model is DPOConfig; .*name the argument that this is for: args="):
        DPOTrainer(model_of(), args, train_dataset=PAIRS)  # type: ignore[arg-type]


def test_what_the_reference_says_is_kept_by_model_and_rows(
    dpo_of: Any, model_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    right = DPOTrainer._scores_of

    def counted(self: DPOTrainer, reference: Any, rows: list[Any]) -> list[Tensor]:
        calls.append(len(rows))
        return right(self, reference, rows)

    monkeypatch.setattr(DPOTrainer, "_scores_of", counted)
    settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4}
    first = dpo_of(**settings)
    assert calls == [4, 3]
    again = dpo_of(**settings)
    assert calls == [4, 3]
    assert again.train_dataset["reference"][:] == first.train_dataset["reference"][:]
    other = model_of()
    moved(other)
    dpo_of(model=other, **settings)
    assert calls == [4, 3, 4, 3]


def test_another_model_than_the_reference_before_the_first_step_stops(dpo_of: Any) -> None:
    trainer = dpo_of()
    moved(trainer.model)
    with pytest.raises(TunesmithError, match="rewards would not begin at 0"):
        trainer.train()


def test_losses_without_a_reference_compute_none(dpo_of: Any) -> None:
    trainer = dpo_of(loss_type=["orpo"])
    assert trainer.reference is None
    trainer.train()


# A run


def test_what_is_logged_by_token(dpo_of: Any) -> None:
    """One step on all pairs: the mean logit of each side, the entropy of both, and how often the chosen token is the
    likeliest one, as means over tokens."""
    trainer = dpo_of(per_device_train_batch_size=7, max_steps=1)
    found: dict[str, list[Tensor]] = {}
    for row in trainer.train_dataset:
        for side, document in zip(("chosen", "rejected"), pairs_of(row)[0], strict=True):
            places = [i for i, label in enumerate(document.labels) if label != -100]
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([document.input_ids])).logits[0, [i - 1 for i in places]]
            found.setdefault(f"logits/{side}", []).append(logits.mean(dim=-1))
            found.setdefault("entropy", []).append(torch.distributions.Categorical(logits=logits).entropy())
            if side == "chosen":
                labels = torch.tensor([document.labels[i] for i in places])
                found.setdefault("mean_token_accuracy", []).append((logits.argmax(dim=-1) == labels).float())
    logged = first_log(trainer)
    assert {name: logged[name] for name in found} == pytest.approx(
        {name: float(torch.cat(values).mean()) for name, values in found.items()}, rel=1e-4
    )


def test_weights_and_margins_of_rows_count(dpo_of: Any) -> None:
    rows = [row | {"weight": 1.0 + i % 2, "margin": 0.5 * (i % 3)} for i, row in enumerate(PAIRS)]
    trainer = dpo_of(train_dataset=rows, beta=0.2)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert float(trainer.batch_weight(batch)) == 10.0
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=10.0)
    # Before the first step all rewards are 0, and the loss is -log sigmoid(-margin).
    expected = sum(row["weight"] * float(torch.tensor(row["margin"]).exp().log1p()) for row in rows) / 10
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TunesmithError, match="rows have a 'margin', which loss_type: ipo does not know"):
        dpo_of(train_dataset=rows, loss_type="ipo")
    with pytest.raises(TunesmithError, match="rows have a 'margin', which loss_type: sft does not know"):
        dpo_of(train_dataset=rows, loss_type="sft")
    dpo_of(train_dataset=rows, loss_type=["sigmoid", "sft"])


@pytest.mark.parametrize("adapters", [None, LORA], ids=["all weights", "lora"])
def test_accumulated_micro_batches_are_one_batch(adapters: Any, dpo_of: Any) -> None:
    common: dict[str, Any] = {"peft_config": adapters} | {
        "max_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "dataloader_drop_last": False,
    }
    whole = dpo_of(folder="whole", per_device_train_batch_size=6, **common)
    parts = dpo_of(folder="parts", per_device_train_batch_size=2, gradient_accumulation_steps=3, **common)
    whole.train()
    parts.train()
    assert largest_difference(weights_of(whole), weights_of(parts)) < 1e-6


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_out_of_memory_divides_between_pairs_or_not_at_all(loss: str, dpo_of: Any) -> None:
    whole, split = dpo_of(folder="whole", loss_type=loss), dpo_of(folder="split", loss_type=loss)
    pairs: list[int] = []
    right = split.batch_loss

    def small(model: nn.Module, batch: Batch, **arguments: Any) -> BatchLoss:
        if len(batch.documents) > 2 and not split.args.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        pairs.append(len(batch.documents))
        return right(model, batch, **arguments)

    split.batch_loss = small
    whole.train()
    split.train()
    assert largest_difference(weights_of(split), weights_of(whole)) < 1e-5
    assert {*pairs} == ({2} if loss == "sigmoid" else {8, 6})  # what aot compares is not divided


def _train(folder: str, model: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    ways.force(False)  # as in the process that goes on
    trainer = _resumable(folder, model)

    def kill(line: Any) -> None:
        if line.get("step") == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.listeners.append(kill)
    trainer.train()


def _resumable(folder: str, model: str, **settings: Any) -> DPOTrainer:
    args = DPOConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        precision="fp32",
        disable_tqdm=True,
        max_steps=6,
        save_steps=2,
        logging_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        self_test="off",
        **settings,
    )
    return DPOTrainer(model, args=args, train_dataset=PAIRS)


def test_killed_and_resumed_it_ends_with_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    """All weights are trained: the reference of the resumed run is what the first one began with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        unbroken = _resumable(str(tmp_path / "unbroken"), str(tiny_model))
        unbroken.train()
        assert finished(start(_train, str(tmp_path / "killed"), str(tiny_model), 5)) == -signal.SIGKILL
        resumed = _resumable(str(tmp_path / "killed"), str(tiny_model))
        resumed.train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    assert resumed.state.global_step == 6
    assert largest_difference(weights_of(resumed), weights_of(unbroken)) == 0.0
    assert resumed.state.log_history[-2] == unbroken.state.log_history[-2]


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens_per_batch": 300}, {"packing": True, "max_length": 200}, {"gradient_checkpointing": True}],
    ids=["by tokens", "packed", "recomputed"],
)
def test_batches_of_every_kind_train(settings: dict[str, Any], dpo_of: Any) -> None:
    if "max_tokens_per_batch" in settings:
        settings = settings | {"per_device_train_batch_size": 8}
    trainer = dpo_of(peft_config=LORA, max_steps=3, **settings)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_stream_of_pairs(dpo_of: Any) -> None:
    trainer = dpo_of(train_dataset=Dataset.from_list(PAIRS).to_iterable_dataset())
    assert first_log(trainer)["rewards/margins"] == 0.0


def test_without_dropout_nothing_is_random(model_of: Any) -> None:
    model = model_of("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    ids = torch.arange(3, 20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss_type": "sigmod"}, "'sigmod' is unknown"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "write one weight for each"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is set"),
        ({"overlong": "split"}, "a pair can't be split"),
        ({"packing": True, "packing_strategy": "wrapped"}, "a pair is packed whole"),
        ({"accelerator_config": {"dispatch_batches": True}}, "a pair has two"),
        ({"sync_ref_model": True}, "the reference stays what training began with"),
        ({"max_prompt_length": 128}, "takes what is too much from the prompt's front"),
        ({"train_on": "all"}, "DPOConfig has no setting 'train_on'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], problem: str, dpo_of: Any) -> None:
    with pytest.raises(TunesmithError, match=problem):
        dpo_of(**settings)


def test_aot_pair_is_the_older_name_of_aot(tmp_path: Path) -> None:
    assert DPOConfig(output_dir=str(tmp_path), loss_type=["aot_pair"], use_cpu=True).losses == (("aot", 1.0),)
