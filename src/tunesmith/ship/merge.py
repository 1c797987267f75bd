"""Adapters merged into their base model: a folder that loads without `peft`.

The base model is read, merged and written a shard at a time, so that a model merges on a machine that could not load
it. What was written is loaded and compared with the adapters on the base model before it gets its name.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from peft import PeftType
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from tunesmith.errors import TunesmithError
from tunesmith.model.generate import stop_ids
from tunesmith.model.load import ADAPTERS, CONFIG, base_of, load_config, load_model, load_tokenizer, resolve_model
from tunesmith.model.load import run_folder as newest
from tunesmith.model.precision import DTYPES, PrecisionName
from tunesmith.settings.coerce import byte_count
from tunesmith.ship.merge_base import Adapted, adapter_settings, empty_model, explained, rows_in_adapters, shared_names
from tunesmith.ship.merge_check import PROMPTS, TOLERANCES, Drift, Source, compute_in, drift, load_with_adapters, traces
from tunesmith.ship.merge_weights import Merged, grow, growing_names
from tunesmith.ship.names import NamesInFiles, names_in_files
from tunesmith.ship.shards import LoadedWeights, Piece, Weights, stored_weights, write_shards

Progress = Callable[[str], None]
SPARE = 64 * 2**20
"""Bytes for the tokenizer and the settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How to merge.

    `dtype` None keeps the format of the base model's files. `max_shard_size` ("2GB", "500MB") is the size of the files,
    and about the memory that is needed. After merging, the answers to `prompts` (None: a few built in) are compared;
    `tolerance` is the largest difference of logits relative to the largest logit, None one for the format. `check`
    False leaves that out. `adapter` names a subfolder of the run, for those that were not saved as default.
    """

    dtype: PrecisionName | None = None
    max_shard_size: str = "2GB"
    tolerance: float | None = None
    prompts: Sequence[str] | None = None
    check: bool = True
    adapter: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TunesmithError(f"dtype is {self.dtype!r}; write {', '.join(DTYPES)}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise TunesmithError(f"tolerance is {self.tolerance}, a share of the largest logit, such as 0.01")
        if self.prompts is not None and not self.prompts:
            raise TunesmithError("prompts is empty; give at least one, or leave it out")
        self.shard_bytes()

    def shard_bytes(self) -> int:
        try:
            return byte_count(self.max_shard_size)
        except ValueError as error:
            raise TunesmithError(f"max_shard_size {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What was merged and written. `size` is in bytes; `in_memory` says why the whole base model was loaded, if it was;
    `drift` is None where nothing was compared."""

    folder: Path
    base: str
    kind: str
    layers: int
    files: int
    size: int
    dtype: torch.dtype
    untied: bool
    in_memory: str | None
    drift: Drift | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A run and its base model, read as far as is needed to know what will be written."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    adapted: Adapted
    merged: Merged
    loaded: LoadedWeights | None
    names: NamesInFiles
    in_memory: str | None
    dtype: torch.dtype


def merge(
    run: str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges the adapters of `run`, a run's folder or one with its checkpoints, into their base model, and writes
    `output`: the model, its settings, and the run's tokenizer with its chat template.

    Adapters that were trained on a base model in 8 or 4 bits are merged into its original weights. Raises
    TunesmithError for adapters that can't be merged, an `output` that has something in it, a full disk, and a merged
    model that says something else than the adapters; then nothing is left behind.
    """
    options, say = options or MergeOptions(), progress or (lambda text: None)
    target = _free_target(Path(output).expanduser())
    job = _prepare(_adapter_folder(Path(run).expanduser(), options.adapter), options, progress)
    size = sum(piece.size for piece in job.merged.pieces)
    _check_room(target, size)
    if job.in_memory is not None:
        say(f"The whole base model is loaded: {job.in_memory}.")
    say(f"Merging the adapters of {len(job.adapted.layers)} layers with the weights of {job.source.base} ...")
    with _staged(target) as folder:
        files = _write(job, folder, options)
        found = None
        if options.check:
            say("Comparing what was written with the adapters on their base model ...")
            found = _compare(job, folder, options)
    return MergeReport(
        folder=target,
        base=job.source.base,
        kind=PeftType(job.adapted.settings.peft_type).value,
        layers=len(job.adapted.layers),
        files=files,
        size=size,
        dtype=job.dtype,
        untied=job.merged.untied,
        in_memory=job.in_memory,
        drift=found,
    )


def _adapter_folder(run: Path, adapter: str | None) -> Path:
    if not run.is_dir():
        raise TunesmithError(f"there is no folder {run}; give the folder of a run")
    folder = newest(run)
    named = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTERS}"))
    if adapter is not None and adapter != "default":
        if adapter not in named:
            raise TunesmithError(f"{folder} has no adapters named {adapter!r}; it has {', '.join(named) or 'none'}")
        return folder / adapter
    if not (folder / ADAPTERS).is_file():
        if (folder / CONFIG).is_file():
            raise TunesmithError(f"{folder} holds a whole model, without adapters: there is nothing to merge")
        hint = f"; there are adapters named {', '.join(named)}, choose one" if named else ""
        raise TunesmithError(f"{folder} has no {ADAPTERS}{hint or ': the folder of a run with adapters is needed'}")
    return folder


def _prepare(folder: Path, options: MergeOptions, progress: Progress | None) -> _Job:
    settings = adapter_settings(folder)
    base, revision = base_of(str(folder))
    path = resolve_model(base, progress)
    trust = options.trust_remote_code
    config = load_config(base, trust_remote_code=trust, **revision)
    _refuse_quantized(config, base, folder)
    beside = next((place for place in (folder, folder.parent) if (place / "tokenizer_config.json").is_file()), None)
    tokenizer = load_tokenizer(str(beside or path), trust_remote_code=trust, **({} if beside else revision))
    model = empty_model(config, trust_remote_code=trust)
    rows = rows_in_adapters(folder, model) or len(tokenizer)
    grow(model, rows)
    with explained(f"the weights of the base model {base} can't be read"):
        stored = stored_weights(path, revision.get("revision"))
        names, reason = names_in_files(model, list(stored.names()))
    shared, growing = shared_names(model), growing_names(model)
    loaded: LoadedWeights | None = None
    weights: Weights = stored.under(names.files)
    if reason is not None:
        whole = load_model(base, dtype="auto", trust_remote_code=trust, **revision).requires_grad_(False)
        grow(whole, rows)
        loaded = weights = LoadedWeights(whole)
    adapted = Adapted(model, folder, settings)
    wanted = None if options.dtype is None else DTYPES[options.dtype]
    merged = Merged(adapted, weights, dtype=wanted, shared=shared, growing=growing)
    return _Job(
        source=Source(base=base, revision=revision, adapters=folder, rows=rows, trust_remote_code=trust),
        tokenizer=tokenizer,
        model=model if loaded is None else whole,
        adapted=adapted,
        merged=merged,
        loaded=loaded,
        names=names,
        in_memory=reason,
        dtype=merged.dtype(growing[0]),
    )


def _refuse_quantized(config: PreTrainedConfig, base: str, folder: Path) -> None:
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise TunesmithError(
        f"the base model {base} is quantized ({getattr(method, 'value', method)}), and adapters are merged into 16- or "
        f"32-bit weights: write the name of the original model as base_model_name_or_path in {folder / ADAPTERS}"
    )


def _write(job: _Job, folder: Path, options: MergeOptions) -> int:
    """Everything but the comparison; returns the number of files with weights."""
    _settle(job)
    if job.loaded is None:

        def tensors(piece: Piece) -> dict[str, Tensor]:
            return {job.names.kept.get(name, name): tensor for name, tensor in job.merged.tensors(piece).items()}

        files = len(write_shards(folder, job.merged.pieces, tensors, options.shard_bytes()))
        job.model.config.save_pretrained(folder)
    else:
        for piece in job.merged.pieces:
            for name, tensor in job.merged.tensors(piece).items():
                job.loaded.replace(name, tensor)
        if not job.merged.untied:
            job.model.tie_weights()
        job.model.save_pretrained(folder, max_shard_size=options.shard_bytes())
        files = len(list(folder.glob("*.safetensors")))
    generation = job.model.generation_config
    if generation is not None:
        _write_generation(generation, folder)
    job.tokenizer.save_pretrained(folder)
    if getattr(job.model.config, "auto_map", None):
        for code in Path(resolve_model(job.source.base)).glob("*.py"):  # of a folder; the hub's are named in full
            shutil.copy(code, folder)
    return files


def _settle(job: _Job) -> None:
    """Makes the settings of the base model those of the merged one: format, embeddings, what ends and pads a text."""
    model, tokenizer = job.model, job.tokenizer
    model.config.architectures = [type(model).__name__]
    for config in (model.config, model.config.get_text_config()):
        config.dtype = job.dtype
        if job.merged.untied:
            config.tie_word_embeddings = False
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, role) is not None:
                setattr(config, role, getattr(tokenizer, role))
    path = cached_file(
        resolve_model(job.source.base),
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        **job.source.revision,
    )
    if path is not None:
        model.generation_config = GenerationConfig.from_pretrained(Path(path).parent)
    if model.generation_config is not None:
        stops = stop_ids(model, tokenizer)
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else (stops or None)
        if tokenizer.pad_token_id is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id


def _write_generation(generation: GenerationConfig, folder: Path) -> None:
    """As it is in the base model: some that are published have a temperature and no sampling, which `transformers`
    reads, and refuses to write."""
    values: dict[str, Any] = generation.to_diff_dict()
    (folder / GENERATION_CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compare(job: _Job, folder: Path, options: MergeOptions) -> Drift:
    device, dtype = compute_in(job.dtype)
    tolerance = TOLERANCES[job.dtype] if options.tolerance is None else options.tolerance
    try:
        before: Any = load_with_adapters(job.source, dtype).to(device)
        expected = traces(before, job.tokenizer, options.prompts or PROMPTS)
        del before
        gc.collect()
        after: Any = load_model(str(folder), dtype=dtype, trust_remote_code=options.trust_remote_code)
        found = drift(after.to(device).eval(), expected, tolerance)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TunesmithError(
            "there is not enough memory to load and compare the models; leave the check out"
        ) from error
    if not found.within:
        raise TunesmithError(
            f"the merged model differs from the adapters on {job.source.base}: {found}. Nothing was written; a larger "
            "tolerance, or dtype fp32, which rounds less, would let it pass"
        )
    return found


def _free_target(target: Path) -> Path:
    target = target.resolve()
    if target.is_dir() and any(target.iterdir()):
        raise TunesmithError(f"{target} exists and has files in it; name a folder that doesn't exist yet")
    if target.exists() and not target.is_dir():
        raise TunesmithError(f"{target} is a file; name a folder that doesn't exist yet")
    return target


def _check_room(target: Path, size: int) -> None:
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size + SPARE:
        raise TunesmithError(f"the merged model takes {size / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which gets its name at the end; whatever goes wrong, nothing stays."""
    made = [parent for parent in target.parents if not parent.exists()]
    folder = target.parent / f".{target.name}-{uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rmdir()  # it is empty
        folder.rename(target)
    except OSError as error:
        raise TunesmithError(f"{target} can't be written: {error}") from error
    finally:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                if not any(parent.iterdir()):
                    parent.rmdir()
