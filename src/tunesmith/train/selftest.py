"""Before the first step: does this model give the same losses in our batches as in its own forward, text by text?

A few of the run's own examples go through the model twice, adapters and all: side by side in one batch with the loss
that training takes, and each alone, with the cross-entropy of the logits that the model itself returns. What would
train another model than the one that was loaded (documents that see each other, positions that run on, a head that does
more than its product) shows as a difference, on the user's device and in the run's precision.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from tunesmith.data.batches import FlatCollator, PaddedCollator, groups_of
from tunesmith.errors import TunesmithError
from tunesmith.model import ways
from tunesmith.model.adapters import Model, base_model, has_experts, has_virtual_tokens
from tunesmith.model.attention import PAD_INSTEAD
from tunesmith.model.compile import is_compiled
from tunesmith.model.head import in_evaluation
from tunesmith.model.precision import PrecisionName
from tunesmith.objectives.supervised import supervised_loss
from tunesmith.settings.config import Config
from tunesmith.types import IGNORE_INDEX, Example

logger = logging.getLogger(__name__)
EXAMPLES = 4
LONGEST = 16
"""Tokens that an example is cut to: the test costs much less than a step, and all its documents are in one batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far losses may be apart, in nats or, above a loss of 1, relative to it: the `mean` over all tokens, and the
    typical (median) `token` of each document.

    fp32 sums in another order are some 1e-6 apart. The 8 bits of bfloat16 put single tokens some 1e-2 apart, less in
    the mean; a router that is in doubt between experts may send a token elsewhere, in any precision.
    """

    mean: float
    token: float


EXACT = Tolerance(mean=1e-4, token=1e-4)
ROUNDED = Tolerance(mean=2e-2, token=1e-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentTest:
    """One document: its tokens, its mean loss in our batch and by the model's own forward, and the median difference
    of its tokens, all in nats."""

    tokens: int
    ours: float
    theirs: float
    typical: float

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: {self.ours:.4f}, alone {self.theirs:.4f}, a token typically {self.typical:.1e} off"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """What was found: the mean loss over all tokens, `ours` and `theirs`; `worst` is the largest median difference of a
    token among the documents, relative to the document's loss where that is above 1."""

    ours: float
    theirs: float
    worst: float
    documents: tuple[DocumentTest, ...]

    def __str__(self) -> str:
        return (
            f"Self-test on {len(self.documents)} examples: loss {self.ours:.4f} in one batch, {self.theirs:.4f} one by "
            f"one; a token is typically {self.worst:.1e} off."
        )


def check_before_training(model: Model, dataset: Any, args: Config, *, flat: bool) -> SelfTest | None:
    """The self-test that `args.self_test` asks for, on the first examples of the prepared `dataset`. None: there was
    none, because it is off or, with "auto", can't be done.

    Raises TunesmithError when losses differ, and with "always" when the test can't be done.
    """
    if args.self_test == "off":
        return None
    always = args.self_test == "always"
    reason = _impossible(model, args)
    # The rows of a stream are read once for each look at them, which may be slow, or not repeat.
    examples = [] if reason or not (always or isinstance(dataset, Dataset)) else _examples(dataset)
    if examples:
        assert args.precision != "auto"
        rows = [*chain.from_iterable(examples)]
        groups = [*map(len, examples)]
        found = self_test(model, rows, flat=flat, precision=args.precision, groups=groups, device=args.device)
        logger.info("%s", found)
        return found
    reason = reason or "the training data has no rows with two tokens in `input_ids` to test on"
    if always:
        raise TunesmithError(f"self_test is 'always', but {reason}; set self_test: auto")
    logger.info("No self-test: %s.", reason)
    return None


def _impossible(model: Model, args: Config) -> str:
    if args.deepspeed or any(parameter.is_meta for parameter in model.parameters()):
        return "the model's weights are shared out over processes, and its own forward needs them all"
    if has_virtual_tokens(model):
        return "virtual tokens go in front of each row, and its own logits are taken already"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit products round by what else is in the batch"
    return ""


def _examples(dataset: Any) -> list[list[list[int]]]:
    """Ids of the first documents by groups, at most LONGEST of each; a packed row has several. Of documents that share
    what they begin with, the places around where they part: there, too, they begin alike."""
    rows = (row for row in islice(iter(dataset), EXAMPLES) if row.get("input_ids") is not None)
    groups, left = list[list[list[int]]](), EXAMPLES
    for group in chain.from_iterable(map(groups_of, rows)):
        ids = [example.input_ids for example in group]
        parted = next((place for place, tokens in enumerate(zip(*ids, strict=False)) if len({*tokens}) > 1), 0)
        start = max(0, parted - LONGEST // 2)
        parts = [part for document in ids if len(part := document[start : start + LONGEST]) > 1]
        groups += [parts[:left]] if parts else []
        left -= len(parts)
        if left <= 0:
            break
    return groups


def self_test(
    model: Model,
    rows: Sequence[list[int]],
    *,
    flat: bool,
    precision: PrecisionName,
    groups: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> SelfTest:
    """Compare `model` on `rows`, token ids of at least two each, with itself. It must answer objectives;
    `flat` says whether its batches are flat or padded, `groups` how many of the rows in turn belong together; by
    default each is alone. `device` is where the model computes, by default where its weights are. Modes, gradients and
    random numbers stay as they are. Every process that has a part of the weights must call this.

    Raises TunesmithError with the losses of each document when they differ, and when they are no numbers.
    """
    device = device or base_model(model).device
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with _untouched(model, device), torch.autocast(device.type, dtype=low, enabled=low is not None):
        with _ways(other=False):
            alone = [_alone(model, row, device) for row in rows]
        _refuse_no_numbers(torch.cat(alone), model)
        with _compiled_layers_at_work(model), _ways(other=True):
            loss, together = _together(model, rows, groups or [1] * len(rows), device, flat=flat)
    theirs = torch.cat(alone)
    tests = tuple(_test(mine, own) for mine, own in zip(together.split([len(x) for x in alone]), alone, strict=True))
    found = SelfTest(
        ours=loss / len(theirs),
        theirs=float(theirs.mean()),
        worst=max(test.typical / max(1.0, test.theirs) for test in tests),
        documents=tests,
    )
    _judge(found, model, ROUNDED if low is not None or not _exact(model) else EXACT, flat=flat)
    return found


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    with in_evaluation(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _ways(*, other: bool) -> Iterator[None]:
    """Where ways to compute compete, the plain one computes what is expected and the `other` what is tested: both are
    tested, and none is tried on shapes that the run may not have."""
    before = ways.forced()
    ways.force(other)
    try:
        yield
    finally:
        ways.force(before)


@contextmanager
def _compiled_layers_at_work(model: Model) -> Iterator[None]:
    """Compiled layers run in training only: put them into it, and none of what is in them. Models with a dropout that a
    layer applies itself stay in evaluation, where their layers are as they were."""
    settings = base_model(model).config.get_text_config().to_dict()
    drops = any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings.items())
    layers = [] if drops else [module for module in model.modules() if is_compiled(module)]
    for layer in layers:
        layer.training = True
    with torch.set_grad_enabled(bool(layers)):
        yield


def _alone(model: Model, row: list[int], device: torch.device) -> Tensor:
    """Negative log-likelihoods (T - 1,) of a row by the model's own forward."""
    ids = torch.tensor([row], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
    return F.cross_entropy(logits, ids[0, 1:].cpu(), reduction="none")


def _together(
    model: Model, rows: Sequence[list[int]], sizes: Sequence[int], device: torch.device, *, flat: bool
) -> tuple[float, Tensor]:
    """The loss, a sum, and the negative log-likelihoods of all rows, one after the other, as in training: groups of
    these `sizes` share what they begin with."""
    examples = iter([Example(input_ids=row, labels=[IGNORE_INDEX, *row[1:]]) for row in rows])
    groups = [tuple(islice(examples, size)) for size in sizes]
    batch = (FlatCollator() if flat else PaddedCollator()).batch(groups).to(device)
    result = model(**batch.inputs(), targets=batch.targets(), objective=supervised_loss).outcome
    return float(result.loss.detach()), result.nll.float().cpu()


def _test(ours: Tensor, theirs: Tensor) -> DocumentTest:
    return DocumentTest(
        tokens=len(ours) + 1,
        ours=float(ours.mean()),
        theirs=float(theirs.mean()),
        typical=float((ours - theirs).abs().median()),
    )


def _exact(model: Model) -> bool:
    """Whether all computation is in full fp32, and no token can be sent elsewhere."""
    return (
        all(p.dtype == torch.float32 for p in model.parameters())
        and torch.get_float32_matmul_precision() == "highest"
        and not has_experts(model)
    )


def _refuse_no_numbers(losses: Tensor, model: Model) -> None:
    if not losses.isfinite().all():
        raise TunesmithError(
            f"self-test: {type(base_model(model)).__name__} gives a loss of {float(losses.mean())} on its first "
            "examples, in its own forward. Its weights are damaged, or its numbers too large for this precision: set "
            "precision: fp32, or bf16 in place of fp16"
        )


def _judge(found: SelfTest, model: Model, tolerance: Tolerance, *, flat: bool) -> None:
    name = type(base_model(model)).__name__
    difference = abs(found.ours - found.theirs) / max(1.0, found.theirs)
    if difference <= tolerance.mean and found.worst <= tolerance.token:
        return
    lines = "".join(f"\n  {test}" for test in found.documents)
    remedy = f"{PAD_INSTEAD}, and report it" if flat else "report it, with the name of the model"
    raise TunesmithError(
        f"self-test: {name} gives other losses in this run's batches than text by text in its own forward, so another "
        f"model would be trained: {found.ours:.4f} and {found.theirs:.4f} on {len(found.documents)} examples (they may "
        f"be {tolerance.mean:g} apart, a typical token {tolerance.token:g}); {remedy}{lines}"
    )
