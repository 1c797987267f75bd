"""Whether the processes of a run train the same. Those of several machines need not: each machine has its own files."""

import hashlib
import json
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import Identity
from tunesmith.runs.describe import versions
from tunesmith.settings.config import Config

MEETINGS = (
    *("max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("save_strategy", "save_steps", "save_only_model", "logging_strategy", "logging_steps", "logging_first_step"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size"),
    *("shard", "sample_prompts", "num_generations_eval"),
)
"""Settings that a run may change on its way, but which decide when all processes meet: one would wait in vain."""
OWN = ("name", "revision")
"""What each machine may call the model."""
LOOKED_AT = 1000
"""Values at the beginning of a weight that stand for all of it."""
SHOWN = 12
"""Differences of two processes that are listed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Process:
    """What one process is going to train, with which libraries, and on which machine."""

    host: str
    identity: Identity
    versions: Mapping[str, str]


def check_agreement(identity: Identity | None, args: Config, *, resumes: bool) -> None:
    """Raises TunesmithError, in every process, where they would train different rows or with different settings, so
    that the result is nobody's, or one would wait for the others in vain. Every process must call this; one without an
    `identity` only hears what the others found. Other versions of libraries are only told."""
    own = None
    if identity is not None:
        values = {name: value for name, value in args.to_dict().items() if name in MEETINGS}
        settings = _without_folders({**identity.settings, **json.loads(json.dumps(values, default=str))})
        model = {name: value for name, value in identity.model.items() if name not in OWN}
        all_of_it = replace(identity, settings=settings | {"resume_from_checkpoint": resumes}, model=model)
        own = _Process(host=socket.gethostname(), identity=all_of_it, versions=versions())
    first, *others = _exchanged(own)
    for rank, other in others:
        process = f"process {rank} on {other.host}, and process 0 on {first[1].host}"
        if found := other.identity.differences(first[1].identity):
            listed = "".join(f"\n  {line.replace(' -> ', ', and ')}" for line in found[:SHOWN])
            raise TunesmithError(
                f"{process}, would not train the same:{listed}\nGive all of them the same data, recipe and base model"
            )
        installed = [
            f"{name} {other.versions.get(name)}, and {first[1].versions.get(name)}"
            for name in {**first[1].versions, **other.versions}
            if other.versions.get(name) != first[1].versions.get(name)
        ]
        if installed and args.process_index == 0:
            logger.warning(
                "%s, have other versions: %s. Install the same, should they round differently or fail.",
                process,
                "; ".join(installed),
            )
            break


def check_same_weights(model: nn.Module) -> None:
    """Raises TunesmithError, in every process, where they have loaded different weights, of which each would keep its
    part. Every process must call this."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        beginning = weight.detach().flatten()[:LOOKED_AT].to("cpu", torch.float64)
        digest.update(f"{name} {list(weight.shape)} ".encode() + beginning.numpy().tobytes())
    hosts = gather_object([(socket.gethostname(), digest.hexdigest())])
    for rank, (host, other) in enumerate(hosts):
        if other != hosts[0][1]:
            raise TunesmithError(
                f"shard: process {rank} on {host} has other weights than process 0 on {hosts[0][0]}, and each would "
                "keep its part of them; give all the same base model, or call set_seed before a model is made at random"
            )


def _exchanged(own: _Process | None) -> list[tuple[int, _Process]]:
    """What each process that says something is going to train, by its number."""
    said: Sequence[_Process | None] = gather_object([own])
    return [(rank, process) for rank, process in enumerate(said) if process is not None]


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Each machine may keep a file elsewhere."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in settings.items()
    }
