"""Models and tokenizers by name: the demo model, a folder, a name on the hub, or a finished run.

Weights are read from safetensors only, and code that comes with a model runs only when the user says so. Importing this
loads neither models nor peft: commands that look at data need a tokenizer only.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from tunesmith.errors import TunesmithError, nearest
from tunesmith.home import DEMO, DEMO_FOLDER
from tunesmith.model.demo_model import Progress, demo_model_path
from tunesmith.model.devices import here
from tunesmith.model.threads import share_cores
from tunesmith.runs.checkpoints import checkpoints
from tunesmith.runs.parts import named_by
from tunesmith.text import shorten

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tunesmith.model.adapters import Model
    from tunesmith.settings.config import Config

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
TOKENIZER = "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MOST_GROWTH = 1_000_000
"""Characters that a normalizer may make of one."""
LAST_TOKEN = 10_000_000
"""The number of a token. Where a vocabulary is written, memory is taken for all numbers before it."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
MOST_LAYERS = 10_000
LOST_STARTS = ("pissa_niter", "loftq", "corda", "lora_ga")
"""Ways to start adapters that change the base weights and can't be repeated: they draw numbers, or need data."""


def resolve_model(name: str, progress: Progress | None = None) -> str:
    """What `from_pretrained` takes for `name`: a folder that is there, or a name on the hub.

    "demo" is the demo model; a folder of that name is written "./demo". Raises TunesmithError for a file, and for a
    folder that isn't there.
    """
    if name == DEMO:
        return str(demo_model_path(progress))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise TunesmithError(f"model {name} is a file; give the folder that it is in")
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    if in_a_folder or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise TunesmithError(f"no folder {name}{_nearest_folder(path)}")
    return name


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> "PreTrainedModel":
    """The causal language model `name`; `kwargs` are those of `from_pretrained`.

    `dtype` is float32 unless said otherwise: weights that are trained must hold updates far smaller than themselves;
    "auto" takes the checkpoint's. With `allow_pickle`, weights may also be in pickle files, of which torch then reads
    numbers only. Raises TunesmithError when the model can't be loaded, or lacks weights, and for a classifier.
    """
    from transformers import AutoModelForCausalLM

    trusted = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    model, missing = _loaded(AutoModelForCausalLM, name, dtype=dtype, **trusted, **kwargs)
    if is_classifier(model.config):
        raise TunesmithError(
            f"model {name} is a sequence classifier, such as a reward model, which scores texts and writes none; "
            "`tunesmith reward` trains such models, and `tunesmith eval` measures them"
        )
    _refuse_random(name, model, missing)
    return model


def load_classifier(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> "PreTrainedModel":
    """The sequence classifier `name` with one output: as it was saved, or of a causal language model with a new head,
    drawn from torch's random numbers. Arguments and errors are those of `load_model`."""
    from transformers import AutoModelForSequenceClassification

    trusted = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    saved = load_config(name, trust_remote_code=trust_remote_code, **{k: kwargs[k] for k in kwargs if k == "revision"})
    if is_classifier(saved) and saved.num_labels != 1:
        raise TunesmithError(
            f"model {name} is a classifier with {saved.num_labels} outputs (num_labels), and a reward is one; take "
            "another one, or the language model that it was made of"
        )
    kwargs["num_labels"] = 1
    with nullcontext() if is_classifier(saved) else _quiet():  # which would report the head as missing
        model, missing = _loaded(AutoModelForSequenceClassification, name, dtype=dtype, **trusted, **kwargs)
    body = f"{model.base_model_prefix}."
    _refuse_random(name, model, [key for key in missing if is_classifier(saved) or key.startswith(body)])
    return model


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a saved model is a sequence classifier, such as a reward model."""
    kinds = architectures_of(config)
    return bool(kinds) and all(kind.endswith("ForSequenceClassification") for kind in kinds)


def architectures_of(config: PreTrainedConfig) -> list[str]:
    """The classes that a saved model is of; none where its settings don't say."""
    named = config.architectures if isinstance(config.architectures, list) else []
    return [kind for kind in named if isinstance(kind, str)]


def _refuse_random(name: str, model: "PreTrainedModel", missing: Sequence[str]) -> None:
    if missing:
        raise TunesmithError(
            f"model {name} lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )


def _loaded(
    auto: Any, name: str, *, dtype: torch.dtype | str, trust_remote_code: bool, allow_pickle: bool, **kwargs: Any
) -> "tuple[PreTrainedModel, list[str]]":
    """The model `name` by one of the auto classes of `transformers`, and the names of weights that it lacks."""
    share_cores()
    path = resolve_model(name)
    dtype = kwargs.pop("torch_dtype", dtype)  # its earlier name in transformers
    if Path(path).is_dir():
        _check_folder(Path(path), name, kwargs, allow_pickle)
    with _explained(name), no_bars(hide=Path(path).is_dir()):  # those of a download stay
        _check_config(path, kwargs.get("revision"), trust_remote_code=trust_remote_code)
        loaded: Any = auto.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **kwargs,
        )
    model, report = loaded
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(depth, int) and depth < 0:  # of which none are made, and no answer either
        raise TunesmithError(f"model {name}: num_hidden_layers in {CONFIG} is {depth}; write how many it has")
    return model, sorted(report["missing_keys"])


def load_config(name: str, *, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedConfig:
    """The settings of the model `name`; `kwargs` are those of `from_pretrained`. Raises TunesmithError."""
    path = resolve_model(name)
    with _explained(name, "settings of "):
        _check_config(path, kwargs.get("revision"), trust_remote_code=trust_remote_code)
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    return config


def load_tokenizer(name: str, *, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`; `kwargs` are those of `from_pretrained`. Raises TunesmithError."""
    path = resolve_model(name)
    if holds_adapters(name) and not _has(path, TOKENIZER):
        path = resolve_model(base_of(path)[0])  # `peft` saves adapters alone
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with _explained(name, "tokenizer of "):
        _check_config(path, kwargs.get("revision"), trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        _check_backend(name, backend)
    return tokenizer


def _check_backend(name: str, backend: Any) -> None:
    """Raises TunesmithError for a tokenizer.json that would take any amount of memory."""
    normalizer = backend.normalizer
    if normalizer is not None and (grows := _growth(json.loads(normalizer.__getstate__()))) > MOST_GROWTH:
        raise TunesmithError(
            f"tokenizer of {name}: the normalizer in tokenizer.json may make {grows:,} characters of one; take another "
            "tokenizer"
        )
    vocabulary = backend.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if last is not None and vocabulary[last] > LAST_TOKEN:
        raise TunesmithError(
            f"tokenizer of {name}: tokenizer.json gives {shorten(repr(last))} the number {vocabulary[last]:,}, and at "
            f"most {LAST_TOKEN:,} is supported; take another tokenizer"
        )


def _growth(rules: dict[str, Any]) -> int:
    """The most characters that a normalizer puts in the place of one, if all that it replaces is one character."""
    if "normalizers" in rules:
        return math.prod(_growth(each) for each in rules["normalizers"])
    if "content" in rules:  # a regular expression may match between two characters, which stay
        return max(1, len(rules["content"]) + ("Regex" in rules["pattern"]))
    if "prepend" in rules:
        return 1 + len(rules["prepend"])
    return 1


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: "str | Model", args: "Config"
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The run's tokenizer, with the template and the special tokens that `args` asks for; and the ids of the tokens
    that it lacked."""
    init: dict[str, Any] = args.model_init_kwargs or {}  # type: ignore[assignment]
    if tokenizer is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        if not name:
            raise TunesmithError("the model does not say where it came from; pass its tokenizer as processing_class")
        tokenizer = load_tokenizer(name, revision=init.get("revision"), trust_remote_code=args.trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TunesmithError(
            f"processing_class is {type(tokenizer).__name__}; a tokenizer is needed (images are not supported)"
        )
    source, added = args.chat_template_path, []
    if source is not None:
        from tunesmith.model.tokens import extend_tokenizer

        added = extend_tokenizer(tokenizer, source, trust_remote_code=args.trust_remote_code)
    for role in ("eos_token", "pad_token"):
        token = getattr(args, role)
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise TunesmithError(
                    f"{role} is {token!r}, which is not in the tokenizer's vocabulary"
                    f"{nearest(token, tokenizer.added_tokens_encoder)}"
                )
            setattr(tokenizer, role, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, added


def load_run(
    name: str, *, trust_remote_code: bool = False, progress: Progress | None = None, classifier: bool = False
) -> "tuple[Model, PreTrainedTokenizerBase]":
    """A run's model, with its adapters, and tokenizer, ready to generate on the best device, or to score as a
    `classifier`; or any model by name.

    A folder that holds nothing but checkpoints stands for the newest of them. On a CPU the weights are float32, which
    every one computes in natively; elsewhere they are what was saved. Raises TunesmithError.
    """
    folder = run_folder(Path(resolve_model(name, progress)))
    if folder.is_dir() and not _holds_model(folder):
        raise TunesmithError(f"{name} is no run or model: it has neither {CONFIG} nor {ADAPTERS}{_nearest_run(folder)}")
    device = here()
    dtype: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    load: Callable[..., Any] = load_classifier if classifier else load_model
    if holds_adapters(str(folder)):
        load = partial(load_adapted, classifier=classifier)
    model = load(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(device).eval(), tokenizer


def load_adapted(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    is_trainable: bool = False,
    classifier: bool = False,
    **kwargs: Any,
) -> "PeftModel":
    """The adapters in the folder or of the hub's name `name`, on their base model, which is a `classifier` or writes
    texts; `kwargs` are those of `from_pretrained` for the latter. Raises TunesmithError."""
    path = resolve_model(name)
    if not _has(path, ADAPTER_WEIGHTS):  # `peft` would take pickled ones
        raise TunesmithError(f"{path} has {ADAPTERS}, but not {ADAPTER_WEIGHTS}: adapters in safetensors are needed")
    from peft import PeftModel

    refuse_lost_start(path)
    base, revision = base_of(path)
    scores = adapters_score(path)
    if scores and not classifier:
        raise TunesmithError(
            f"{name} holds the adapters of a sequence classifier, which scores texts and writes none; `tunesmith eval` "
            "measures it"
        )
    if classifier and not scores:
        raise TunesmithError(
            f"{name} holds the adapters of a model that writes texts; merge them (`tunesmith merge`), and train a "
            "reward model from the result"
        )
    load = load_classifier if classifier else load_model
    model = load(base, dtype=dtype, trust_remote_code=trust_remote_code, **(revision | kwargs))
    rows = len(load_tokenizer(path, trust_remote_code=trust_remote_code))
    if rows > model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        model.resize_token_embeddings(rows, mean_resizing=False)
    with _explained(name, "adapters of "):
        return PeftModel.from_pretrained(model, path, is_trainable=is_trainable)


def adapters_score(path: str) -> bool:
    """Whether the adapters in the folder or of the hub's name `path` belong to a sequence classifier."""
    return adapter_config(path).get("task_type") == "SEQ_CLS"


def adapter_config(path: str) -> dict[str, Any]:
    """What adapters say of themselves."""
    with _explained(path, "adapters of "):
        file = Path(path) / ADAPTERS if Path(path).is_dir() else Path(str(cached_file(path, ADAPTERS)))
        return dict(json.loads(file.read_text(encoding="utf-8")))


def refuse_lost_start(path: str) -> None:
    """Raises TunesmithError for adapters in the folder or of the hub's name `path` that belong onto other weights than
    those of the base model: they would be loaded without a word, and be another model."""
    start = adapter_config(path).get("init_lora_weights")
    if isinstance(start, str) and start.startswith(LOST_STARTS):  # before peft wants what it needs to start them
        raise TunesmithError(
            f"{path}: these adapters were started with init_lora_weights={start!r}, which changed the base model's "
            "weights, and the change was not saved. In a checkpoint, go on with the run (resume_from_checkpoint): what "
            "it saves at its end is plain LoRA. Elsewhere, convert them where they were trained: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...), see the peft documentation"
        )


def holds_adapters(name: str) -> bool:
    """Whether the folder or the hub's name `name` holds adapters; false for a model that can't be reached."""
    path = resolve_model(name)
    return _has(path, ADAPTERS) and not _has(path, CONFIG)


def _has(path: str, file: str) -> bool:
    """Whether the folder, or the repository of this name on the hub, has this file; false where it can't be reached."""
    if Path(path).is_dir():
        return (Path(path) / file).is_file()
    try:
        return cached_file(path, file, _raise_exceptions_for_missing_entries=False) is not None
    except OSError:
        return False


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint in a run's folder that holds a model, or None."""
    return next((folder for folder in reversed(checkpoints(run)) if _holds_model(folder)), None)


def run_folder(path: Path) -> Path:
    """`path`, or where it holds nothing but checkpoints, the newest of them."""
    if not path.is_dir() or _holds_model(path):
        return path
    return newest_checkpoint(path) or path


def _holds_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (CONFIG, ADAPTERS))


def _nearest_run(folder: Path) -> str:
    """What to write instead of a folder without a model: the newest of its folders that have one."""
    inside = [item for item in folder.iterdir() if item.is_dir() and _holds_model(run_folder(item))]
    if inside:
        return f"; {max(inside, key=lambda item: item.stat().st_mtime)} in it is one"
    return ", nor any checkpoint; a run that ended before it saved leaves none"


def base_of(adapters: str) -> tuple[str, dict[str, Any]]:
    """The name of the model that `adapters` belong to, and its revision as an argument. The demo model's folder may be
    elsewhere than on the machine that trained."""
    from peft import PeftConfig

    with _explained(adapters, "adapters of "):
        config = PeftConfig.from_pretrained(adapters)
    base = config.base_model_name_or_path
    if not base:
        raise TunesmithError(f"{adapters}/{ADAPTERS} does not name the base model; set base_model_name_or_path in it")
    if DEMO_FOLDER.search(base) and not Path(base).is_dir():
        base = DEMO
    return base, {"revision": config.revision} if config.revision else {}


def _check_folder(folder: Path, name: str, kwargs: Mapping[str, Any], allow_pickle: bool) -> None:
    """Raises for a folder whose files can't be a model in safetensors; `transformers` would say it less clearly."""
    if "gguf_file" in kwargs or kwargs.get("subfolder"):
        return
    suffixes = {item.suffix for item in folder.iterdir()}
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTERS).is_file():
            raise TunesmithError(
                f"{name} holds adapters, not a whole model; `tunesmith chat {name}` loads them with their base model"
            )
        raise TunesmithError(f"{name} is no model: it has no {CONFIG}")
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        named_by(folder / INDEX)
    if ".safetensors" in suffixes:
        return
    if suffixes & {".bin", ".pt", ".pth"}:
        if allow_pickle:
            return
        raise TunesmithError(
            f"{name} has its weights in pickle files (.bin), which can run code when they are read. If you trust "
            "them, set allow_pickle: true; or convert them: load the model and call save_pretrained"
        )
    raise TunesmithError(f"{name} has no weights: there is no .safetensors file in it")


def _check_config(path: str, revision: str | None, *, trust_remote_code: bool) -> None:
    """Raises for a model that `transformers` has no class for, and whose files bring one, unless that may run; and for
    so many layers that a config of them, or a model, would never be made."""
    if not _has(path, CONFIG):
        return
    settings, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    for part in (settings, settings.get("text_config")):
        for key, depth in part.items() if isinstance(part, dict) else ():
            if key in DEPTHS and isinstance(depth, int) and depth > MOST_LAYERS:
                raise TunesmithError(
                    f"{key} in {CONFIG} of {path} is {depth:,}, and at most {MOST_LAYERS:,} layers are supported; "
                    "write how many it has"
                )
    if not trust_remote_code and "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
        raise TunesmithError(
            f"model {path} needs custom code, which comes with its files and would run here; read it, and set "
            "trust_remote_code: true if you trust it"
        )


def _nearest_folder(path: Path) -> str:
    siblings = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    return nearest(path.name, siblings)


@contextmanager
def _explained(name: str, part: str = "model ") -> Iterator[None]:
    """What `transformers` and `peft` raise for a wrong name, a missing file, no network, as TunesmithError."""
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:  # a config of others may be anything
        local = name == DEMO or Path(name).expanduser().is_dir()
        hint = "" if local else f"\nThere is no folder {name} here either{_nearest_folder(Path(name))}"
        raise TunesmithError(f"{part}{name} could not be loaded: {error}{hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what `transformers` says of weights that a file lacks or has too many of."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def no_bars(*, hide: bool = True) -> Iterator[None]:
    """Without `transformers`' progress bars, such as those over weights that are on the disk already, or over each
    file of each checkpoint."""
    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
