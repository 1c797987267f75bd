"""The model that a preference is measured against: what training begins with, or one that is given.

Its weights are there already in most runs, so it costs little memory: with new adapters, it is the model with these
off; with adapters that are trained further, or all weights, it is the model with the values that its trained weights
began with; and where its log-probabilities are computed before training, it is not there at all.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.data.arrow import list_array
from tunesmith.data.batches import Batch, Row, token_places
from tunesmith.data.cache import Store, fingerprint
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import CHANGE_THE_BASE, Model, base_model
from tunesmith.model.head import in_evaluation
from tunesmith.model.load import holds_adapters, load_adapted, load_model
from tunesmith.settings.config import Config
from tunesmith.train.identity import content_digest
from tunesmith.train.setup import ready_for_batches
from tunesmith.train.sharding import exchange
from tunesmith.types import IGNORE_INDEX

logger = logging.getLogger(__name__)
COLUMN = "reference"
"""Of a prepared data set: the log-probability of each scored token, 0 elsewhere."""
PIECE = 64 * 2**20
"""Bytes of a weight that are hashed at a time."""


class Reference(Protocol):
    """Where the reference's weights are."""

    def acting(self, model: nn.Module) -> Any:
        """A context with what answers as the reference: `model`, which is trained, or another one."""


class AsItIs:
    """The model itself, while it is still what training begins with."""

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with in_evaluation(model):
            yield model


class AdaptersOff:
    """The model without its adapters, which start as if they were not there."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with in_evaluation(self._model), self._model.disable_adapter(), _fresh_casts():
            yield model


class StartingWeights:
    """The model with the values that its trained weights have now. While it acts as the reference, they change places
    with those that are trained."""

    def __init__(self, model: Model) -> None:
        self._model = model
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._kept = {name: weight.detach().clone() for name, weight in trained.items()}

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        exchange(self._model, self._kept)
        try:
            with in_evaluation(self._model), _fresh_casts():
                yield model
        finally:
            exchange(self._model, self._kept)


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Autocast keeps weights in the precision that it has cast them to: not from what acts here to what is trained."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class GivenModel:
    """A model of the user's, which is not trained."""

    def __init__(self, model: Model) -> None:
        self.model = model.requires_grad_(False).eval()

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self.model


def given_reference(given: str | Model, model: Model, args: Config, *, flat: bool) -> GivenModel:
    """A model of the user's, loaded, and ready for the batches of the `model` that is trained: `flat` ones, or padded.

    Raises TunesmithError for the model itself, and for one that can't take the same batches.
    """
    if given is model:
        raise TunesmithError("ref_model is the model that is trained, and would change with it; leave it out")
    if isinstance(given, str):
        load: Callable[..., Model] = load_adapted if holds_adapters(given) else load_model
        init = {name: value for name, value in dict(args.model_init_kwargs or {}).items() if name == "dtype"}  # type: ignore[arg-type]
        given = load(given, trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle, **init)
    if ready_for_batches(given, flat=flat) != flat:
        raise TunesmithError("ref_model can't take batches without padding; write padding_free: false")
    return GivenModel(given.to(args.device))  # type: ignore[arg-type]


def starts_as_base(model: Model) -> bool:
    """Whether the adapters of `model` change nothing before the first step, as new ones do: their factor B is 0."""
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return False
    config: Any = model.active_peft_config
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or config.modules_to_save:
        return False
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(CHANGE_THE_BASE):
        return False
    adapted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    factors = [weight for name, weight in adapted.items() if ".lora_B" in name or ".lora_embedding_B" in name]
    return all(".lora_" in name for name in adapted) and not any(bool(weight.any()) for weight in factors)


def reference_of(model: Model) -> Reference:
    """The model as it is now, as a reference that stays."""
    if isinstance(model, PeftModel) and starts_as_base(model):
        return AdaptersOff(model)
    return StartingWeights(model)


# Computed once, before training


def weights_digest(model: Model) -> str:
    """A digest of all weights of `model`, adapters among them, and of what its configuration says."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(base_model(model).config.to_json_string().encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().contiguous().view(-1).view(torch.uint8) if weight.numel() else weight
        digest.update(f"{name} {weight.dtype} {list(weight.shape)} ".encode())
        for start in range(0, flat.numel(), PIECE):
            digest.update(flat[start : start + PIECE].cpu().numpy().tobytes())
    return digest.hexdigest()


def with_reference(
    dataset: Dataset, key: Sequence[str], batch_size: int, score: Callable[[list[Row]], list[Tensor]]
) -> Dataset:
    """`dataset` with the column `COLUMN`, from the cache where the same model has scored the same rows before.

    `key` stands for the model. `score` gives the log-probabilities of the scored tokens of each document of some rows.
    """
    store, name = Store(), fingerprint("reference", list(key), content_digest(dataset))
    found = store.find(name)
    if found is None:
        found = store.write(name, _tables(dataset, batch_size, score), lambda _: {})
    else:
        logger.info("What the reference says of %d rows was in the cache.", len(dataset))
    table = dataset.data.table
    if dataset._indices is not None:  # a shuffle or a mixture is a list of places in the table
        table = table.take(pa.array(dataset._indices.column(0).to_numpy()))
    return Dataset(InMemoryTable(table.append_column(COLUMN, found[0].data.table.column(COLUMN))))


def _tables(dataset: Dataset, batch_size: int, score: Callable[[list[Row]], list[Tensor]]) -> Iterator[pa.Table]:
    plain = dataset.with_format(None)
    for start in range(0, len(plain), batch_size):
        rows = [plain[i] for i in range(start, min(start + batch_size, len(plain)))]
        values = iter(score(cast(list[Row], rows)))
        filled = [_by_token(row, values) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in filled])])
        yield pa.table({COLUMN: list_array(offsets, np.concatenate(filled).astype(np.float32))})


def _by_token(row: Row, values: Iterator[Tensor]) -> Any:
    """(T,) The values of each document's scored tokens where they are in a row."""
    labels, filled = row["labels"], np.zeros(len(row["input_ids"]), np.float32)
    for places in token_places(row):
        scored = [place for place in places[1:] if labels[place] != IGNORE_INDEX]
        filled[scored] = next(values).float().cpu().numpy()
    return filled


def kept_reference(batch: Batch) -> list[Tensor] | None:
    """What the rows of a batch have of the reference: of each document, the log-probabilities of its scored tokens;
    None where any has none."""
    documents = batch.documents
    if not documents or any(example.reference is None for example in documents):
        return None
    kept = []
    for example in documents:
        assert example.reference is not None
        scored = [i for i, label in enumerate(example.labels) if i and label != IGNORE_INDEX]
        kept.append(torch.tensor([example.reference[i] for i in scored], dtype=torch.float32))
    return kept


def check_sharded(args: Any) -> None:
    """Raises TunesmithError where weights are shared out over processes and can't change places."""
    if args.deepspeed:
        raise TunesmithError(
            "deepspeed shares weights out over processes, so that the model can't take back the values that it began "
            "with; write precompute_ref_log_probs: true, or train LoRA adapters"
        )
