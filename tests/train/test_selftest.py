"""The self-test before the first step: what it lets pass, what it catches, and that it leaves no trace."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.models import ARCHITECTURES, FLAT, VOCABULARY, tiny, token_rows
from tunesmith import SFTConfig, TunesmithError
from tunesmith.data.batches import Batch, FlatCollator
from tunesmith.model import attention, head, ways
from tunesmith.model.head import Predictions
from tunesmith.objectives.supervised import Supervised, supervised_loss
from tunesmith.train import selftest
from tunesmith.train.selftest import EXAMPLES, LONGEST, SelfTest, check_before_training, self_test
from tunesmith.train.setup import ready_for_batches

LENGTHS = (9, 5, 14, 2)
ROWS: list[list[int]] = [row["input_ids"] for row in token_rows(*LENGTHS)]


def taught(name: str = "llama", *, flat: bool = True, lora: bool = False) -> Any:
    model: Any = tiny(name)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert ready_for_batches(model, flat=flat) is flat
    return model.train()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_models_pass(name: str, precision: Any) -> None:
    flat = name in FLAT
    found = self_test(taught(name, flat=flat), ROWS, flat=flat, precision=precision)
    assert [test.tokens for test in found.documents] == list(LENGTHS)
    assert found.worst <= (1e-5 if precision == "fp32" else 0.1)
    # A model of random weights knows nothing: its loss is about that of a guess.
    assert found.theirs == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=0.2)


def test_adapters_take_part() -> None:
    model = taught(lora=True)
    with_adapters = self_test(model, ROWS, flat=True, precision="fp32")
    with model.disable_adapter():
        without = self_test(model, ROWS, flat=True, precision="fp32")
    assert abs(with_adapters.theirs - without.theirs) > 1e-3


def test_the_losses_are_those_of_the_logits() -> None:
    model = taught()
    found = self_test(model, ROWS, flat=True, precision="fp32")
    losses = []
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
    expected = float(sum(losses)) / sum(length - 1 for length in LENGTHS)
    assert found.theirs == pytest.approx(expected, rel=1e-5)
    assert found.ours == pytest.approx(expected, rel=1e-5)


def documents_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents are kept apart, which is all that the first batch is checked for."""
    right = attention.attend_documents

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, **kwargs: Any) -> Tensor:
        if documents.diff().max() > head.CHECKED_TOKENS:
            documents = documents[..., [0, -1]]
        return right(module, q, k, v, documents, **kwargs)

    monkeypatch.setattr(attention, "attend_documents", attend)


def another_head_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = head.from_hidden

    def scaled(*arguments: Any) -> Predictions:
        predictions = right(*arguments)
        return replace(predictions, hidden=predictions.hidden * 1.1)

    monkeypatch.setattr(head, "from_hidden", scaled)


def another_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(predictions: Predictions) -> Supervised:
        result = supervised_loss(predictions)
        return replace(result, loss=result.loss * 1.05)

    monkeypatch.setattr(selftest, "supervised_loss", loss)


def positions_that_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Running(FlatCollator):
        def batch(self, groups: Any) -> Batch:
            batch = FlatCollator.batch(self, groups)
            return replace(batch, position_ids=torch.arange(batch.computed_tokens)[None])

    monkeypatch.setattr(selftest, "FlatCollator", Running)


def not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(predictions: Predictions) -> Supervised:
        result = supervised_loss(predictions)
        nll = result.nll.index_fill(0, torch.tensor([3]), float("nan"))
        return replace(result, nll=nll, loss=result.loss * torch.nan)

    monkeypatch.setattr(selftest, "supervised_loss", loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (documents_as_one, "llama"),
        (another_head_scale, "llama"),
        (another_sum, "llama"),
        (positions_that_run_on, "opt"),  # whose positions are learned: llama's are relative
        (not_a_number, "llama"),
    ],
)
def test_a_difference_stops_the_run_with_the_losses_of_each_document(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None], name: str, precision: Any
) -> None:
    spoil(monkeypatch)
    with pytest.raises(TunesmithError, match=r"set padding_free: false .* and report it") as caught:
        self_test(strong(name), ROWS, flat=True, precision=precision)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("self-test: ")
    assert "would be trained: " in first
    assert [int(line.split()[0]) for line in lines] == list(LENGTHS)
    assert all("alone" in line for line in lines)


def strong(name: str) -> Any:
    """A model that is sure of what it says: the logits of the small random ones would hide much in bfloat16."""
    model = taught(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def test_padded_batches_are_tested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    another_head_scale(monkeypatch)
    with pytest.raises(TunesmithError, match="report it, with the name of the model") as caught:
        self_test(taught(flat=False), ROWS, flat=False, precision="fp32")
    assert "padding_free" not in str(caught.value)


def test_a_loss_that_is_no_number_is_the_models_own_fault() -> None:
    model = taught()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(
        TunesmithError, match=r"LlamaForCausalLM gives a loss of nan on its first examples, .* set precision"
    ):
        self_test(model, ROWS, flat=True, precision="fp32")


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_numbers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    model = taught(lora=True)
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    if fails:
        another_head_scale(monkeypatch)
        with pytest.raises(TunesmithError, match="self-test"):
            self_test(model, ROWS, flat=True, precision="fp32")
    else:
        self_test(model, ROWS, flat=True, precision="fp32")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_weights_in_16_bits_are_not_held_to_fp32s_tolerance() -> None:
    model = taught().to(torch.bfloat16)
    assert not selftest._exact(model)
    assert selftest._exact(taught())
    assert not selftest._exact(taught("gpt_oss"))  # a router
    self_test(model, ROWS, flat=True, precision="fp32")


# When there is a test, and on what


def check(config: Callable[..., SFTConfig], dataset: Any, model: Any = None, **settings: Any) -> SelfTest | None:
    return check_before_training(model or taught(), dataset, config(**settings), flat=True)


def test_the_first_examples_are_tested_and_the_result_is_said(
    config: Callable[..., SFTConfig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunesmith")
    rows = token_rows(6, 1, 100, 7, 8, 9)
    found = check(config, Dataset.from_list(rows))
    assert found is not None
    assert [test.tokens for test in found.documents] == [6, LONGEST, 7]
    assert str(found) in caplog.text
    assert str(found).startswith("Self-test on 3 examples: loss ")


def test_of_ways_that_compete_the_other_is_tested_against_the_plain_one_and_none_is_tried(
    config: Callable[..., SFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, before = Dataset.from_list(token_rows(9, 9)), (ways.state(), ways.forced())

    def wrong_other_way(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(ways.forced())
        out = right(q, k, v, *args, **kwargs)
        return out * 2 if ways.forced() else out

    taken: list[bool | None] = []
    assert check(config, dataset) is not None
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong_other_way)
    with pytest.raises(TunesmithError, match="self-test: LlamaForCausalLM"):
        check(config, dataset)
    assert {*taken} == {False, True}
    assert (ways.state(), ways.forced()) == before


def test_the_documents_of_a_pack_are_examples(config: Callable[..., SFTConfig]) -> None:
    rows = [{"input_ids": list(range(3, 33)), "labels": list(range(3, 33)), "seq_lengths": [10, 4, 5, 6, 5]}]
    found = check(config, Dataset.from_list(rows))
    assert found is not None
    assert [test.tokens for test in found.documents] == [10, 4, 5, 6]
    assert EXAMPLES == 4


TREE = {
    "input_ids": [*range(3, 73), 5, 6, 7, *range(80, 90)],
    "seq_lengths": [70, 3, 10],
    "parents": [-1, 0, 0],
}
"""Two documents that begin alike for longer than the test looks."""


def test_documents_that_share_are_tested_as_they_are_trained_around_where_they_part(
    config: Callable[..., SFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.from_list([TREE, *token_rows(9)])
    found = check(config, dataset)
    assert found is not None
    assert [test.tokens for test in found.documents] == [LONGEST // 2 + 3, LONGEST, 9]
    right = attention.attend_documents

    def forgetful(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, **kwargs: Any) -> Tensor:
        return right(module, q, k, v, documents[:, :, :1], **kwargs)  # no segment sees what it continues

    monkeypatch.setattr(attention, "attend_documents", forgetful)
    with pytest.raises(TunesmithError, match="self-test: LlamaForCausalLM gives other losses"):
        check(config, dataset)


def test_off_is_off(config: Callable[..., SFTConfig]) -> None:
    assert check_before_training(None, None, config(self_test="off"), flat=True) is None  # type: ignore[arg-type]


def eight_bits() -> Any:
    model = taught()
    model.is_loaded_in_8bit = True
    return model


def on_meta() -> Any:
    return taught().to("meta")


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (eight_bits, {}, "8-bit products round by what else is in the batch"),
        (on_meta, {}, "the model's weights are shared out over processes"),
        (taught, {"dataset": [{"text": "a"}]}, "the training data has no rows with two tokens in `input_ids`"),
    ],
)
def test_what_can_not_be_tested_is_left_out_or_refused(
    config: Callable[..., SFTConfig],
    caplog: pytest.LogCaptureFixture,
    model: Callable[[], Any],
    settings: dict[str, Any],
    reason: str,
) -> None:
    caplog.set_level(logging.INFO, "tunesmith")
    dataset = Dataset.from_list(settings.get("dataset") or token_rows(5, 6))
    assert check(config, dataset, model()) is None
    assert f"No self-test: {reason}" in caplog.text
    with pytest.raises(TunesmithError, match=f"self_test is 'always', but {reason}"):
        check(config, dataset, model(), self_test="always")


def test_streams_are_read_for_a_test_only_when_it_must_be(config: Callable[..., SFTConfig]) -> None:
    stream = Dataset.from_list(token_rows(5, 6, 7)).to_iterable_dataset()
    assert check(config, stream) is None
    found = check(config, stream, self_test="always")
    assert found is not None
    assert [test.tokens for test in found.documents] == [5, 6, 7]
