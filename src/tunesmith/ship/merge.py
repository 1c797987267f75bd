"""Adapters merged into their base model: a folder that loads without `peft`.

The base model is read, merged and written a shard at a time, so that a model merges on a machine that could not load
it. What was written is loaded and compared with the adapters on the base model before it gets its name.

Shapes: T tokens of a prompt and its answer, V vocabulary.
"""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from tunesmith.data.prompts import prompt_ids
from tunesmith.errors import TunesmithError
from tunesmith.model.devices import here
from tunesmith.model.generate import stop_ids, writable
from tunesmith.model.load import (
    ADAPTERS,
    CONFIG,
    base_of,
    load_classifier,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from tunesmith.model.load import run_folder as newest
from tunesmith.model.precision import DTYPES, PrecisionName
from tunesmith.runs.files import follow_umask
from tunesmith.settings.coerce import byte_count
from tunesmith.ship.adapted import (
    AdaptedModel,
    MergedWeights,
    adapter_settings,
    empty_model,
    explained,
    grow,
    growing_names,
    rows_in_adapters,
)
from tunesmith.ship.shards import (
    LoadedWeights,
    NamesInFiles,
    Piece,
    Weights,
    check_room,
    names_in_files,
    shared_names,
    stored_weights,
    workplace,
    write_shards,
)

Progress = Callable[[str], None]
SPARE = 64 * 2**20
"""Bytes for the tokenizer and the settings."""
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short e-mail that thanks a customer for an order.",
)
TOKENS = 32
"""The longest answer to a prompt."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference of logits, relative to the largest logit, that rounding the merged weights may make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How to merge.

    `dtype` None keeps the format of the base model's files. `max_shard_size` ("2GB", "500MB") is the size of the files,
    and about the memory that is needed. After merging, the answers to `prompts` (None: a few built in) are compared;
    `tolerance` is the largest difference of logits relative to the largest logit, None one for the format. `check`
    False leaves that out. `adapter` names a subfolder of the run, for those that were not saved as default; `base` the
    base model, where it is no longer what the adapters call it.
    """

    dtype: PrecisionName | None = None
    max_shard_size: str = "2GB"
    tolerance: float | None = None
    prompts: Sequence[str] | None = None
    check: bool = True
    adapter: str | None = None
    base: str | None = None
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
class Drift:
    """How far a model is from the one that it should equal.

    `absolute` is the largest difference of any logit, `relative` the same over the largest logit; `equal` of `tokens`
    likeliest next tokens are the same, in the answers that the other model gives, and `ties` of the others as likely.
    Of classifiers, logits are scores, and `tokens` is 0.
    """

    absolute: float
    relative: float
    tolerance: float
    equal: int
    ties: int
    tokens: int

    @property
    def within(self) -> bool:
        return self.relative <= self.tolerance  # not so for NaN

    def __str__(self) -> str:
        what = "logit" if self.tokens else "score"
        tokens = f", {self.equal} of {self.tokens} greedy tokens equal" if self.tokens else ""
        return (
            f"largest difference of {what}s {self.absolute:.3g} ({self.relative:.2g} of the largest {what}, tolerance "
            f"{self.tolerance:.2g}){tokens}"
        )


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
    """A run and its base model, read as far as is needed to know what will be written. `rows` are those of the
    embeddings in training; `loaded` is the base model in memory, if its files can't be merged a shard at a time."""

    folder: Path
    base: str
    revision: dict[str, Any]
    classifier: bool
    rows: int
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    adapted: AdaptedModel
    merged: MergedWeights
    loaded: LoadedWeights | None
    names: NamesInFiles
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
    target = Path(output).expanduser().resolve()
    if target.is_dir() and any(target.iterdir()):
        raise TunesmithError(f"{target} exists and has files in it; name a folder that doesn't exist yet")
    if target.exists() and not target.is_dir():
        raise TunesmithError(f"{target} is a file; name a folder that doesn't exist yet")
    job = _prepare(_adapter_folder(Path(run).expanduser(), options.adapter), options, progress)
    size = sum(piece.size for piece in job.merged.pieces)
    check_room(target, size + SPARE)
    if job.names.obstacle is not None:
        say(f"The whole base model is loaded: {job.names.obstacle}.")
    say(f"Merging the adapters of {len(job.adapted.layers)} layers with the weights of {job.base} ...")
    with workplace(target) as folder:
        files = _write(job, folder, options)
        follow_umask(folder)
        drift = None
        if options.check:
            say("Comparing what was written with the adapters on their base model ...")
            drift = _compare(job, folder, options)
        if target.exists():
            target.rmdir()  # it is empty
        folder.rename(target)
    return MergeReport(
        folder=target,
        base=job.base,
        kind=PeftType(job.adapted.settings.peft_type).value,
        layers=len(job.adapted.layers),
        files=files,
        size=size,
        dtype=job.dtype,
        untied=job.merged.untied,
        in_memory=job.names.obstacle,
        drift=drift,
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
    base, revision = (options.base, {}) if options.base is not None else base_of(str(folder))
    try:
        path = resolve_model(base, progress)
    except TunesmithError as error:
        raise TunesmithError(f"the base model of {folder}: {error}; name it with base (--base)") from error
    trust = options.trust_remote_code
    config = load_config(base, trust_remote_code=trust, **revision)
    _refuse_quantized(config, base, folder)
    classifier = settings.task_type == "SEQ_CLS"
    if classifier:
        config.num_labels = 1
    beside = next((place for place in (folder, folder.parent) if (place / "tokenizer_config.json").is_file()), None)
    tokenizer = load_tokenizer(str(beside or path), trust_remote_code=trust, **({} if beside else revision))
    model = empty_model(config, classifier=classifier, trust_remote_code=trust)
    rows = rows_in_adapters(folder, model) or len(tokenizer)
    grow(model, rows)
    with explained(f"the weights of the base model {base} can't be read"):
        stored = stored_weights(path, revision.get("revision"))
        names = names_in_files(model, stored.names(), new_head=classifier)
    shared, growing = shared_names(model), growing_names(model)
    loaded: LoadedWeights | None = None
    weights: Weights = stored.under(names.files)
    if names.obstacle is not None:
        load = load_classifier if classifier else load_model
        whole = load(base, dtype="auto", trust_remote_code=trust, **revision).requires_grad_(False)
        grow(whole, rows)
        loaded = weights = LoadedWeights(whole)
    adapted = AdaptedModel(model, folder, settings)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    merged = MergedWeights(adapted, weights, dtype=dtype, shared=shared, growing=growing)
    return _Job(
        folder=folder,
        base=base,
        revision=revision,
        classifier=classifier,
        rows=rows,
        tokenizer=tokenizer,
        model=model if loaded is None else whole,
        adapted=adapted,
        merged=merged,
        loaded=loaded,
        names=names,
        dtype=merged.dtype(growing[0]),
    )


def _refuse_quantized(config: PreTrainedConfig, base: str, folder: Path) -> None:
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise TunesmithError(
        f"the base model {base} is quantized ({getattr(method, 'value', method)}), and adapters are merged into 16- or "
        "32-bit weights: name the original model with base (--base), or as base_model_name_or_path in "
        f"{folder / ADAPTERS}"
    )


def _write(job: _Job, folder: Path, options: MergeOptions) -> int:
    """Writes the model, its settings and its tokenizer; returns the number of files with weights."""
    _settle(job)
    if job.loaded is None:

        def tensors(piece: Piece) -> dict[str, Tensor]:
            return {job.names.written.get(name, name): tensor for name, tensor in job.merged.tensors(piece).items()}

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
    generation = getattr(job.model, "generation_config", None)  # which classifiers lack
    if generation is not None:
        generation.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    if getattr(job.model.config, "auto_map", None):
        for code in Path(resolve_model(job.base)).glob("*.py"):  # of a folder; the hub's are named in full
            shutil.copy(code, folder)
    return files


def _settle(job: _Job) -> None:
    """Adapts the settings of the base model: format, tied embeddings, the tokens that end and pad a text."""
    model, tokenizer = job.model, job.tokenizer
    model.config.architectures = [type(model).__name__]
    for config in (model.config, model.config.get_text_config()):
        config.dtype = job.dtype
        if job.merged.untied:
            config.tie_word_embeddings = False
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, role) is not None:
                setattr(config, role, getattr(tokenizer, role))
    if job.classifier:
        return
    path = cached_file(
        resolve_model(job.base),
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        **job.revision,
    )
    if path is not None:
        model.generation_config = GenerationConfig.from_pretrained(Path(path).parent)
    if model.generation_config is not None:
        model.generation_config = writable(model.generation_config)
        stops = stop_ids(model, tokenizer)
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else (stops or None)
        if tokenizer.pad_token_id is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id


# Whether the merged model says the same


def _compare(job: _Job, folder: Path, options: MergeOptions) -> Drift:
    device = here()
    dtype = torch.float32 if device.type == "cpu" else job.dtype  # which every CPU computes in natively
    tolerance = TOLERANCES[job.dtype] if options.tolerance is None else options.tolerance
    trust = options.trust_remote_code
    try:
        load = load_classifier if job.classifier else load_model
        base = load(job.base, dtype=dtype, trust_remote_code=trust, **job.revision).requires_grad_(False)
        grow(base, job.rows)
        with explained(f"the adapters in {job.folder} could not be loaded"):
            before: Any = PeftModel.from_pretrained(base, str(job.folder)).to(device).eval()
        prompts = options.prompts or PROMPTS
        expected: Any = (scores_of if job.classifier else traces)(before, job.tokenizer, prompts)
        del before, base
        gc.collect()
        after: Any = load(str(folder), dtype=dtype, trust_remote_code=trust)
        after.to(device).eval()
        if job.classifier:
            drift = _drift_of_scores(scores_of(after, job.tokenizer, prompts), expected, tolerance)
        else:
            drift = drift_of([logits_of(after, trace.ids) for trace in expected], expected, tolerance)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TunesmithError(
            "there is not enough memory to load and compare the models; leave the check out"
        ) from error
    if not drift.within:
        raise TunesmithError(
            f"the merged model differs from the adapters on {job.base}: {drift}. Nothing was written; a larger "
            "tolerance, or dtype fp32, which rounds less, would let it pass"
        )
    return drift


@torch.inference_mode()
def scores_of(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """(D,) What a classifier says of each text as a user's message, or as it is where there is no chat template."""
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    rows = [torch.tensor([row], device=model.device) for row in ids]
    return torch.cat([model(input_ids=row).logits[0].float().cpu() for row in rows])


def _drift_of_scores(found: Tensor, expected: Tensor, tolerance: float) -> Drift:
    """How far scores are from those expected, relative to the largest of them, or to 1 where all are smaller."""
    absolute = float((found - expected).abs().max())
    relative = absolute / max(1.0, float(expected.abs().max()))
    return Drift(absolute=absolute, relative=relative, tolerance=tolerance, equal=0, ties=0, tokens=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a model says to a prompt: the tokens of both (T), where the answer begins, and the logits (T, V)."""

    ids: tuple[int, ...]
    start: int
    logits: Tensor


@torch.inference_mode()
def traces(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    stop: bool = True,
) -> list[Trace]:
    """What `model` answers to each of `prompts`, greedily, and its logits: at most `tokens`, fewer where it says an end
    token and shall `stop`. Raises TunesmithError for a prompt that has no tokens, or too many."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stops = stop_ids(model, tokenizer) if stop else []
    base.generation_config = GenerationConfig()  # or generate takes a repetition penalty, say, from it
    room = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    answers = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        new = tokens if room is None else min(tokens, room - len(ids))
        if new < 1:
            raise TunesmithError(f"a prompt to compare with has {len(ids)} tokens, and the model has room for {room}")
        ids_BT = torch.tensor([ids], device=base.device)
        settings = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=(stops or [0])[0]
        )
        output = base.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)
        whole = tuple(output[0].tolist())
        answers.append(Trace(ids=whole, start=len(ids), logits=logits_of(model, whole)))
    return answers


def drift_of(
    found: Sequence[Tensor], expected: Sequence[Trace], tolerance: float, *, tie: float | None = None
) -> Drift:
    """How far the logits `found` (T, V) of a model are from those of the one that `expected` was taken of.

    Another next token is a tie where the other model finds its own likelier by no more than `tie` of the largest logit.
    """
    largest = max((trace.logits.abs().max().item() for trace in expected), default=0.0)
    scale = max(largest, 1e-30)
    absolute = 0.0
    equal = ties = tokens = 0
    for logits, trace in zip(found, expected, strict=True):
        width = min(logits.shape[-1], trace.logits.shape[-1])
        difference = (logits[:, :width] - trace.logits[:, :width]).abs().max()
        absolute = float("nan") if difference.isnan() else max(absolute, difference.item())
        answer = slice(trace.start - 1, len(trace.ids) - 1)  # each from the position before it
        own, other = trace.logits[answer].argmax(-1, keepdim=True), logits[answer].argmax(-1, keepdim=True)
        gap = trace.logits[answer].gather(1, own) - trace.logits[answer].gather(1, other.clamp(max=width - 1))
        equal += int((own == other).sum())
        ties += int(((own != other) & (gap / scale <= tie)).sum()) if tie is not None else 0
        tokens += len(own)
    relative = absolute / scale
    return Drift(absolute=absolute, relative=relative, tolerance=tolerance, equal=equal, ties=ties, tokens=tokens)


@torch.inference_mode()
def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """(T, V), in fp32 and main memory."""
    ids_BT = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0].float().cpu()
    return logits
