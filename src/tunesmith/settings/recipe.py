"""Recipes: what a run is, as YAML and on the command line, checked before anything heavy happens.

A recipe's keys are the fields of its trainer's config (SFTConfig, ...) and the few in `KEYS`. Every value, from a
file or from the command line, goes through `coerce` with its field's type: YAML reads `2e-5` as text and `no` as false,
and neither may surprise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from tunesmith.errors import TunesmithError, nearest
from tunesmith.secrets import without_secrets
from tunesmith.settings.coerce import BOOLEANS, UniqueKeyLoader, coerce, described, expected, members_of
from tunesmith.settings.helps import HELPS
from tunesmith.settings.older import LEAVE_OUT, RENAMED

if TYPE_CHECKING:
    from tunesmith.settings.config import Config

LORA_LEARNING_RATES = {
    "sft": 2e-4,
    "dpo": 1e-5,
    "kto": 1e-5,
    "reward": 1e-4,
    "distill": 2e-4,
    "grpo": 1e-5,
    "rloo": 1e-5,
}
"""By trainer."""
SUFFIXES = (".yaml", ".yml")
LARGEST_RECIPE = 1_000_000
"""Bytes."""
NOT_SAVED = ("hub_token", "resume_from_checkpoint", "force_resume", "allow_pickle")
"""What a saved recipe leaves out: a secret, and what only this start was about, or trusted."""

Trainer = Literal["sft", "dpo", "kto", "reward", "distill", "grpo", "rloo"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)

KEYS: dict[str, tuple[Any, str]] = {
    "trainer": (
        Trainer,
        "sft (texts) | dpo (pairs of answers) | kto (good or bad answers) | reward (pairs, to score answers) | "
        "distill (a teacher) | grpo, rloo (rewards of the model's own answers).",
    ),
    "model": (str, "The model: a name on the hub, a folder, or demo."),
    "data": (
        str | list[str] | dict[str, Any],
        "The training data: a file, a folder, a pattern, a name on the hub, a list of them, or named sources "
        "{name: {path, weight, ...}}.",
    ),
    "eval_data": (str | list[str] | None, "The evaluation data. With it, eval_strategy is epoch unless you set it."),
    "output": (str, "The folder that the run is written to; the same as output_dir."),
    "lora": (
        bool | dict[str, Any] | str | None,
        "Train adapters: true, or r=16,alpha=32,dropout=0,target=all-linear.",
    ),
    "quantize": (
        Literal["8bit", "4bit"] | None,
        "Keep the base model's weights in 8 or 4 bits (needs lora, and bitsandbytes).",
    ),
    "processes": (
        int,
        "So many processes on this machine, a GPU each; they train what one does with as many rows a step. Default: 1.",
    ),
    "max_restarts": (
        int,
        "So often the processes are started again where one is killed or fails, and go on from the newest checkpoint. "
        "Default: 0.",
    ),
    "split": (str, "The split of training data that has several. Default: train."),
    "eval_split": (str, "The split of evaluation data that has several. Default: test."),
}
"""The keys that no config has: type and help."""

SOURCE_KEYS: dict[str, Any] = {
    "path": str | list[str],
    "split": str,
    "weight": float,
    "count": int,
    "held_out": float,
    "columns": dict[str, str],
    "text_field": str,
}
"""The keys of a named source: where it is, which of its splits, how often each row is used or how many rows, the
share held out for evaluation, and its own columns."""

ALIASES = {
    "output": "output_dir",
    # transformers deprecates these names; to its users they are the names.
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "seq_len": "max_length",
    "dataset": "data",
    "dataset_name": "data",
    "train_data": "data",
    "model_name_or_path": "model",
    "use_peft": "lora",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "max_completion_length": "max_new_tokens",
}
"""What other tools call a key of ours; only for the hint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A key of a recipe: its type, its default (MISSING for none) and one line of help."""

    kind: Any
    default: Any
    help: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A checked run. `given` are the values as the user wrote them, under their real names and types; `chosen` those
    that the recipe left open and that other values decided, each with its reason. `data` or `sources` is empty."""

    model: str
    data: tuple[str, ...]
    config: "Config"
    trainer: Trainer = "sft"
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eval_data: tuple[str, ...] = ()
    lora: dict[str, Any] | str | bool | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    processes: int = 1
    max_restarts: int = 0
    split: str | None = None
    eval_split: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """The recipe as YAML: what was given and what was chosen; everything else is a default."""
        values = {**self.given, **{name: value for name, (value, _) in self.chosen.items()}}
        public = {name: without_secrets(value) for name, value in values.items() if name not in NOT_SAVED}
        public = {name: public.pop(name) for name in ("model", "data", "eval_data") if name in public} | public
        return yaml.safe_dump(public, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A value as it was written, and where: "recipe.yaml, line 3" or "--learning-rate"."""

    value: Any
    place: str


# The recipe as a whole


def resolve(path: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe in the file `path` (None: all is in `overrides`), with `overrides` taking precedence over it.

    Raises TunesmithError for an unreadable file, an unknown or repeated key, a value of the wrong type, a missing key,
    and for what the config refuses.
    """
    written = {name: _Entry(value=value, place=_flag(name)) for name, value in overrides.items()}
    entries = _renamed({} if path is None else _read(path)) | _renamed(written)
    trainer: Trainer = "sft"
    given: dict[str, Any] = {}
    for name in sorted(entries, key=lambda name: name != "trainer"):
        entry, known = entries[name], all_settings(trainer)
        if name not in known:
            other = next(other for other in TRAINERS if name in all_settings(other))
            raise TunesmithError(
                f"{entry.place}: {name} is a setting of {other}, and this run is {trainer}; drop it, or write "
                f"`trainer: {other}`"
            )
        try:
            given[name] = coerce(entry.value, known[name].kind)
        except ValueError as error:
            raise TunesmithError(f"{entry.place}: {name} {error}") from error
        trainer = given.get("trainer", trainer)
    for name, least in (("processes", 1), ("max_restarts", 0)):
        if given.get(name, least) < least:
            raise TunesmithError(f"{entries[name].place}: {name} is {given[name]}; write {least} or more")
    given = {name: given[name] for name in entries}
    for name, example in (("model", "demo"), ("data", "rows.jsonl"), ("output_dir", "runs/first")):
        if not given.get(name):
            key = "output" if name == "output_dir" else name
            raise TunesmithError(f"no {key}; write `{key}: {example}` in the recipe, or --{key} {example}")
    chosen = _choices(given, trainer)
    values = given | {name: value for name, (value, _) in chosen.items()}
    try:
        config = config_of(trainer)(**{name: value for name, value in values.items() if name not in KEYS})
    except TunesmithError:
        raise
    except (ValueError, TypeError, ArithmeticError, NotImplementedError, OSError) as error:  # transformers' own checks
        raise TunesmithError(str(error)) from error
    return Recipe(
        config=config,
        trainer=trainer,
        model=given["model"],
        data=() if isinstance(given["data"], dict) else _listed(given["data"]),
        sources=_sources(given["data"]) if isinstance(given["data"], dict) else {},
        eval_data=_listed(given.get("eval_data")),
        lora=given.get("lora"),
        quantize=given.get("quantize"),
        processes=given.get("processes", 1),
        max_restarts=given.get("max_restarts", 0),
        split=given.get("split"),
        eval_split=given.get("eval_split"),
        given=given,
        chosen=chosen,
    )


def _choices(given: Mapping[str, Any], trainer: Trainer) -> dict[str, tuple[Any, str]]:
    chosen: dict[str, tuple[Any, str]] = {}
    if given.get("lora") not in (None, False) and "learning_rate" not in given:
        chosen["learning_rate"] = (LORA_LEARNING_RATES[trainer], "the default with lora")
    if given.get("eval_data") and "eval_strategy" not in given:
        chosen["eval_strategy"] = ("epoch", "the default with eval_data")
    held_out = isinstance(given["data"], dict) and any(
        isinstance(source, dict) and source.get("held_out") for source in given["data"].values()
    )
    if held_out and given.get("eval_data"):
        raise TunesmithError("eval_data is given, and so is held_out of a source; keep one of them")
    if held_out and "eval_strategy" not in given:
        chosen["eval_strategy"] = ("epoch", "the default with held_out")
    if given.get("eval_strategy", "no") != "no" and not given.get("eval_data") and not held_out:
        raise TunesmithError(
            f"eval_strategy is {given['eval_strategy']}, but there is no eval_data; give it, or drop this"
        )
    if "eval_split" in given and not given.get("eval_data"):
        raise TunesmithError("eval_split is given, but there is no eval_data")
    return chosen


def _sources(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Named sources under checked keys; a source may be just its path."""
    sources = {}
    for name, written in data.items():
        source = sources[str(name)] = dict(written) if isinstance(written, dict) else {"path": written}
        for key, value in source.items():
            if key not in SOURCE_KEYS:
                raise TunesmithError(f"data: source {name!r} has an unknown key {key!r}{nearest(key, SOURCE_KEYS)}")
            try:
                source[key] = coerce(value, SOURCE_KEYS[key])
            except ValueError as error:
                raise TunesmithError(f"data: {key} of source {name!r} {error}") from error
        if not source.get("path"):
            raise TunesmithError(f"data: source {name!r} has no path; write `{name}: {{path: rows.jsonl}}`")
    return sources


def _listed(value: str | list[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _renamed(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Entries under their real names. A name that nothing has, and two names for one thing, are errors."""
    renamed = {}
    for name, entry in entries.items():
        _setting(name, entry.place)
        real = ALIASES.get(name, name)
        if real != name and real in entries:
            raise TunesmithError(f"{entry.place}: {name} and {real} are the same setting; keep one")
        renamed[real] = entry
    return renamed


def _setting(name: str, place: str) -> Setting:
    """The setting `name` of any trainer."""
    settings = every_setting()
    if name not in settings:
        if name in LEAVE_OUT:
            raise TunesmithError(f"{place}: {name} is no setting here, leave it out: {LEAVE_OUT[name]}")
        other = (OTHER_NAMES | RENAMED).get(name)
        hint = f"; did you mean {other!r}?" if other else nearest(name, settings)
        raise TunesmithError(f"{place}: unknown setting {name!r}{hint} (`tunesmith train --fields` lists all)")
    return settings[name]


def config_of(trainer: Trainer) -> "type[Config]":
    """The config that a trainer takes."""
    from tunesmith.settings.config import SFTConfig
    from tunesmith.settings.distillation import DistillationConfig
    from tunesmith.settings.policy import GRPOConfig, RLOOConfig
    from tunesmith.settings.preference import DPOConfig, KTOConfig, RewardConfig

    configs: dict[Trainer, type[Config]] = {
        "sft": SFTConfig,
        "dpo": DPOConfig,
        "kto": KTOConfig,
        "reward": RewardConfig,
        "distill": DistillationConfig,
        "grpo": GRPOConfig,
        "rloo": RLOOConfig,
    }
    return configs[trainer]


def every_setting() -> dict[str, Setting]:
    """The keys of the recipes of all trainers."""
    return {name: setting for trainer in reversed(TRAINERS) for name, setting in all_settings(trainer).items()}


@cache
def all_settings(trainer: Trainer = "sft") -> dict[str, Setting]:
    """Every key of a recipe, by name: ours, then the config's own fields, then those of TrainingArguments."""
    from transformers import TrainingArguments

    config = config_of(trainer)
    kinds = get_type_hints(config)
    # `true` means the newest checkpoint in the output folder, and FSDP on; the declared types have only text.
    kinds |= dict.fromkeys(("resume_from_checkpoint", "fsdp"), bool | str | None)
    if "scale_rewards" in kinds:  # which was true or false in TRL, once
        kinds["scale_rewards"] |= bool
    inherited = {item.name for item in fields(TrainingArguments)}
    settings = {name: Setting(kind=kind, default=MISSING, help=text) for name, (kind, text) in KEYS.items()}
    for item in sorted(fields(config), key=lambda item: item.name in inherited):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        text = HELPS.get(item.name) or " ".join(str(item.metadata.get("help", "")).split())
        settings[item.name] = Setting(kind=kinds[item.name], default=default, help=text)
    return settings


# YAML


def _read(path: str) -> dict[str, _Entry]:
    """The top-level keys of a recipe. Raises TunesmithError with the line for whatever isn't an object of settings."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise TunesmithError(
            f"{path} is not a recipe, which ends in .yaml; to train on a data file write --data {path}"
        )
    try:
        with file.open("rb") as stream:
            raw = stream.read(LARGEST_RECIPE + 1)
        if len(raw) > LARGEST_RECIPE:
            raise TunesmithError(f"{path} is larger than {LARGEST_RECIPE // 10**6} MB, which no recipe is")
        loader = UniqueKeyLoader(raw.decode("utf-8-sig"))
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except FileNotFoundError:
        siblings = [item.name for item in file.parent.glob("*") if item.suffix in SUFFIXES]
        raise TunesmithError(f"no file {path}{nearest(file.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise TunesmithError(f"{path} is not UTF-8: byte {error.start} is wrong") from error
    except OSError as error:
        raise TunesmithError(f"{path} can't be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise TunesmithError(f"{path}{where}: {error.problem or error.context}") from error
    except TunesmithError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TunesmithError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        holds = "is empty" if values is None else f"holds {described(values)}"
        raise TunesmithError(f"{path} {holds}; a recipe is lines of `key: value`, such as `model: demo`")
    keys = node.value if isinstance(node, yaml.MappingNode) else []
    lines = {str(key.value): f"{path}, line {key.start_mark.line + 1}" for key, _ in keys}
    return {str(name): _Entry(value=value, place=lines.get(str(name), path)) for name, value in values.items()}


# The command line


def parse_options(tokens: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """`[RECIPE.yaml] --field value --field=value --flag --no-flag` to the recipe's path and the overrides.

    Dashes and underscores are the same. `--data` may be repeated. Values stay text, for `coerce`.
    """
    path: str | None = None
    overrides: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            if token.startswith("-") or path is not None:
                raise TunesmithError(f"unexpected {token!r}; after the one recipe everything is --field value")
            path = token
            continue
        name, equals, value = token[2:].partition("=")
        name, parsed = _option(name.replace("-", "_"), value if equals else None, rest)
        repeated = name in ("data", "eval_data") and name in overrides
        overrides[name] = [*_listed(overrides[name]), parsed] if repeated else parsed
    return path, overrides


def _option(name: str, value: str | None, rest: list[str]) -> tuple[str, Any]:
    """The name and value of one option; takes its value from the front of `rest` where it has one."""
    settings, positive = every_setting(), name.removeprefix("no_")
    if name not in settings and value is None and positive in settings and bool in members_of(settings[positive].kind):
        return positive, False
    kind = _setting(name, _flag(name)).kind
    if value is not None:
        return name, value
    following = rest[0] if rest and not rest[0].startswith("--") else None
    members = members_of(kind)
    if bool in members:
        only_flag = not {str, dict, float, int} & {get_origin(member) or member for member in members}
        is_word = following is not None and following.lower() in BOOLEANS
        if following is None or (only_flag and not is_word) or Path(following).suffix in SUFFIXES:
            return name, True
    if following is None:
        raise TunesmithError(f"{_flag(name)} needs a value: {expected(kind)}")
    return name, rest.pop(0)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
