"""Log-probabilities with a graph against PyTorch's own: values, gradients by per-token weights, every kind of head."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import flat, token_rows
from tests.objectives.test_supervised import (
    OPTIONS,
    H,
    S,
    V,
    gradients,
    inputs,
    predictions,
    reference,
    reference_logits,
)
from tunesmith.data.batches import Batch
from tunesmith.model.head import Predictions, answer_objectives, head_logits
from tunesmith.objectives import logprobs
from tunesmith.objectives.logprobs import token_logprobs
from tunesmith.objectives.supervised import supervised_loss

FORMS = {name: {key: options[key] for key in options if key != "smoothing"} for name, options in OPTIONS.items()}
WEIGHTS = torch.linspace(-1.5, 2.0, S)
"""Of both signs: a preference pushes some tokens up and others down."""


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows", [1, 3, S])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
def test_values_and_weighted_gradients_are_those_of_torch(
    form: dict[str, Any], rows: int, bias: bool, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", rows * 4 * V)
    x = inputs(bias=bias)
    for parameter in (x.weight, x.bias):
        if parameter is not None:
            parameter.requires_grad_(trained)
    ours, theirs = token_logprobs(predictions(x, **form)).logprobs, -reference(x, **form)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    pairs = zip(gradients((ours * WEIGHTS).sum(), x), gradients((theirs * WEIGHTS).sum(), x), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_of_a_frozen_head_the_logits_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(bias=False)
    made: list[int] = []

    def counted(*given: Any) -> Tensor:
        made.append(len(given[0]))
        return head_logits(*given)

    monkeypatch.setattr(logprobs, "head_logits", counted)
    token_logprobs(predictions(x)).logprobs.sum().backward()
    assert made == [S, S]
    x.weight.requires_grad_(False)
    token_logprobs(predictions(x)).logprobs.sum().backward()
    assert made == [S, S, S]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_mean_logit_is_that_of_the_models_logits(form: dict[str, Any]) -> None:
    x = inputs()
    scored = token_logprobs(predictions(x, **form), with_mean_logit=True)
    torch.testing.assert_close(scored.mean_logit, reference_logits(x, **form).mean(dim=-1))
    assert token_logprobs(predictions(x)).mean_logit is None


def test_a_loss_that_mixes_tokens_gets_its_gradient_through_them() -> None:
    """The log-sigmoid of the difference of two sums, as in DPO."""
    x = inputs()

    def objective(values: Tensor) -> Tensor:
        return -nn.functional.logsigmoid(0.1 * (values[:6].sum() - values[6:].sum()))

    ours, theirs = objective(token_logprobs(predictions(x)).logprobs), objective(-reference(x))
    for mine, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_the_negative_sum_is_the_supervised_loss() -> None:
    x = inputs()
    scored, loss = token_logprobs(predictions(x)), supervised_loss(predictions(x))
    torch.testing.assert_close(-scored.logprobs, loss.nll)
    assert torch.equal(scored.entropy, loss.entropy)
    assert torch.equal(scored.correct, loss.correct)
    for mine, expected in zip(gradients(-scored.logprobs.sum(), x), gradients(loss.loss, x), strict=True):
        torch.testing.assert_close(mine, expected)


def test_the_models_own_logits_give_the_same() -> None:
    x = inputs()
    logits = nn.functional.linear(x.hidden, x.weight, x.bias)
    ours = token_logprobs(Predictions(hidden=logits, tokens=x.targets)).logprobs
    expected = token_logprobs(predictions(x)).logprobs
    torch.testing.assert_close(ours, expected)
    pairs = zip(gradients((ours * WEIGHTS).sum(), x), gradients((expected * WEIGHTS).sum(), x), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_no_position_keeps_the_graph() -> None:
    x = inputs(size=0)
    scored = token_logprobs(predictions(x))
    assert scored.logprobs.shape == scored.entropy.shape == (0,)
    hidden, weight, _ = gradients(scored.logprobs.sum(), x)
    assert hidden.shape == (0, H)
    assert not weight.any()


def test_of_a_bf16_head_sums_and_log_probabilities_are_fp32() -> None:
    x = inputs(size=2048, bias=False, dtype=torch.bfloat16)
    scored = token_logprobs(predictions(x))
    assert scored.logprobs.dtype == torch.float32
    logits = nn.functional.linear(x.hidden, x.weight).float()
    expected = -nn.functional.cross_entropy(logits, x.targets, reduction="none")
    torch.testing.assert_close(scored.logprobs, expected)
    assert {gradient.dtype for gradient in gradients(scored.logprobs.sum(), x)} == {torch.bfloat16}


@pytest.mark.parametrize("head", ["tied", "untied", "frozen"])
def test_through_a_model_the_gradients_of_every_kind_of_head_are_the_models_own(head: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, tie_word_embeddings=head == "tied", **sizes)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config)
    model.lm_head.weight.requires_grad_(head != "frozen")
    batch = Batch.of(dict(flat(token_rows(9)).tensors()))
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    targets = batch.targets()
    expected = logits.log_softmax(dim=-1)[targets.positions, targets.tokens]
    weights = torch.linspace(-1, 1, len(expected))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    answer_objectives(model)
    answer = model(**batch.inputs(), targets=targets, objective=token_logprobs)
    assert answer.outputs is None
    scored = answer.outcome
    torch.testing.assert_close(scored.logprobs, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad((scored.logprobs * weights).sum(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
