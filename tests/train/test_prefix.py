"""Sharing prefixes changes nothing but the time: the same loss and gradients on every architecture."""

from functools import cache
from random import Random
from typing import Any

import pytest
import torch

from tests.data.styles import assistant, conversation, system, user, words
from tests.models import FLAT, flat, gradient_error, gradients, padded, supervised, tiny, token_rows
from tunesmith.data.batches import Batch, documents_of
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.model.attention import document_map, use_documents
from tunesmith.model.head import answer_objectives
from tunesmith.types import Example

PREFIX = token_rows(7, seed=5)[0]["input_ids"]
OTHER = token_rows(5, seed=6)[0]["input_ids"]


def rows(train_on_prefix: bool) -> list[dict[str, Any]]:
    made = []
    for front, row in zip((PREFIX, OTHER, PREFIX, PREFIX, OTHER), token_rows(4, 6, 3, 1, 2, seed=7), strict=True):
        labels = [*(front if train_on_prefix else [-100] * len(front)), *row["input_ids"]]
        made.append({"input_ids": [*front, *row["input_ids"]], "labels": labels})
    weights = [0.5 + i for i in range(len(made[0]["labels"]))]
    made[0]["weights"] = weights
    beginning = {name: values[:-1] for name, values in made[2].items()}
    return [*made, made[1], beginning, *token_rows(5, seed=8)]  # a copy, and what another begins with


@pytest.mark.parametrize("train_on_prefix", [True, False], ids=["all", "completion"])
@pytest.mark.parametrize("name", FLAT)
def test_loss_and_gradients_are_those_without_sharing(name: str, train_on_prefix: bool) -> None:
    model = tiny(name)  # some have windows shorter than the prefix
    answer_objectives(model)
    use_documents(model)
    outcomes = []
    for share in (False, True):
        batch = flat(rows(train_on_prefix), share_prefix=share)
        assert (batch.parents is not None) is share
        result = supervised(model, batch)
        result.loss.backward()
        outcomes.append((result, gradients(model)))
    (apart, expected), (together, found) = outcomes
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.nll, apart.nll, rtol=1e-4, atol=1e-5)
    assert gradient_error(found, expected) < 1e-4


# A conversation whose turns history renders otherwise

TOKENIZER = words("qwen3", "<|im_end|>")


@cache
def documents(*, share: bool, weighted: bool = False, scale: int = 1) -> tuple[Example, ...]:
    """A conversation of six turns: as one example, or as its documents. A question has 6 words, reasoning 30 and an
    answer 12, each times `scale`."""
    random = Random(3)

    def say(count: int) -> str:
        return " ".join(random.choice(["Hi", "Yes", "No", "Why", "Because", "Well"]) for _ in range(count * scale))

    turns = [system(say(8))]
    for number in range(6):
        weight = {"weight": 0.5 + number} if weighted else {}
        turns += [user(say(6)), assistant(say(12), reasoning_content=say(30), **weight)]
    encoder = Encoder(TOKENIZER, EncodeOptions(train_on="assistant", max_length=None, share=share))
    return tuple(encoder.encode([("row 0", conversation(turns))], Counts()))


def row(example: Example) -> dict[str, Any]:
    lengths, parents = example.parts or (None, None)
    found = {"input_ids": example.input_ids, "labels": example.labels, "weights": example.weights}
    return {**found, "seq_lengths": lengths, "parents": parents}


def outcome(model: Any, *batches: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the losses of batches, and its gradients."""
    loss = sum(supervised(model, batch).loss for batch in batches)
    torch.as_tensor(loss).backward()
    return float(torch.as_tensor(loss).detach()), gradients(model)


@pytest.mark.parametrize(("checkpointing", "weighted"), [(False, False), (True, True)], ids=["plain", "weights"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt_neo"])
def test_a_conversation_is_trained_as_its_documents_are(name: str, checkpointing: bool, weighted: bool) -> None:
    """In one flat row that computes what they share once, in padded rows, and document by document."""
    (tree,), apart = documents(share=True, weighted=weighted), documents(share=False, weighted=weighted)
    assert len(apart) == 6
    model: Any = tiny(name, len(TOKENIZER), max_position_embeddings=1024)
    answer_objectives(model)
    if name != "gpt_neo":
        use_documents(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, gradient = outcome(model, *(padded([row(document)]) for document in apart))
    ways = [padded([row(tree)]), padded([*map(row, apart)])]
    if name != "gpt_neo":
        ways += [flat([row(tree)]), flat([*map(row, apart)]), flat([*map(row, apart)], share_prefix=True)]
        assert ways[2].computed_tokens == ways[4].computed_tokens < 0.6 * ways[3].computed_tokens
    for batch in ways:
        assert float(batch.weight) == sum(float(padded([row(document)]).weight) for document in apart)
        found, own = outcome(model, batch)
        assert found == pytest.approx(expected, rel=1e-5)
        assert gradient_error(own, gradient) < 1e-4


def test_a_conversation_with_reasoning_costs_little_more_than_its_tokens_once() -> None:
    (tree,), apart = documents(share=True, scale=10), documents(share=False, scale=10)
    # The last document, and the reasoning of those before it, which it leaves out: the conversation once.
    first = [[token for token, label in zip(d.input_ids, d.labels, strict=True) if label != -100] for d in apart[:-1]]
    answers = [len(ids) - ids.index(TOKENIZER.convert_tokens_to_ids("</think>")) for ids in first]
    once = len(apart[-1].input_ids) + sum(len(ids) - answer for ids, answer in zip(first, answers, strict=True))
    assert flat([row(tree)]).computed_tokens == len(tree.input_ids) < 1.3 * once
    assert sum(len(document.input_ids) for document in apart) > 2 * once


def test_trees_that_begin_alike_are_computed_as_one_and_are_exact() -> None:
    """Conversations of several documents, and texts, under one system prompt and one of two sets of tools: in float64,
    their losses and gradients are those of their documents one by one."""
    (conversation_of_six,) = documents(share=True, weighted=True)
    prompt, tools = token_rows(20, 12, seed=11)
    examples = [row(conversation_of_six)]
    for kind in (0, 1):
        front = [*prompt["input_ids"], *(token + kind for token in tools["input_ids"])]
        for own in token_rows(6, 5, 1, seed=12 + kind):
            ids = [*front, *own["input_ids"]]
            labels = [*[-100] * 30, *ids[30:]]  # the last tokens of what is shared are supervised in each
            examples.append({"input_ids": ids, "labels": labels, "weights": [0.5 + i / 7 for i in range(len(ids))]})
        lengths, parents = [len(front), 9, 3, 4], [-1, 0, 1, 0]
        ids = [*front, *(token + kind for token in token_rows(16, seed=15)[0]["input_ids"])]
        examples.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths, "parents": parents})
    model: Any = tiny("gpt2", max(len(TOKENIZER), 200), max_position_embeddings=1024).double()
    answer_objectives(model)
    use_documents(model)
    one_by_one = [padded([row(document)]) for example in examples for (document,) in documents_of(example)]
    expected, gradient = outcome(model, *one_by_one)
    together = flat(examples, share_prefix=True)
    assert together.parents is not None
    assert together.places is not None
    depth = {-1: 0}
    for segment, parent in enumerate(together.parents):
        depth[segment] = depth[parent] + 1
    assert max(depth.values()) >= 4
    assert together.computed_tokens < 0.9 * flat(examples).computed_tokens
    assert float(together.weight) == pytest.approx(sum(float(batch.weight) for batch in one_by_one))
    found, own_gradient = outcome(model, together)
    assert found == pytest.approx(expected, rel=1e-6)
    assert gradient_error(own_gradient, gradient) < 1e-6
    # The head sums in float32; hidden states, and gradients of theirs, are in float64 throughout.
    layers = model.transformer
    rows_of_each = [torch.tensor([document.input_ids]) for document in together.documents]
    apart = torch.cat([layers(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in rows_of_each])
    mask = document_map(together.lengths or (), together.parents)
    once = layers(input_ids=together.input_ids, position_ids=together.position_ids, attention_mask=mask)
    hidden = once.last_hidden_state[0][together.places]
    torch.testing.assert_close(hidden, apart, rtol=1e-10, atol=1e-12)
    weights = torch.arange(hidden.numel()).view_as(hidden).sin().double()
    outcomes = []
    for states in (hidden, apart):
        (states * weights).sum().backward()
        outcomes.append(gradients(model))
    assert gradient_error(*outcomes) < 1e-10
