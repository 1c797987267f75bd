"""The loss of a model that answers objectives against the model's own loss, on every architecture."""

import copy
import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models import ARCHITECTURES, PADDED, flat, gradient_error, gradients, padded, supervised, tiny, token_rows
from tunesmith.data.batches import Batch, Targets
from tunesmith.errors import TunesmithError
from tunesmith.model import head as head_module
from tunesmith.model.attention import use_documents
from tunesmith.model.head import answer_objectives, logit_form, plain_head
from tunesmith.objectives import logprobs as logprobs_module
from tunesmith.objectives.supervised import LossOptions, Supervised, supervised_loss

LENGTHS = (9, 5, 12, 5)
BATCHES = [(name, kind) for name in ARCHITECTURES for kind in ("padded", "flat") if (name, kind) != ("gpt_neo", "flat")]


def own_loss(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """The mean over supervised tokens that the model itself computes of a padded batch."""
    batch = padded(rows)
    loss: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
    ).loss
    return loss


def taught_result(
    model: Any, rows: list[dict[str, Any]], kind: str = "padded", options: LossOptions | None = None
) -> Supervised:
    return supervised(model, flat(rows) if kind == "flat" else padded(rows), options)


def mean(result: Supervised) -> Tensor:
    return result.loss / len(result.nll)


def fast_head(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the way through the model's own logits an error."""
    monkeypatch.setattr(head_module, "from_logits", None)


# Targets


def targets_of(labels: Tensor, weights: Tensor | None = None) -> Targets:
    return Batch(input_ids=labels, labels=labels, weights=weights).targets()


def test_the_target_of_a_position_is_the_label_of_the_next() -> None:
    targets = targets_of(torch.tensor([[-100, 6, 7, -100, 9]]))
    assert targets.positions.tolist() == [0, 1, 3]
    assert targets.tokens.tolist() == [6, 7, 9]
    assert targets.weights is None


def test_the_first_label_of_a_row_is_no_target_of_the_row_before() -> None:
    labels = torch.tensor([[-100, 2, 3], [4, 5, -100]])
    weights = torch.tensor([[9.0, 1.0, 2.0], [9.0, 0.5, 9.0]])
    targets = targets_of(labels, weights)
    assert targets.positions.tolist() == [0, 1, 3]
    assert targets.tokens.tolist() == [2, 3, 5]
    assert targets.weights is not None
    assert targets.weights.tolist() == [1.0, 2.0, 0.5]


def test_rows_without_labels_have_no_targets() -> None:
    targets = targets_of(torch.full((2, 3), -100))
    assert targets.positions.shape == targets.tokens.shape == (0,)


# The loss


@pytest.mark.parametrize(("name", "kind"), BATCHES)
def test_loss_and_gradients_are_the_models_own(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny(name), token_rows(*LENGTHS)
    expected = own_loss(model, rows)
    expected.backward()
    expected_gradients = gradients(model)
    answer_objectives(model)
    if kind == "flat":
        use_documents(model)
    fast_head(model, monkeypatch)
    found = mean(taught_result(model, rows, kind))
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-5
    assert gradient_error(gradients(model), expected_gradients) < 1e-5


@pytest.mark.parametrize("name", [name for name, kind in BATCHES if kind == "flat"])
def test_where_shapes_cost_a_row_is_filled_up_and_nothing_else_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny(name), token_rows(*LENGTHS)
    answer_objectives(model)
    use_documents(model)
    plain = taught_result(model, rows, "flat")
    plain.loss.backward()
    expected = gradients(model)
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for module in (head_module, logprobs_module):
        monkeypatch.setattr(module, "shapes_cost", lambda _weight: True)
    filled = taught_result(model, rows, "flat")
    filled.loss.backward()
    assert (sum(LENGTHS), seen) == (31, [32])
    torch.testing.assert_close(filled.nll, plain.nll, rtol=1e-5, atol=1e-5)
    assert gradient_error(gradients(model), expected) < 1e-5


def test_in_bf16_on_a_cpu_rows_of_any_length_have_one_of_few() -> None:
    model: Any = tiny("llama")
    model.to(torch.bfloat16)
    seen = set[int]()
    answer_objectives(model)
    use_documents(model)
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.add(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    lengths = range(40, 120)
    for length in lengths:
        taught_result(model, token_rows(9, length - 9), "flat")
    assert {size for size in seen if size > 8} == set(range(40, 121, 8))  # smaller are those of the first check


@pytest.mark.parametrize("kind", ["padded", "flat"])
def test_neighbours_in_a_batch_do_not_change_a_rows_loss(kind: str) -> None:
    model, rows = tiny("llama"), token_rows(*LENGTHS)
    answer_objectives(model)
    use_documents(model)
    together = taught_result(model, rows, kind)
    apart = [taught_result(model, [row], kind) for row in rows]
    torch.testing.assert_close(together.nll, torch.cat([result.nll for result in apart]))
    torch.testing.assert_close(together.loss, sum(result.loss for result in apart))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "cohere", "granite"])
def test_the_way_through_the_models_own_logits_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny(name), token_rows(*LENGTHS)
    answer_objectives(model)
    options = LossOptions(smoothing=0.1)
    fused = taught_result(model, rows, options=options)
    fused.loss.backward()
    expected = gradients(model)
    monkeypatch.setattr(head_module, "plain_head", lambda _model: None)
    found = taught_result(model, rows, options=options)
    found.loss.backward()
    for field in ("loss", "nll", "entropy", "correct"):
        torch.testing.assert_close(getattr(found, field), getattr(fused, field), rtol=1e-5, atol=1e-5)
    assert gradient_error(gradients(model), expected) < 1e-5


def test_weights_scale_each_tokens_loss() -> None:
    model, rows = tiny("llama"), token_rows(*LENGTHS)
    answer_objectives(model)
    nll = taught_result(model, rows).nll
    for row in rows:
        row["weights"] = [0.1 * i for i in range(len(row["input_ids"]))]
    found = taught_result(model, rows)
    # The first supervised token of a row is its third.
    weights = torch.tensor([0.1 * i for row in rows for i in range(2, len(row["input_ids"]))])
    torch.testing.assert_close(found.loss, (nll * weights).sum())
    torch.testing.assert_close(found.nll, nll)


def test_a_batch_without_labels_gives_zero_loss_with_gradients() -> None:
    model, rows = tiny("llama"), token_rows(*LENGTHS)
    answer_objectives(model)
    result = taught_result(model, [row | {"labels": [-100] * len(row["labels"])} for row in rows])
    assert result.loss.item() == 0.0
    result.loss.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("kind", ["padded", "flat"])
def test_the_first_batch_takes_as_many_passes_whatever_its_length(kind: str) -> None:
    """Processes that share weights out gather them in each pass, so one with a single token must do as many."""
    counts = []
    for length in (1, 9):
        model, calls = tiny("llama"), list[int]()
        answer_objectives(model)
        if kind == "flat":
            use_documents(model)
        model.model.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        taught_result(model, token_rows(length), kind)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 1


def test_other_calls_of_a_taught_model_are_unchanged() -> None:
    model: Any = tiny("llama")
    twin: Any = tiny("llama")
    rows = token_rows(*LENGTHS)
    signature = inspect.signature(model.forward)
    answer_objectives(model)
    assert inspect.signature(model.forward) == signature
    torch.testing.assert_close(own_loss(model, rows), own_loss(twin, rows))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(ids, max_new_tokens=5), twin.generate(ids, max_new_tokens=5))


def test_a_deep_copy_of_a_taught_model_has_its_own_weights() -> None:
    model, rows = tiny("llama"), token_rows(*LENGTHS)
    answer_objectives(model)
    twin = copy.deepcopy(model)
    before = taught_result(twin, rows).loss.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert taught_result(twin, rows).loss.item() == before


def test_bf16_autocast_is_applied() -> None:
    model, rows = tiny("llama"), token_rows(*LENGTHS)
    answer_objectives(model)
    exact = mean(taught_result(model, rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mean(taught_result(model, rows))
        expected = own_loss(model, rows)
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert abs(rounded.item() - expected.item()) < 1e-3


# Adapters


def adapted(name: str, **config: Any) -> tuple[PeftModel, PreTrainedModel]:
    """A model with adapters that are not zero, and the taught causal model in it."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(name), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    assert isinstance(model, PeftModel)
    model.eval()
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return model, base


@pytest.mark.parametrize("kind", ["padded", "flat"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_oss"])
def test_a_model_in_lora_gives_its_own_loss_and_gradients(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = adapted(name, target_modules="all-linear")
    rows = token_rows(*LENGTHS)
    expected = own_loss(model, rows)
    expected.backward()
    expected_gradients = gradients(base)
    answer_objectives(base)
    if kind == "flat":
        use_documents(base)
    fast_head(base, monkeypatch)
    found = mean(taught_result(model, rows, kind))
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-5
    found_gradients = gradients(base)
    assert found_gradients
    assert all("lora_" in name for name in found_gradients)
    assert gradient_error(found_gradients, expected_gradients) < 1e-5


def test_a_trained_copy_of_the_head_is_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = adapted("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = base.lm_head.modules_to_save["default"]
    with torch.no_grad():
        trained.weight.add_(0.1)
    rows = token_rows(*LENGTHS)
    expected = own_loss(model, rows)
    expected.backward()
    expected_gradients = gradients(base)
    answer_objectives(base)
    fast_head(base, monkeypatch)
    assert plain_head(base) is trained
    found = mean(taught_result(model, rows))
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-5
    assert gradient_error(gradients(base), expected_gradients) < 1e-5
    with model.disable_adapter():
        disabled = mean(taught_result(model, rows))
        torch.testing.assert_close(disabled, own_loss(model, rows), rtol=1e-5, atol=1e-5)
    assert abs(disabled.item() - found.item()) > 1e-3


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": [5, 6]}])
def test_an_adapter_on_the_head_takes_the_models_own_logits(config: dict[str, Any]) -> None:
    model, base = adapted("llama", **({"target_modules": ["q_proj"]} | config))
    rows = token_rows(*LENGTHS)
    expected = own_loss(model, rows)
    expected.backward()
    expected_gradients = gradients(base)
    answer_objectives(base)
    found = mean(taught_result(model, rows))
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-5
    assert gradient_error(gradients(base), expected_gradients) < 1e-5


# What the first batch is checked for

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", _ENCODER | {"is_decoder": True}),  # a layer before the output layer
        ("modernbert-decoder", {key: _ENCODER[key] for key in list(_ENCODER)[:4]}),
        ("recurrent_gemma", {**dict(list(_ENCODER.items())[:4]), "lru_width": 32, "logits_soft_cap": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_head_that_does_more_than_a_product_gives_the_models_own_loss(name: str, settings: dict[str, Any]) -> None:
    model, rows = tiny(name, **settings), token_rows(9)
    batch = torch.tensor([rows[0]["input_ids"]])
    logits = model(input_ids=batch, use_cache=False).logits[0, 1:-1]
    expected = nn.functional.cross_entropy(logits, batch[0, 2:])
    answer_objectives(model)
    found = mean(taught_result(model, rows))
    assert abs(found.item() - expected.item()) < 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "big_bird"])
def test_an_encoder_is_refused(name: str) -> None:
    model = tiny(name, **_ENCODER)
    answer_objectives(model)
    with pytest.raises(TunesmithError, match="sees the tokens behind it, so it can't learn to predict them"):
        taught_result(model, token_rows(*LENGTHS))


@pytest.mark.parametrize("first", ["padded", "flat"])
def test_a_model_whose_layers_reshape_the_mask_is_refused_with_flat_batches(first: str) -> None:
    """Doge adds a mask of its own to the one it gets."""
    settings = ARCHITECTURES["llama"] | {"hidden_dropout": 0.0}
    model, rows = tiny("doge", **settings), token_rows(*LENGTHS)
    expected = own_loss(model, rows)
    answer_objectives(model)
    use_documents(model)
    if first == "padded":
        assert abs(mean(taught_result(model, rows)).item() - expected.item()) < 1e-5
    with pytest.raises(
        TunesmithError, match=r"DogeForCausalLM can't take documents side by side .*padding_free: false"
    ):
        taught_result(model, rows, "flat")


class Leaky(nn.Module):
    """A decoder whose tokens also see the mean of all tokens before them, over the borders of documents."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, **inputs: Any) -> Any:
        output = self.decoder(**inputs)
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + hidden.cumsum(dim=1)
        return output


def test_a_model_that_carries_a_state_along_the_row_is_refused_with_flat_batches() -> None:
    model, rows = tiny("llama"), token_rows(*LENGTHS)
    model.model = Leaky(model.model)
    answer_objectives(model)
    use_documents(model)
    with pytest.raises(TunesmithError, match=r"can't take documents side by side \(they don't give the outputs"):
        taught_result(model, rows, "flat")


def test_the_check_leaves_the_mode_and_the_random_numbers_alone() -> None:
    model, rows = tiny("bert", **_ENCODER, is_decoder=True), token_rows(*LENGTHS)
    answer_objectives(model)
    model.train()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(taught_result(model, rows).loss.item())
    assert model.training
    assert results[0] == results[1]  # the first of them was checked, the second was not


def test_the_check_takes_rows_of_one_token() -> None:
    model = tiny("llama")
    answer_objectives(model)
    result = taught_result(model, token_rows(1))
    assert result.loss.item() == 0.0


@pytest.mark.parametrize("value", ["inv_sqrt_d_model", None])
def test_a_factor_that_is_no_number_is_none(value: str | None) -> None:
    model = tiny("llama")
    model.config.logit_scale = value
    assert logit_form(model).scale == 1.0


def test_every_architecture_that_is_padded_is_tested_so() -> None:
    assert {name for name, kind in BATCHES if kind == "padded"} == set(ARCHITECTURES)
    assert {name for name, _ in BATCHES} - {name for name, kind in BATCHES if kind == "flat"} == PADDED


def test_a_model_that_gives_nan_is_named_so() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    answer_objectives(model)
    ids = torch.full((1, 8), 5)
    with pytest.raises(TunesmithError, match="LlamaForCausalLM gives NaN for its first tokens"):
        model(input_ids=ids, targets=targets_of(ids), objective=supervised_loss)
