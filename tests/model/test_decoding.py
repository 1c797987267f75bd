"""Rows that share a beginning, enter and leave have the tokens that `transformers` gives each prompt alone."""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from tests.models import ARCHITECTURES, VOCABULARY, tiny
from tunesmith.model import decoding
from tunesmith.model.attention import use_documents
from tunesmith.model.decoding import Request, can_decode, decode, families

COMMON = [*range(20, 50)]
SHORT, LONG = [5, 6, 7], [*range(3, 60)]


def prompts() -> list[list[int]]:
    """Six that begin alike, of differing lengths, one of which the others begin with; two that don't."""
    generator = torch.Generator().manual_seed(3)
    tails = [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (1, 40, 7, 7, 2)]
    return [SHORT, *(COMMON + tail for tail in tails), LONG, COMMON]


def greedy(logits_BV: Tensor, *_: Any) -> Tensor:
    return logits_BV.argmax(dim=-1)


def alone(model: Any, ids: Sequence[int], new: int) -> list[int]:
    """The answer by `transformers`."""
    settings = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=new)
    model.generation_config = GenerationConfig()
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=settings)
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def requests_of(asked: list[list[int]], limits: list[int]) -> list[Request]:
    return [Request(index=i, ids=ids, limit=limit) for i, (ids, limit) in enumerate(zip(asked, limits, strict=True))]


@pytest.fixture(autouse=True)
def every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small prompts share and regroup as large ones do."""
    monkeypatch.setattr(decoding, "WORTH", 8)
    monkeypatch.setattr(decoding, "PREFILL", (8, 90))
    monkeypatch.setattr(decoding, "SPARE", 3)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"phi3"}))
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model = tiny(name)
    assert can_decode(model)
    asked = prompts()
    limits = [20, 3, 25, 1, 9, 30, 14, 30]
    whole = [alone(model, ids, limit) for ids, limit in zip(asked, limits, strict=True)]
    stops = [whole[2][5], whole[5][11]]
    expected = [[*itertools.takewhile(lambda token: token not in stops, tokens)] for tokens in whole]
    for rows in (1, 3, 16):
        answers = {done.index: done for done in decode(model, requests_of(asked, limits), stops, greedy, rows=rows)}
        assert [answers[i].ids for i in range(len(asked))] == expected
        cut = [len(ids) == limit for ids, limit in zip(expected, limits, strict=True)]
        assert [not answers[i].ended for i in range(len(asked))] == cut


def test_a_model_that_attends_over_documents_answers_the_same() -> None:
    model = tiny("llama")
    expected = [alone(model, ids, 12) for ids in prompts()]
    use_documents(model)
    answers = sorted(decode(model, requests_of(prompts(), [12] * 8), [], greedy, rows=4), key=lambda done: done.index)
    assert [done.ids for done in answers] == expected


def test_a_short_row_that_outlives_a_long_one_stays_within_the_models_room() -> None:
    model = tiny("gpt_neo")  # whose attention fails from column 128 on
    asked, limits = [[*range(3, 83)], [7] * 60], [20, 68]
    expected = [alone(model, ids, limit) for ids, limit in zip(asked, limits, strict=True)]
    answers = sorted(decode(model, requests_of(asked, limits), [], greedy), key=lambda done: done.index)
    assert [done.ids for done in answers] == expected


def test_what_prompts_share_is_computed_once_and_rows_that_finished_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    calls: list[tuple[int, ...]] = []
    original = model.forward

    def forward(**inputs: Any) -> Any:
        calls.append(tuple(inputs["input_ids"].shape))
        return original(**inputs)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", forward)
    asked = [[*COMMON, 50 + i] for i in range(4)]
    list(decode(model, requests_of(asked, [1, 2, 3, 3]), [], greedy, rows=4))
    assert calls == [(1, 30), (4, 1), (3, 1), (2, 1)]
    calls.clear()
    list(decode(model, requests_of(asked, [2, 2, 2, 2]), [], greedy, rows=2))
    assert calls == [(1, 30), (2, 1), (2, 1), (2, 1), (2, 1)]  # two enter when two have left


def test_more_rows_at_a_time_on_a_cpu_as_far_as_their_cache_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    asked = requests_of([[3 + i] for i in range(80)], [2] * 80)

    def first_step() -> int:
        chosen: list[int] = []

        def pick(logits_BV: Tensor, *_: Any) -> Tensor:
            chosen.append(len(logits_BV))
            return greedy(logits_BV)

        list(decode(model, asked, [], pick))
        return chosen[0]

    assert first_step() == 64
    a_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, bytes
    monkeypatch.setattr(decoding, "CACHE", 40 * 3 * a_token)  # of rows of 3 tokens
    assert first_step() == 40
    monkeypatch.setattr(decoding, "CACHE", 1)
    assert first_step() == 16


def test_families_save_the_most_tokens() -> None:
    def found(*asked: list[int]) -> list[tuple[int, list[int]]]:
        requests = requests_of([*asked], [1] * len(asked))
        return [(family.common, [one.index for one in family.members]) for family in families(requests)]

    one, two = [*range(100, 120)], [*range(200, 220)]
    assert found([*one, 1], [*two, 1, 2, 3], [*one, 2, 2], [*two, 4]) == [(20, [1, 3]), (20, [2, 0])]
    # A little more in common is not worth a call of its own.
    assert found([*one, 1, 5], [*one, 1, 6, 7], [*one, 2]) == [(20, [1, 0, 2])]
    deep = [*one, *two]
    assert found([*deep, 1], [*deep, 2, 3], [*deep, 4], [*one, 1]) == [(40, [1, 0, 2]), (0, [3])]
    # The last token of a prompt is never shared: its logits are asked for.
    assert found(one, [*one]) == [(19, [0, 1])]
    assert found([1, 2], [1, 2, 3], [4]) == [(0, [1, 0, 2])]
    assert found() == []


def test_models_whose_rows_are_not_keys_and_values_alone_go_through_transformers() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not can_decode(mamba)
    assert not can_decode(tiny("phi3"))  # it makes inputs of its own, with which it computes a long row anew
    chunked = tiny("llama", layer_types=["chunked_attention", "full_attention"], attention_chunk_size=8)
    assert not can_decode(chunked)
    linear = tiny("llama")
    linear.config.layer_types = ["linear_attention", "full_attention"]
    assert not can_decode(linear)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not can_decode(tiny("llama", rope_parameters=dynamic))
    assert can_decode(tiny("llama"))


def test_a_cache_is_copied_seldom_and_never_by_a_step() -> None:
    model = tiny("llama")
    cache = decoding._Model(model).cache()
    layer: Any = cache.layers[0]
    layer.fill([(torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 8))], 5, 10)
    where = layer.buffers[0].data_ptr()
    for _ in range(10):
        keys, _ = layer.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8))
        assert keys.data_ptr() == where
    assert keys.shape == (2, 2, 15, 8)
    assert layer.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8))[0].data_ptr() != where
