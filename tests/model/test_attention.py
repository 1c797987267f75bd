"""Document attention against one forward pass a document, on every architecture."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models import (
    ARCHITECTURES,
    FLAT,
    PADDED,
    VOCABULARY,
    WINDOW,
    flat,
    gradient_error,
    gradients,
    tiny,
    token_rows,
)
from tunesmith.data.prefix import paths
from tunesmith.errors import TunesmithError
from tunesmith.model import attention
from tunesmith.model.attention import (
    _runs,
    attend_documents,
    document_map,
    is_document_map,
    supports_documents,
    use_documents,
)

LENGTHS = (9, 1, 12, 5)
assert max(LENGTHS) > WINDOW  # or the windows would not be tested


def flat_inputs(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    batch = flat(token_rows(*lengths))
    mask = document_map(batch.lengths or ())
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}


def apart(model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """Logits (T, V) of each document by itself, one behind the other."""
    rows = [torch.tensor([row["input_ids"]]) for row in token_rows(*lengths)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


def test_a_document_map_holds_the_offsets_of_the_documents() -> None:
    found = document_map([3, 1, 2])
    assert found.dtype == torch.int32
    assert found.shape == (1, 1, 1, 4)
    assert found.flatten().tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(1, 4, dtype=torch.int32),
        torch.ones(1, 1, 4, 4, dtype=torch.bool),
        torch.ones(1, 1, 1, 4),
        torch.ones(2, 1, 1, 4, dtype=torch.int32),
    ],
    ids=["none", "2-D", "bool", "float", "two rows"],
)
def test_other_masks_are_no_document_map(mask: Tensor | None) -> None:
    assert not is_document_map(mask)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_documents_in_one_row_give_what_they_give_apart(name: str, base: str) -> None:
    model = tiny(name)
    if base == "sdpa" and not model._supports_sdpa:
        base = "eager"  # gpt-oss
    model.set_attn_implementation(base)
    expected = apart(model)
    largest = expected.abs().max().item()
    expected.square().sum().backward()
    expected_gradients = gradients(model)

    assert supports_documents(model) == ""
    use_documents(model)
    found = model(**flat_inputs(), use_cache=False).logits[0]
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)
    assert gradient_error(gradients(model), expected_gradients) < 1e-5


@pytest.mark.parametrize("name", FLAT)
def test_the_first_document_does_not_change_the_second(name: str) -> None:
    model = tiny(name)
    use_documents(model)
    inputs = flat_inputs((5, 6))
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :5] = (other["input_ids"][0, :5] + 1) % VOCABULARY
    with torch.no_grad():
        first, second = (model(**x, use_cache=False).logits[0] for x in (inputs, other))
    assert not torch.equal(first[:5], second[:5])
    # An expert multiplies the tokens of both documents at once, and the shape of a product changes how it rounds.
    rounding = 1e-6 if name == "gpt_oss" else 0.0
    torch.testing.assert_close(first[5:], second[5:], rtol=0, atol=rounding)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_gives_the_same_tokens_with_and_without_document_attention(name: str) -> None:
    model: Any = tiny(name)
    if name in PADDED:
        assert supports_documents(model) == "GPTNeoForCausalLM does not use transformers' attention interface"
        return
    inputs = {
        "input_ids": torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "max_new_tokens": WINDOW + 4,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = model.generate(**inputs)
    assert expected.shape == (2, 5 + WINDOW + 4)
    use_documents(model)
    assert torch.equal(model.generate(**inputs), expected)


@pytest.mark.parametrize("name", FLAT)
def test_padded_batches_give_the_same_with_and_without_document_attention(name: str) -> None:
    model = tiny(name)
    inputs = {
        "input_ids": torch.tensor([[11, 12, 13, 0, 0, 0], [21, 22, 23, 24, 25, 26]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]),
        "use_cache": False,
    }
    with torch.no_grad():
        expected = model(**inputs).logits
        use_documents(model)
        found = model(**inputs).logits
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, :3], expected[0, :3])


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = tiny(name)
    use_documents(model)
    model.train()
    expected = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**flat_inputs(), use_cache=False).logits.square().sum().backward()
        expected[checkpointing] = gradients(model)
    assert gradient_error(expected[True], expected[False]) < 1e-6


def test_use_documents_twice_is_use_documents_once() -> None:
    model = tiny("llama")
    use_documents(model)
    use_documents(model)
    assert model.config._attn_implementation == "tunesmith_sdpa"


def test_another_model_of_the_same_architecture_is_left_alone() -> None:
    model, other = tiny("llama"), tiny("llama")
    use_documents(model)
    assert other.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_ask_for_document_attention(tmp_path: Any) -> None:
    model = tiny("llama")
    use_documents(model)
    model.save_pretrained(tmp_path)
    assert "tunesmith" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("llama4_text", {}, "its layers of type chunked_attention do not keep documents apart"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "its layers of type conv do not keep documents apart"),
        ("mamba", {}, "MambaForCausalLM does not use transformers' attention interface"),
        ("bloom", {}, "BloomForCausalLM does not use transformers' attention interface"),
        (
            "recurrent_gemma",
            {"lru_width": 32, "attention_window_size": WINDOW},
            "RecurrentGemmaForCausalLM carries a state from token to token",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_would_mix_documents_say_so(name: str, settings: dict[str, Any], reason: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "llama4_text":
        small |= {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    assert supports_documents(tiny(name, **small, **settings)) == reason


# One layer's call


class Layer(nn.Module):
    """An attention layer as `attend_documents` sees it."""

    is_causal = True


def qkv(heads: int = 4, kv_heads: int = 2, length: int = 9, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, n, length, size) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """(1, T, N, H): softmax over what each token may see, token by token and head by head."""
    heads, size = q.shape[1], q.shape[3]
    output = torch.zeros(1, q.shape[2], heads, size)
    starts = [start for start, length in zip(document_map(lengths).flatten().tolist(), lengths, strict=False)
              for _ in range(length)]  # fmt: skip
    for head in range(heads):
        key, value = (x[0, head * x.shape[1] // heads] for x in (k, v))
        for t, start in enumerate(starts):
            first = start if window is None else max(start, t + 1 - window)
            scores = (key[first : t + 1] @ q[0, head, t]) * (size**-0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weights = torch.softmax(scores, dim=0)[: t + 1 - first]
            output[0, t, head] = weights @ value[first : t + 1]
    return output


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 0.5},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"window": 2, "softcap": 0.7, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"scaling": 1.0},
    ],
    ids=["plain", "window", "softcap", "sinks", "all", "scaling"],
)
@pytest.mark.parametrize("lengths", [[9], [4, 1, 4], [1] * 9], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_layer_attends_by_the_definition(options: dict[str, Any], lengths: list[int], kv_heads: int) -> None:
    q, k, v = qkv(kv_heads=kv_heads)
    names = {"window": "sliding_window", "sinks": "s_aux"}
    arguments = {names.get(name, name): value for name, value in options.items()}
    found = attend_documents(Layer().eval(), q, k, v, document_map(lengths), **arguments)
    assert found.is_contiguous()  # some models call view() on it
    torch.testing.assert_close(found, by_definition(q, k, v, lengths, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.5, "window": 2}], ids=["plain", "window", "all"])
@pytest.mark.parametrize(
    ("lengths", "parents", "runs"),
    [
        ([2, 3, 1, 2, 1], [-1, 0, 1, 0, 3], [([0, 1, 2], 3), ([0, 3, 4], 2)]),
        ([2, 3, 1, 2, 1], [-1, 0, 1, 1, 0], [([0, 1, 2], 3), ([0, 1, 3], 1), ([0, 4], 1)]),
        ([3, 1, 2, 2, 1], [-1, 0, 0, -1, 2], [([0, 1], 2), ([0, 2], 1), ([3], 1), ([0, 2, 4], 1)]),
    ],
    ids=["forks once", "forks twice", "two trees"],
)
def test_a_segment_attends_to_all_that_it_continues(
    lengths: list[int], parents: list[int], runs: list[Any], options: dict[str, Any]
) -> None:
    """Each path of segments, laid out as a document of its own, attends as a document does."""
    q, k, v = qkv()
    arguments = {"sliding_window" if name == "window" else name: value for name, value in options.items()}
    mask = document_map(lengths, parents)
    assert _runs(parents) == runs
    found = attend_documents(Layer().eval(), q, k, v, mask, **arguments)
    assert found.is_contiguous()
    starts = mask[0, 0, 0].tolist()
    for path in paths(parents):
        places = [place for segment in path for place in range(starts[segment], starts[segment] + lengths[segment])]
        expected = by_definition(q[:, :, places], k[:, :, places], v[:, :, places], [len(places)], **options)
        torch.testing.assert_close(found[:, places], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_a_long_continuation_attends_in_blocks_as_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Values and gradients, in float64: 20 queries in blocks of 6."""

    def attended(block: int) -> list[Tensor]:
        monkeypatch.setattr(attention, "BLOCK", block)
        q, k, v = (x.double().requires_grad_() for x in qkv(length=30))
        mask = document_map([3, 2, 20, 5], [-1, 0, 0, -1])
        out = attend_documents(Layer().eval(), q, k, v, mask, sliding_window=window)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        return [out, *(x.grad for x in (q, k, v) if x.grad is not None)]

    whole, blocks = attended(100), attended(6)
    assert len(whole) == 4
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"softcap": 100.0}], ids=["sdpa", "eager"])
def test_dropout_is_applied_in_training_only(arguments: dict[str, Any]) -> None:
    q, k, v = qkv()
    layer = Layer()

    def attend() -> Tensor:
        torch.manual_seed(0)
        return attend_documents(layer, q, k, v, document_map([4, 5]), dropout=0.5, **arguments)

    layer.train()
    dropped = attend()
    layer.eval()
    kept = attend()
    # The first token of a document sees only itself: its output is its value, dropped or doubled.
    first = dropped[0, 0] / kept[0, 0]
    assert {0.0, 2.0} >= set(first.flatten().round(decimals=4).tolist())
    assert not torch.equal(dropped, kept)
    plain = attend_documents(layer, q, k, v, document_map([4, 5]), **arguments)
    torch.testing.assert_close(kept, plain)


@pytest.mark.parametrize("argument", ["position_bias", "alibi", "block_indices", "a_new_one"])
def test_an_argument_that_could_change_attention_is_an_error(argument: str) -> None:
    with pytest.raises(TunesmithError, match=rf"Layer passes '{argument}'.*set padding_free: false"):
        attend_documents(Layer(), *qkv(), document_map([9]), **{argument: torch.zeros(1)})


@pytest.mark.parametrize("arguments", [{"position_ids": torch.arange(9)}, {"alibi": None}, {"a_flag": False}])
def test_an_argument_that_changes_nothing_is_accepted(arguments: dict[str, Any]) -> None:
    q, k, v = qkv()
    found = attend_documents(Layer().eval(), q, k, v, document_map([9]), **arguments)
    torch.testing.assert_close(found, by_definition(q, k, v, [9]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["argument", "attribute"])
def test_a_layer_that_is_not_causal_is_an_error(how: str) -> None:
    layer = Layer()
    if how == "attribute":
        layer.is_causal = False
    with pytest.raises(TunesmithError, match="Layer is not causal"):
        attend_documents(layer, *qkv(), document_map([9]), is_causal=how == "attribute")


def test_a_window_that_a_layer_leaves_to_the_mask_is_an_error_for_longer_documents() -> None:
    """Phi-3.5-MoE masks with its window, and does not tell its layers."""
    settings = ARCHITECTURES["mistral"] | {"num_local_experts": 4}
    model = tiny("phimoe", **settings)
    use_documents(model)
    with torch.no_grad():
        short = model(**flat_inputs((WINDOW, 3)), use_cache=False).logits[0]
        torch.testing.assert_close(short, apart(tiny("phimoe", **settings), (WINDOW, 3)), rtol=1e-5, atol=1e-5)
        with pytest.raises(TunesmithError, match=f"window of {WINDOW} tokens to the mask, and a document has 5"):
            model(**flat_inputs((5, 3)), use_cache=False)
        continued = {"attention_mask": document_map([2, 3], parents=[-1, 0])}  # one document of 5, in two parts
        with pytest.raises(TunesmithError, match=f"window of {WINDOW} tokens to the mask, and a document has 5"):
            model(**flat_inputs((2, 3)) | continued, use_cache=False)


def test_models_that_pass_the_mask_by_name_are_supported() -> None:
    settings = ARCHITECTURES["llama"] | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    model = tiny("afmoe", **settings, layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
    with torch.no_grad():
        expected = apart(model)
        use_documents(model)
        found = model(**flat_inputs(), use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_deep_copy_of_a_model_attends_over_documents_too() -> None:
    model = tiny("llama")
    use_documents(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        calls: list[Callable[..., Any]] = [model, twin]
        first, second = (call(**flat_inputs(), use_cache=False).logits for call in calls)
    assert torch.equal(first, second)
