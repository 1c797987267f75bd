"""What of a run must be as it was for a checkpoint to go on: data, model, and the settings that decide the steps."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from peft import PeftModel

from tunesmith.model.adapters import Model, base_model
from tunesmith.runs.checkpoints import Identity
from tunesmith.runs.record import Origin
from tunesmith.secrets import without_secrets
from tunesmith.settings.config import Config

LOOKED_AT = 64
"""Of a stream, whose content nobody knows before it is read, so many examples stand for all."""
SLICE = 10_000

FREE_PREFIXES = (
    *("eval_", "logging_", "log_", "save_", "hub_", "trackio_", "ddp_", "do_", "dataloader_", "torch_compile"),
    *("gradient_checkpointing", "activation_", "fsdp", "push_to_hub", "include_", "batch_eval", "per_device_eval"),
    "vllm_server",
)
FREE = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "skip_memory_metrics", "local_rank"),
    *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint", "force_resume"),
    *(
        "allow_pickle",
        "on_bad_row",
        "async_save",
        "sample_prompts",
        "enable_jit_checkpoint",
        "load_best_model_at_end",
        "metric_for_best_model",
        "precompute_ref_batch_size",
        "shard",
        "cpu_offload",
        "num_generations_eval",
    ),
    *("greater_is_better", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "label_names"),
    *("use_cpu", "tf32", "full_determinism", "torch_empty_cache_steps", "auto_find_batch_size", "deepspeed"),
    *(
        "dataset_num_proc",
        "self_test",
        "rehearse",
        "max_bad_steps",
        "memory_limit",
        "share_prefix",
        "allow_no_eos",
        "drop_reasoning",
        "trust_remote_code",
        "use_cache",
    ),
    *("bf16", "fp16", "parallelism_config", "liger_kernel_config"),  # the first two say what `precision` says
    *("completion_only_loss", "assistant_only_loss"),  # `train_on`, as it was resolved, is compared
    *("max_steps", "num_train_epochs"),
}
"""Settings that a run may change on its way: they decide where things go, what is shown and how fast it is, but not
what is trained on, nor how. Its length is among them: to train longer is a reason to go on."""
TOKEN_BATCHES = "best-fit decreasing"
"""How batches by tokens are filled: another way makes others, in which a run can't go on."""
DEALT = "by steps"
"""How rows come to processes and, grouped by length, to micro-batches: earlier versions dealt them batch by batch."""
COMPARED = {"dataloader_drop_last"}
COMPUTED = {"reference"}
"""Columns that follow from the others and a model, to rounding."""
DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
"""The settings by which a step is divided into micro-batches."""
FOLLOWS = ("steps_per_generation",)
"""Settings that follow from these and others that are compared."""
VOLATILE_CONFIG = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_commit_hash"),
    "architectures",  # which saving writes into the settings of a model that was made from them
}
VOLATILE_PEFT = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}


def model_origin(model: Model) -> Origin:
    """Where the base model comes from."""
    base = base_model(model)
    name = base.config.name_or_path
    if isinstance(model, PeftModel):
        name = model.active_peft_config.base_model_name_or_path or name
    return Origin.of_model(name) if name else Origin(kind="memory", name=type(base).__name__)


def identity_of(args: Config, dataset: Any, model: Model, processes: int) -> Identity:
    """What is compared on the way: `dataset` as it was prepared, `args`, `model` without its weights."""
    return Identity(data=_data(dataset), settings=_settings(args, processes), model=_model(model))


def content_digest(dataset: Dataset) -> str:
    """A digest of the rows of `dataset` in their order: equal for equal content, however it is stored in chunks.

    Columns of numbers or lists of numbers are read where they are: about a second a gigabyte.
    """
    digest = hashlib.sha256()
    if dataset._indices is not None:
        order: Any = np.ascontiguousarray(dataset._indices.column(0).to_numpy())
        digest.update(order)
    table = dataset.data.table
    for name in sorted({*dataset.column_names} - COMPUTED):
        column = table.column(name)
        digest.update(f"{name} {column.type} {len(column)} ".encode())
        for part in (_numbers(column), _lengths(column)) if _is_plain(column.type) else (_serialized(column),):
            inner = hashlib.sha256()
            for piece in part:
                inner.update(piece)
            digest.update(inner.digest())
    return digest.hexdigest()


def _data(dataset: Any) -> dict[str, Any]:
    if isinstance(dataset, IterableDataset):
        rows = list(islice(iter(dataset.take(LOOKED_AT)), LOOKED_AT))
        text = json.dumps(rows, sort_keys=True, default=str)
        return {f"first {LOOKED_AT} examples of the stream": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return {"examples": len(dataset), "content": content_digest(dataset)}


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _numbers(column: pa.ChunkedArray) -> Iterator[Any]:
    for chunk in column.chunks:
        values = chunk.flatten() if hasattr(chunk, "flatten") and pa.types.is_nested(chunk.type) else chunk
        yield np.ascontiguousarray(values.to_numpy(zero_copy_only=False))


def _lengths(column: pa.ChunkedArray) -> Iterator[Any]:
    """The length of each list, -1 for none; of numbers, whether each is there."""
    for chunk in column.chunks:
        if pa.types.is_nested(chunk.type):
            lengths = pc.list_value_length(chunk).cast(pa.int64()).fill_null(-1)
            yield np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False))
        elif chunk.null_count:
            yield np.ascontiguousarray(chunk.is_null().to_numpy(zero_copy_only=False))


def _serialized(column: pa.ChunkedArray) -> Iterator[Any]:
    for start in range(0, len(column), SLICE):
        rows = column.slice(start, SLICE).to_pylist()
        yield json.dumps(rows, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")


def _settings(args: Config, processes: int) -> dict[str, Any]:
    values = args.to_dict()
    kept = {name: _plain(without_secrets(value)) for name, value in values.items() if _is_compared(name)}
    if args.max_tokens_per_batch is not None:
        kept["token_batches"] = TOKEN_BATCHES
    return kept | {"train_on": args.resolved_train_on, "processes": processes, "dealt": DEALT}


def size_of_step(settings: Mapping[str, Any]) -> int | None:
    """The rows of a step, or its batches by tokens, by the settings of an identity; None where they don't say. A step
    of one size has the same rows however it is divided, unless what does not fill a micro-batch is dropped."""
    if settings.get("dataloader_drop_last") or any(name not in settings for name in DIVISION):
        return None
    rows, accumulation, processes = (int(settings[name]) for name in DIVISION)
    return accumulation * processes * (rows if settings.get("max_tokens_per_batch") is None else 1)


def _is_compared(name: str) -> bool:
    return name in COMPARED or not (name in FREE or name.startswith(FREE_PREFIXES))


def _model(model: Model) -> dict[str, Any]:
    base = base_model(model)
    found = {
        f"config.{name}": _plain(value) for name, value in base.config.to_dict().items() if name not in VOLATILE_CONFIG
    }
    if isinstance(model, PeftModel):
        settings = model.active_peft_config.to_dict()
        found |= {f"adapters.{key}": _plain(value) for key, value in settings.items() if key not in VOLATILE_PEFT}
    trained = [(name, list(weight.shape)) for name, weight in model.named_parameters() if weight.requires_grad]
    return found | {
        "name": model_origin(model).name,
        "revision": getattr(base.config, "_commit_hash", None),
        "trained weights": len(trained),
        "their names and shapes": hashlib.sha256(json.dumps(trained).encode()).hexdigest()[:16],
    }


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON, sets in order."""
    return json.loads(json.dumps(value, default=_sorted))


def _sorted(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
