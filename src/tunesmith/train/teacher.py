"""The teacher of a distillation: loaded and compared with its student, and what it says of the tokens of a batch.

Its whole distribution is computed with each batch; or its likeliest tokens once, before training, and kept in the
cache, so that the teacher itself is needed no more.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.data.batches import Batch, Collator, Targets
from tunesmith.data.cache import Store, fingerprint
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model, has_virtual_tokens
from tunesmith.model.head import Predictions
from tunesmith.model.load import holds_adapters, load_adapted, load_model, load_tokenizer
from tunesmith.model.precision import compute_dtype
from tunesmith.model.quantize import bits_of
from tunesmith.objectives.distillation import TopLogProbs
from tunesmith.settings.distillation import DistillationConfig
from tunesmith.train.identity import content_digest
from tunesmith.train.setup import faster_layers, ready_for_batches
from tunesmith.types import Example

logger = logging.getLogger(__name__)
SAME_VOCABULARY = "take a teacher of the student's family, whose tokenizer gives all tokens the same ids"


def loaded_teacher(given: str | Model, args: DistillationConfig) -> Model:
    """The teacher, frozen and in evaluation mode; a name is loaded in the precision that is computed in."""
    init: dict[str, Any] = dict(args.teacher_model_init_kwargs or {})  # type: ignore[arg-type]
    if args.teacher_model_revision is not None:
        init["revision"] = args.teacher_model_revision
    if isinstance(given, str):
        load: Callable[..., Model] = load_adapted if holds_adapters(given) else load_model
        init.setdefault("dtype", compute_dtype(args))
        given = load(given, trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle, **init)
    elif init:
        raise TunesmithError(
            f"{' and '.join(init)}: arguments for a teacher given by name, and this one is loaded already; leave "
            "teacher_model_init_kwargs and teacher_model_revision out"
        )
    if has_virtual_tokens(given):
        raise TunesmithError("teacher_model has virtual tokens, which shift its positions; give one without")
    return given.requires_grad_(False).eval()


def ready_teacher(teacher: Model, args: DistillationConfig, *, flat: bool) -> Model:
    """`teacher` on the run's device, answering objectives on batches that are `flat` or padded."""
    if ready_for_batches(teacher, flat=flat) != flat:
        raise TunesmithError("teacher_model can't take batches without padding; write padding_free: false")
    faster_layers(teacher, args)
    # Quantized weights are where they were loaded to.
    return teacher if bits_of(base_model(teacher)) else teacher.to(args.device)  # type: ignore[arg-type]


# The vocabulary


def check_vocabulary(
    teacher: str | Model,
    student: Model,
    tokenizer: PreTrainedTokenizerBase,
    args: DistillationConfig,
    used: Collection[int] | None,
) -> None:
    """Raises TunesmithError for a teacher whose tokens have other ids than the student's.

    Added tokens, such as those that a template reserves, may differ where the data uses none of them: `used` are its
    ids, None where nobody knows them. A loaded teacher that does not say where it comes from must have as many
    embeddings.
    """
    name = str((teacher if isinstance(teacher, str) else base_model(teacher).config.name_or_path) or "")
    if isinstance(teacher, str) or (name and Path(name).is_dir()):
        theirs = load_tokenizer(name, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code)
        _compare(theirs, tokenizer, name, used)
        return
    ours, others = (rows_of(model) for model in (student, teacher))
    if ours != others:
        raise TunesmithError(
            f"teacher_model has {others} embeddings and the student {ours}, and it does not say where its tokenizer "
            f"is, to compare the vocabularies; give it by name, or {SAME_VOCABULARY}"
        )


def _compare(
    theirs: PreTrainedTokenizerBase,
    ours: PreTrainedTokenizerBase,
    name: str,
    used: Collection[int] | None,
) -> None:
    tokens = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (theirs, ours)]
    differing = sorted(i for i in tokens[0].keys() | tokens[1].keys() if tokens[0].get(i) != tokens[1].get(i))
    if not differing:
        return
    added = theirs.added_tokens_decoder.keys() | ours.added_tokens_decoder.keys()
    wrong = [i for i in differing if i not in added or used is None or i in used]
    if wrong:
        shown = ", ".join(f"{i} is {tokens[0].get(i)!r} and {tokens[1].get(i)!r}" for i in wrong[:3])
        raise TunesmithError(
            f"teacher {name} has another vocabulary than the student: {len(wrong):,} ids differ ({shown}), so that "
            f"their predictions can't be compared; {SAME_VOCABULARY}"
        )
    logger.info("%d added tokens differ between teacher and student; the data has none of them.", len(differing))


def rows_of(model: Model) -> int:
    """V, padding of the embeddings included."""
    head: Any = base_model(model).get_output_embeddings()
    return 0 if head is None else int(head.weight.shape[0])


# What it says


def predictions_of(teacher: Model, batch: Batch, targets: Targets) -> Predictions:
    """What the teacher predicts at the targets of a batch, not yet in numbers."""
    found: Predictions = teacher(**batch.inputs(), targets=targets, objective=lambda said: said).outcome
    return found


class KeptTeacher:
    """What a teacher says of its `count` likeliest tokens, by document: found again by the document's tokens and
    labels, whatever it is packed, mixed or batched with."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._places: dict[bytes, tuple[Any, int]] = {}

    def add(
        self,
        dataset: Dataset,
        key: Sequence[Any],
        collator: Collator,
        batch_size: int,
        score: Callable[[Batch], TopLogProbs],
    ) -> None:
        """Take in all documents of `dataset`, from the cache where the same teacher has scored the same rows before.

        `key` stands for the teacher, and for what of it is kept. `score` is asked for batches of `batch_size` rows.
        """
        store, name = Store(), fingerprint("teacher", list(key), self._count, content_digest(dataset))
        kept = store.find(name)
        if kept is None:
            kept = store.write(name, self._tables(dataset, collator, batch_size, score), lambda _: {})
        else:
            logger.info("What the teacher says of %d rows was in the cache.", len(dataset))
        table = kept[0].data.table
        for place, document in enumerate(table.column("document").to_pylist()):
            self._places.setdefault(document, (table, place))

    def of(self, batch: Batch) -> TopLogProbs | None:
        """What was said of the S targets of `batch`; None where any of its documents is not there."""
        tokens, logprobs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for example in batch.documents:
            size = example.target_count
            if batch.blank:  # which counts for nothing
                tokens.append(np.tile(np.arange(self._count, dtype=np.int32), size))
                logprobs.append(np.full(size * (self._count + 1), -np.log(self._count + 1), np.float32))
            elif size:
                if (found := self._places.get(_digest(example))) is None:
                    return None
                table, place = found
                tokens.append(table.column("tokens")[place].values.to_numpy())
                logprobs.append(table.column("logprobs")[place].values.to_numpy())
        device = batch.input_ids.device
        return TopLogProbs(
            tokens=torch.from_numpy(np.concatenate(tokens)).view(-1, self._count).long().to(device),
            logprobs=torch.from_numpy(np.concatenate(logprobs)).view(-1, self._count + 1).to(device),
        )

    def _tables(
        self, dataset: Dataset, collator: Collator, batch_size: int, score: Callable[[Batch], TopLogProbs]
    ) -> Iterator[pa.Table]:
        seen: set[bytes] = set()
        plain = dataset.with_format(None)
        for start in range(0, len(plain), batch_size):
            rows = [plain[i] for i in range(start, min(start + batch_size, len(plain)))]
            batch = collator(rows)
            documents = {_digest(example): i for i, example in enumerate(batch.documents) if example.target_count}
            fresh = {document: i for document, i in documents.items() if document not in seen}
            if start and not fresh:
                continue
            seen.update(fresh)
            said = score(batch)
            tokens, logprobs = batch.by_document(said.tokens), batch.by_document(said.logprobs)
            yield pa.table(
                {
                    "document": pa.array([*fresh], pa.binary()),
                    "tokens": _lists((tokens[i] for i in fresh.values()), pa.int32()),
                    "logprobs": _lists((logprobs[i] for i in fresh.values()), pa.float32()),
                }
            )


def _lists(values: Iterable[Tensor], kind: pa.DataType) -> pa.Array:
    return pa.array([value.flatten().cpu().numpy() for value in values], pa.list_(kind))


def _digest(example: Example) -> bytes:
    content = np.array([example.input_ids, example.labels], np.int64).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()
