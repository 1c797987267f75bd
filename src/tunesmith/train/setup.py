"""From names to a model that is ready to train: tokenizer, weights, adapters, and their agreement on special tokens."""

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import number_of_arguments

from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.adapters import Model, adapt, base_model, has_virtual_tokens, trainable
from tunesmith.model.attention import supports_documents, use_documents
from tunesmith.model.compile import compile_layers
from tunesmith.model.devices import here
from tunesmith.model.generate import writable
from tunesmith.model.head import answer_objectives
from tunesmith.model.linear import speed_up
from tunesmith.model.load import holds_adapters, load_adapted, load_classifier, load_model
from tunesmith.model.precision import compute_dtype, settle_precision
from tunesmith.model.quantize import bits_of, check_optimizer, check_quantization, keep_quantized, refuse_untrainable
from tunesmith.model.tokens import (
    resize_for,
    save_rows_only,
    tokens_lacking_in,
    train_new_tokens,
    trains_rows,
)
from tunesmith.settings.config import Config, settings_of
from tunesmith.text import listing

BATCH_OF_ROWS = 10_000
"""Rows of a data set that are looked at together."""
ROWS_MULTIPLE = 64
"""Grown embeddings have a multiple of so many rows, which matrix products on GPUs are fastest with."""
NO_ADAPTERS = "8-bit and 4-bit weights can't be trained; give a peft_config, e.g. LoraConfig() (--lora)"

logger = logging.getLogger(__name__)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def as_config(args: TrainingArguments | None, model: str | Model, kind: type[AnyConfig]) -> AnyConfig:
    """`args` as a config of the `kind` that a trainer has, with its precision settled; without any, the output folder
    is named after the model. Raises TunesmithError for what is no config, and for adapters on what is no model of
    `transformers`."""
    if isinstance(model, PeftModel) and not isinstance(model.get_base_model(), PreTrainedModel):
        raise TunesmithError(
            f"model has adapters on {type(model.get_base_model()).__name__}, which is no model of transformers"
        )
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path or type(model).__name__
        args = kind(output_dir=f"{Path(name).name}-{kind.__name__.removesuffix('Config')}")
    elif not isinstance(args, kind):
        if isinstance(args, Config) or not isinstance(args, TrainingArguments):
            raise TunesmithError(f"args is {type(args).__name__}, and this trainer takes {kind.__name__}")
        args = kind(**settings_of(args))
    settle_precision(args)
    return args


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The tokens of a run: its `tokenizer`, the ids `added` to it by a chat template, and those `used` in the data
    (None: of a stream nobody knows). `given`: somebody else has prepared the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    added: Sequence[int]
    used: Collection[int] | None
    given: bool


def used_ids(train: Any, evaluated: Any) -> set[int] | None:
    """The token ids in prepared data, of which `evaluated` may be several sets by name, or None; None where the
    training data is a stream, or has no ids."""
    if not isinstance(train, Dataset) or "input_ids" not in train.column_names:
        return None
    ids: set[int] = set()
    for dataset in (train, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            rows = dataset.select_columns("input_ids").with_format("arrow").iter(BATCH_OF_ROWS)
            ids.update(i for table in rows for i in pc.unique(pc.list_flatten(table.column(0))).to_pylist())
    return ids


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSetup:
    """How a model is made ready to train: by which settings and for which tokens, with which adapters and weights.
    `ends` are the tokens that end the supervised texts. A `classifier` scores texts with one number."""

    args: Config
    vocabulary: Vocabulary
    ends: Collection[int] = ()
    classifier: bool = False
    peft_config: PeftConfig | None = None
    quantization_config: Any = None


def prepare_model(model: str | Model, setup: ModelSetup) -> Model:
    """The model with its adapters, its frozen weights in the compute precision, and a row for each token of the
    vocabulary; the rows of new tokens are trained. A `model` that names saved adapters goes on training these."""
    args, vocabulary = setup.args, setup.vocabulary
    base = model if isinstance(model, str) else base_model(model).config.name_or_path
    if isinstance(model, str):
        model = _load(model, setup)
    else:
        for name, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", setup.quantization_config),
        ):
            if value is not None:
                raise TunesmithError(f"{name} is for a model given by name; this one is loaded already")
    refuse_untrainable(base_model(model))
    if bits_of(base_model(model)):
        keep_quantized(model)
    new = [] if args.chat_template_path is None else _new_tokens(model, vocabulary.tokenizer, vocabulary.added)
    if not new:
        _refuse_tokens_beyond(model, vocabulary)
    by_hand = _made_by_hand(model, base, setup, new)
    if setup.peft_config is not None:
        model = _with_adapters(model, setup.peft_config, vocabulary.tokenizer, new, by_hand)
    else:
        if new:
            resize_for(base_model(model), vocabulary.tokenizer, new, ROWS_MULTIPLE)
        if bits_of(model) and not isinstance(model, PeftModel):
            raise TunesmithError(NO_ADAPTERS)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TunesmithError(
                "no parameter of the model requires a gradient, so nothing would be trained; "
                "load adapters with is_trainable=True"
            )
    if isinstance(model, PeftModel):
        _settle_adapters(model, args)
    if args.loraplus_lr_ratio is not None and not any(".lora_B" in name for name, _ in model.named_parameters()):
        raise TunesmithError(
            "loraplus_lr_ratio is set, but no LoRA adapters are trained; give a LoraConfig, or drop it"
        )
    logger.info("%s.", trainable(model))
    return model


def _made_by_hand(model: Model, base: str | None, setup: ModelSetup, new: Sequence[int]) -> list[int]:
    """The tokens in the data that `base` never saw and somebody made rows for, `new` ones aside; adapters must train
    these. Raises TunesmithError for a model whose adapters don't."""
    vocabulary, tokenizer = setup.vocabulary, setup.vocabulary.tokenizer
    if not (vocabulary.given and base) or (setup.peft_config is None and not isinstance(model, PeftModel)):
        return []
    lacking = tokens_lacking_in(base, tokenizer, setup.args.trust_remote_code)
    by_hand = sorted(lacking.difference(new) & set(lacking if vocabulary.used is None else vocabulary.used))
    if by_hand and isinstance(model, PeftModel) and not trains_rows(model):
        raise TunesmithError(
            f"the data has tokens that {base} never saw ({_named(by_hand, tokenizer)}), and the model's adapters leave "
            f"their embeddings as they are. Make them with trainable_token_indices={by_hand[:3]}, or give the trainer "
            "the model without adapters and peft_config, which trains these rows; if they were trained before, save "
            "the model with its tokenizer and load it from there"
        )
    return by_hand


def _settle_adapters(model: PeftModel, args: Config) -> None:
    """Let adapters be saved under their names, and found from anywhere, and what is recomputed reach them."""
    for name in model.peft_config:
        if not re.fullmatch(r"[\w-][\w.-]*", name):  # it becomes a folder, which must not lead out of the run's
            raise TunesmithError(f"an adapter is named {name!r}; use letters, digits, - and _, as for a folder")
    for config in model.peft_config.values():
        folder = Path(config.base_model_name_or_path or "")
        if config.base_model_name_or_path and folder.is_dir():  # saved adapters are loaded from anywhere
            config.base_model_name_or_path = str(folder.absolute())
    if args.activation_checkpointing and not has_virtual_tokens(model):
        model.enable_input_require_grads()  # what is recomputed needs an input with a gradient


def _load(name: str, setup: ModelSetup) -> Model:
    args, peft_config, quantization_config = setup.args, setup.peft_config, setup.quantization_config
    init = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    init.pop("trust_remote_code", None)  # which `args` say
    if "torch_dtype" in init:  # its name in `transformers`, once
        init["dtype"] = init.pop("torch_dtype")
    if quantization_config is not None:
        if "quantization_config" in init:
            raise TunesmithError("quantization_config is given twice: to the trainer and in model_init_kwargs")
        init["quantization_config"] = quantization_config
    quantized, adapters = init.get("quantization_config") is not None, holds_adapters(name)
    if quantized:
        check_quantization(init["quantization_config"])
        if peft_config is None and not adapters:
            raise TunesmithError(NO_ADAPTERS)
    if adapters and peft_config is not None:
        raise TunesmithError(
            f"{name} holds adapters, and peft_config asks for new ones; merge them first (`tunesmith merge`), or "
            "leave peft_config out to go on training them"
        )
    if adapters or peft_config is not None:  # the base model is frozen
        init.setdefault("dtype", compute_dtype(args))
    trusted: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "allow_pickle": args.allow_pickle}
    if adapters:
        logger.info("Starts from the adapters in %s, at step 0; resume_from_checkpoint would go on with a run.", name)
        return load_adapted(name, is_trainable=True, classifier=setup.classifier, **trusted, **init)
    return (load_classifier if setup.classifier else load_model)(name, **trusted, **init)


def _new_tokens(model: Model, tokenizer: PreTrainedTokenizerBase, added: Sequence[int]) -> list[int]:
    """The tokens whose rows hold nothing yet: those `added` to the tokenizer, now or before it was given to us."""
    rows = _rows(model)
    beyond = {i for i in tokenizer.get_vocab().values() if i >= rows}
    if not beyond <= tokenizer.added_tokens_decoder.keys():
        raise TunesmithError(
            f"the tokenizer has token ids up to {max(beyond)}, and the model's embeddings have {rows} rows: it is the "
            "tokenizer of another model"
        )
    new = sorted(beyond.union(added))
    if new and isinstance(model, PeftModel):
        raise TunesmithError(
            f"the tokenizer has {len(new)} tokens that the model lacks, and the model has adapters already; call "
            "clone_chat_template(model, tokenizer, source_tokenizer_path) before adding them, or give the bare model "
            "and peft_config"
        )
    return new


def _refuse_tokens_beyond(model: Model, vocabulary: Vocabulary) -> None:
    """Raises for ids in the data that the embeddings have no row for. Tokens that no row uses are left alone."""
    rows = _rows(model)
    beyond = sorted(i for i in vocabulary.used or () if i >= rows)
    if beyond:
        raise TunesmithError(
            f"the data has tokens that the model lacks ({_named(beyond, vocabulary.tokenizer)}): its embeddings have "
            f"{rows} rows. If the tokens were added to the tokenizer, give the model rows for them before: "
            "model.resize_token_embeddings(len(tokenizer)); else it is the tokenizer of another model"
        )


def _rows(model: Model) -> int:
    """How many tokens the input embeddings have a row for, whatever `peft` has put around them."""
    embeddings = base_model(model).get_input_embeddings()
    rows = (getattr(module, "num_embeddings", None) for module in embeddings.modules())
    return next(number for number in rows if isinstance(number, int))


def _named(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return listing([f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids], 3)


def _with_adapters(
    model: Model,
    peft_config: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    new: Sequence[int],
    by_hand: Sequence[int],
) -> PeftModel:
    """With adapters that train the rows of tokens: those that are `new`, which are made here, and those that somebody
    made `by_hand`, which stay as they are until then."""
    if isinstance(model, PeftModel):
        raise TunesmithError(
            "the model has adapters and peft_config asks for more; merge them first (model.merge_and_unload()), "
            "or leave peft_config out to go on training them"
        )
    if new:
        # No padding rows: loading the adapters, `peft` grows the base model to as many rows as there are tokens.
        resize_for(model, tokenizer, new, None)
    if by_hand:
        logger.info("Trains the embeddings of tokens that the base model never saw: %s.", _named(by_hand, tokenizer))
    rows = sorted({*new, *by_hand})
    if rows:
        peft_config = train_new_tokens(peft_config, model, rows)
    adapted = adapt(model, peft_config)
    if rows:
        save_rows_only(adapted)
    return adapted


def router_coefficient(model: Model, args: Config) -> float:
    """What the load-balancing loss of a mixture of experts is multiplied by: what `args` says, else what the model's
    config says where that has `output_router_logits` on; 0 where it is not trained."""
    config = base_model(model).config.get_text_config()
    given = args.router_aux_loss_coef
    if given is None:
        return float(config.router_aux_loss_coef) if getattr(config, "output_router_logits", False) else 0.0
    return given


def ready_for_batches(model: Model, *, flat: bool, grouped: bool = False, routers: bool = False) -> bool:
    """Let the model answer objectives, with `routers` with its load-balancing loss; returns whether it takes flat
    batches. Says so when it can't, and whether rows will be `grouped` by length then."""
    base = base_model(model)
    if base.get_output_embeddings() is None:
        raise TunesmithError(f"{type(base).__name__} has no output layer over the vocabulary; use a causal LM class")
    if has_virtual_tokens(model):
        if routers:
            raise TunesmithError("router_aux_loss_coef: virtual tokens leave the experts as they are; set it to 0")
        logger.warning("Batches are padded: the adapters put tokens of their own in front of each row.")
        return False
    answer_objectives(base, routers=routers)
    if not flat:
        return False
    reason = supports_documents(base)
    if reason:
        logger.warning("Batches are padded%s: %s.", ", rows of like length together" if grouped else "", reason)
        return False
    use_documents(base)
    return True


def faster_layers(model: Model, args: Config) -> None:
    """Let the layers of `model` take the faster or the compiled way."""
    # On a GPU, torch.compile makes layers faster by itself.
    if not args.torch_compile or base_model(model).device.type == "cpu":
        speed_up(model, compiled=bool(args.torch_compile))
    if args.torch_compile:
        assert args.torch_compile_backend is not None
        compile_layers(base_model(model), backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def given_model(model: Any, model_init: Any = None) -> str | Model:
    """The model, or the first one that `model_init` makes. Raises TunesmithError for none, both, and what is none."""
    if (model is None) == (model_init is None):
        both = "model and model_init both say what is trained; give one" if model is not None else "model is missing"
        raise TunesmithError(f"{both}: a name, a folder, 'demo', or a loaded causal language model")
    if model_init is not None:
        model = model_init(*(None,) * number_of_arguments(model_init))
    return checked_model("model", model)


def checked_model(argument: str, given: Any) -> str | Model:
    """The model `given` in an `argument` of a trainer. Raises TunesmithError for what is none."""
    if isinstance(given, PathLike):
        return str(given)
    if isinstance(given, str | PreTrainedModel | PeftModel):
        return given
    hint = "; name the argument that this is for: args=..." if isinstance(given, TrainingArguments) else ""
    raise TunesmithError(
        f"{argument} is {type(given).__name__}; give a name, a folder, 'demo', or a loaded causal language model of "
        f"transformers or peft{hint}"
    )


HELD_OUT = {"test", "validation", "eval", "dev"}


def check_data_given(args: Config, train_dataset: Any) -> None:
    """Raises TunesmithError for no training data, for several splits of which one would be trained on, and for a stream
    without an end."""
    if train_dataset is None:
        raise TunesmithError("`train_dataset` is required: give a Dataset, an IterableDataset or a list of rows")
    if isinstance(train_dataset, DatasetDict | IterableDatasetDict) and train_dataset.keys() & HELD_OUT:
        splits = ", ".join(train_dataset)
        raise TunesmithError(f"train_dataset has the splits {splits}, of which one is to train on: dataset['train']")
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise TunesmithError("train_dataset is a stream of unknown length: set max_steps")
    _check_parts(args, train_dataset)
    check_trackers(args.report_to)
    check_optimizer(str(getattr(args.optim, "value", args.optim)), "cpu" if args.use_cpu else here().type)


def _check_parts(args: Config, train_dataset: Any) -> None:
    """Raises TunesmithError for a stream of which rows would be left out, or that `stream_parts` does not fit."""
    parts, processes = args.stream_parts, args.world_size
    if not isinstance(train_dataset, IterableDataset):
        if parts > 1:
            raise TunesmithError(
                f"stream_parts is {parts}, and train_dataset is no stream; give an IterableDataset, or leave it out"
            )
        return
    if processes > 1 and train_dataset._distributed is not None:
        raise TunesmithError(
            "train_dataset was split by `split_dataset_by_node`, and would be shared out among the processes a second "
            "time; give the whole stream, and write stream_parts, so that each process reads its own files"
        )
    if parts == 1:
        return
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    for number, problem, way in (
        (train_dataset.num_shards, parts > train_dataset.num_shards, "of which a stream has {}; write {} or less"),
        (processes, parts % processes, "which {} processes can't share evenly; write a multiple of {}"),
        (rows, rows % parts, "of which the {} rows of a step can't come evenly; write a divisor of {}"),
    ):
        if problem:
            raise TunesmithError(f"stream_parts is {parts} parts of whole files, {way.format(number, number)}")
    if args.dataloader_num_workers:
        raise TunesmithError(
            f"stream_parts is {parts}, whose processes agree on the end of an epoch while they read, and "
            f"dataloader_num_workers is {args.dataloader_num_workers}; write 0"
        )


def align_tokens(model: Model, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Make config, generation config and tokenizer agree: what ends a text, what pads.

    `ends` are the tokens that end the supervised texts; generation must stop at each of them.
    """
    base = base_model(model)
    config, generation = base.config.get_text_config(), getattr(base, "generation_config", None)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    if generation is not None:
        base.generation_config = generation = writable(generation)
        known = generation.eos_token_id
        known = [] if known is None else known if isinstance(known, list) else [known]
        stops = list(dict.fromkeys([tokenizer.eos_token_id, *known, *sorted(ends)]))
        generation.eos_token_id = stops[0] if len(stops) == 1 else stops
        generation.pad_token_id = tokenizer.pad_token_id


# Trackers


TRACKER_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "mlflow": "mlflow-skinny", "flyte": "flytekit"}
"""What is installed for a tracker, where it has another name."""
TRACKER_MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}


def check_trackers(report_to: str | Iterable[str] | None) -> None:
    """Raises TunesmithError for a tracker that `transformers` does not know, and for one that is not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    known = sorted([*INTEGRATION_TO_CALLBACK, "all", "none"])
    listed = ", ".join(known)
    for name in names:
        if name not in known:
            raise TunesmithError(f"report_to: no tracker is called {name!r}{nearest(name, known)}; there are {listed}")
        if name in ("all", "none") or _installed(TRACKER_MODULES.get(name, name)):
            continue
        package = TRACKER_PACKAGES.get(name, name)
        raise TunesmithError(f"report_to: {name} is not installed; run: pip install {package}")


def _installed(module: str) -> bool:
    # `transformers` takes either of the two.
    return find_spec(module) is not None or (module == "tensorboard" and find_spec("tensorboardX") is not None)
