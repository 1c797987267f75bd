"""What a run does: TRL's names and meanings on top of `transformers.TrainingArguments`.

`Config` is what all runs have, `SFTConfig` what supervised fine-tuning adds; other trainers have a module of their own.
"""
# ruff: noqa: RUF009  (`setting` is `dataclasses.field` with a line of help)

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from transformers import TrainingArguments

from tunesmith.errors import TunesmithError, nearest
from tunesmith.settings.coerce import byte_count, coerce, expected, members_of
from tunesmith.settings.older import by_todays_names
from tunesmith.text import shorten
from tunesmith.types import TrainOn

LossType = Literal["nll", "dft", "chunked_nll"]
PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Overlong = Literal["truncate", "drop", "split", "error"]
SelfTestMode = Literal["auto", "always", "off"]
SharePrefix = Literal["auto", "off"]
Shard = Literal["none", "grad", "full"]
OnBadRow = Literal["error", "skip"]
Turns = Literal["auto", "whole", "each"]
PromptMismatch = Literal["error", "accept"]
Marks = Literal["verified", "template"]
DropReasoning = Literal["note", "error"]
SpecialsInContent = Literal["keep", "text", "error"]
COMPILE_MODES = (None, "default", "max-autotune-no-cudagraphs")
"""The others record CUDA graphs, one for each length of a batch."""

FSDP_WORDS = ("true", "full_shard", "shard_grad_op", "offload", "auto_wrap")
"""What `fsdp` may say, of which the last is how it is always done."""
NO_LIMIT = ("max_grad_norm", "epsilon_high", "delta", "off_policy_mask_threshold", "vllm_importance_sampling_clip_max")
"""Settings that bound another value: infinity means no bound."""
FROM_ZERO = ("learning_rate", "weight_decay", "adam_epsilon", "dataloader_num_workers")
LARGEST_SEED = 2**32 - 1
"""That NumPy takes."""
LARGEST_WHOLE = 2**63 - 1
UNSUPPORTED = {
    "use_liger_kernel": "Liger replaces the forward that computes our loss, which never makes the full logits either",
    "liger_kernel_config": "Liger is not used; leave it unset",
    "use_cache": "training computes without a cache, whose entries it would never read; leave it off",
}
"""Settings of TRL and `transformers` that are refused, unless they are off, and why."""


def setting(default: Any, help: str, *, parsed: bool = True) -> Any:
    """A field. `parsed`: `HfArgumentParser` makes an argument of it; otherwise, only `accept_older_names` takes it."""
    return field(default=default, metadata={"help": help}, init=parsed)


@dataclass
class Config(TrainingArguments):
    """Settings of any run.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 2e-5, `logging_steps` 10, `bf16` None: `precision` decides. With "auto", a trainer settles it by
    measuring the device.

    A value that can't be what the user meant raises TunesmithError when the config is made.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "dataset_kwargs",
        "chat_template_kwargs",
        "columns",
    ]

    precision_note = ""  # how `precision: auto` was settled, for the run to print

    learning_rate: float = setting(2e-5, "Peak learning rate; LoRA wants about ten times more.")
    logging_steps: float = setting(10, "Log every so many steps; below 1, a share of the run.")
    precision: Precision = setting("auto", "auto measures the device | fp32 | bf16 | fp16.")
    bf16: bool | None = setting(  # type: ignore[assignment]
        None, "TRL's way to say precision: bf16 (true), or not (false)."
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments of `from_pretrained`, for a model given by name."
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model. Off: such a model is an error."
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "Weight of the load-balancing loss of a mixture of experts; unset, that of the model's config where it has "
        "output_router_logits on.",
    )
    chat_template_path: str | None = setting(
        None,
        "chatml | llama3 | zephyr | mistral | gemma | alpaca | plain, a .jinja file, or a model or folder whose "
        "tokenizer has the chat template; missing tokens are added.",
    )
    eos_token: str | None = setting(None, "The token that ends a text; from the vocabulary.")
    pad_token: str | None = setting(None, "The padding token; from the vocabulary.")

    # The data
    columns: dict[str, str] | str | None = setting(
        None, "Our column names to the data's, e.g. {instruction: question, output: answer}."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments of the chat template for every row, e.g. {enable_thinking: false}."
    )
    dataset_kwargs: dict[str, Any] | str | None = setting(
        None, "{skip_prepare_dataset: true} hands the data set to the collator as it is."
    )
    dataset_num_proc: int | None = setting(None, "Processes that prepare the data; unset, one.")
    max_length: int | None = setting(1024, "Most tokens of an example, and of a pack; null: no limit.")
    on_bad_row: OnBadRow = setting(
        "error", "A row that can't be read or used: error | skip (counted, and kept in skipped_rows.jsonl)."
    )
    merge_turns: bool = setting(False, "Join neighbouring messages of one role by a blank line.")
    overlong: Overlong = setting("truncate", "Examples over max_length: truncate | drop | split | error.")
    truncation_mode: str = setting("keep_start", "Only 'keep_start': TRL's 'keep_end' would cut a prompt's beginning.")
    shuffle_dataset: bool = setting(False, "Shuffle the data set once, before packing, by `seed`.")
    shuffle_buffer_size: int = setting(1000, "Rows of a stream in memory while shuffle_dataset shuffles it.")
    stream_parts: int = setting(
        1, "Parts in which a stream is read, by file, so that each process reads only its own; 1: each reads all of it."
    )

    # What is trained on
    turns: Turns = setting(
        "auto",
        "A conversation as one text (whole), as a text for each answer as inference sees it (each), or auto: whole "
        "where that is what inference sees, else each.",
    )
    prompt_mismatch: PromptMismatch = setting(
        "error",
        "With turns: whole, answers in the form that history has, though inference renders another prompt: error "
        "| accept.",
    )
    marks: Marks = setting(
        "verified",
        "Of a template with {% generation %} blocks: verified (supervise what the model generates, note a difference) "
        "| template (the blocks).",
    )
    drop_reasoning: DropReasoning = setting(
        "note", "Rows with reasoning that the chat template does not show: note (count them) | error."
    )
    specials_in_content: SpecialsInContent = setting(
        "keep",
        "Text of a message that reads as a control token: keep (it is one, as with other tools) | text (ordinary "
        "characters) | error.",
    )
    allow_no_eos: bool = setting(False, "Accept data in which no supervised token ends a text: the model won't stop.")

    # Batches
    packing: bool = setting(False, "Fill rows of max_length tokens with several examples.")
    packing_strategy: PackingStrategy = setting("bfd", "bfd (truncates), bfd_split (splits), wrapped (cuts anywhere).")
    eval_packing: bool | None = setting(None, "Pack the eval data too; unset, as `packing`.")
    max_tokens_per_batch: int | None = setting(
        None,
        "Micro-batches of as many examples as fit in so many tokens (padding counts), in place of "
        "per_device_train_batch_size rows.",
    )
    share_prefix: SharePrefix = setting(
        "auto",
        "Compute a prefix that examples of a batch share only once: auto (where it saves a tenth of the tokens) | off.",
    )
    padding_free: bool = setting(True, "Batches without padding; false pads, for comparison or an odd model.")
    pad_to_multiple_of: int | str | None = setting(
        None, "Pad rows to a multiple of this many tokens; needs padding_free: false."
    )
    activation_offloading: bool = setting(
        False, "Keep what the backward pass needs in main memory; saves GPU memory, and costs time."
    )
    self_test: SelfTestMode = setting(
        "auto",
        "Before the first step, compare a few examples in one batch with each alone in the model's own forward: "
        "auto (where that is possible) | always | off.",
    )
    max_bad_steps: int = setting(
        5, "Stop after so many steps in a row without a finite gradient; a single one is skipped."
    )
    shard: Shard = setting(
        "none",
        "What several processes share out: none (each has the whole model) | grad (gradients and the optimizer's "
        "state) | full (weights, too).",
    )
    cpu_offload: bool = setting(
        False, "With shard: weights, gradients and the optimizer's state are in main memory while nothing needs them."
    )
    memory_limit: str | None = setting(
        None, "On a CPU: split micro-batches rather than hold more main memory than this, such as 12GB."
    )
    rehearse: SelfTestMode = setting(
        "auto",
        "Try the largest micro-batch before the first step, so that memory runs out at once or never: auto (in "
        "runs of 50 steps or more, and with memory_limit) | always | off.",
    )
    allow_pickle: bool = setting(
        False,
        "Read weights (.bin) and checkpoints of other tools that are pickles; only plain data is taken from them.",
    )
    force_resume: bool = setting(
        False,
        "Resume although data, settings or model have changed. What is in the optimizer's state (learning rate, "
        "weight decay, betas) stays the checkpoint's.",
    )
    async_save: bool = setting(
        False, "Write checkpoints in a thread, from a copy in main memory, while training goes on."
    )
    sample_prompts: int = setting(
        0,
        "So many prompts, held-out ones if there are any, are answered before training, with each evaluation "
        "and at the end; it costs the time of so many answers of up to 128 tokens.",
    )
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+ (arXiv:2402.12354): LoRA's B matrices learn so many times as fast as its A matrices."
    )

    def __post_init__(self) -> None:
        self._read_numbers()
        self._check_choices()
        self._check_mismatch()
        self._check_batches()
        self._check_padding()
        self._check_finite()
        self._check_ranges()
        self._check_numbers()
        self._refuse_unsupported()
        self._resolve_precision()
        self._resolve_shard()
        self._resolve_backend()
        super().__post_init__()
        self._gather_where_saved()
        self._check_sampling()
        self._check_processes()
        self._check_shard()
        self._check_token_batches()
        self._check_compile()
        if self.activation_offloading and self.device.type in ("cpu", "mps"):
            raise TunesmithError(
                f"activation_offloading is True, but this run is on {self.device.type}, where activations are in main "
                "memory already; leave it off, and use gradient_checkpointing to save memory"
            )
        for name in ("columns", "chat_template_kwargs", "dataset_kwargs", "model_init_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise TunesmithError(f"{name} is {value!r}; write an object, e.g. {{key: value}}")
        init: Any = self.model_init_kwargs or {}
        self.trust_remote_code = self.trust_remote_code or bool(init.get("trust_remote_code"))
        unknown = set(self.dataset_kwargs or {}) - {"skip_prepare_dataset"}
        if unknown:
            raise TunesmithError(
                f"dataset_kwargs: {min(unknown)!r} is unknown; the one key is skip_prepare_dataset. Special tokens are "
                "where the chat template puts them, and texts get those of the tokenizer: leave other keys out"
            )

    @property
    def resolved_train_on(self) -> TrainOn | None:
        """What of a row is supervised; None leaves it to the format of the rows."""
        return None

    @property
    def text_column(self) -> str:
        """The column with plain text."""
        return "text"

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        return values | {name: getattr(self, name) for name in settable(type(self)) if name not in values}

    @property
    def cuts_prompt(self) -> bool:
        """Whether an overlong row loses the front of its prompt rather than the end of its completion."""
        return False

    def _check_choices(self) -> None:
        if self.packing_strategy == "bfd-requeue":  # type: ignore[comparison-overlap]  # its name in TRL, once
            self.packing_strategy = "bfd_split"
        ours = own_settings(type(self))
        kinds = kinds_of(type(self))
        for item in fields(self):
            members = (kinds[item.name], *get_args(kinds[item.name]))
            choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
            value = getattr(self, item.name)
            if item.name in ours and choices and value is not None and value not in choices:
                hint = nearest(str(value), choices)
                raise TunesmithError(f"{item.name} is {value!r}; choose {' | '.join(choices)}{hint}")

    def _read_numbers(self) -> None:
        """Reads numbers that are texts, as `yaml.safe_load` takes `2e-4` for one. None is only what may be unset."""
        if self.max_grad_norm is None:  # as earlier versions of transformers write what is 0 today: no clipping
            self.max_grad_norm = 0.0
        for name, kind in kinds_of(type(self)).items():
            value, members = getattr(self, name, None), members_of(kind)
            if not {int, float} & {*members} or str in members or not isinstance(value, str | None):
                continue
            try:
                setattr(self, name, coerce(value, kind))
            except ValueError as error:
                raise TunesmithError(f"{name} is {value!r}; write {expected(kind)}") from error

    def _check_finite(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                if value > 0 and item.name in NO_LIMIT:
                    continue
                raise TunesmithError(f"{item.name} is {value}; write a finite number")
            if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
                raise TunesmithError(f"{item.name} is {shorten(str(value))}; at most {LARGEST_WHOLE} can be counted")

    def _check_ranges(self) -> None:
        """Numbers that PyTorch or NumPy would refuse when the run begins, or that would train nothing."""
        for name in FROM_ZERO:
            if getattr(self, name) < 0:
                raise TunesmithError(f"{name} is {getattr(self, name)}; write 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TunesmithError(f"{name} is {getattr(self, name)}; write a number from 0 to below 1")
        for name in ("seed", "data_seed"):
            seed = getattr(self, name)
            if seed is not None and not 0 <= seed <= LARGEST_SEED:
                raise TunesmithError(f"{name} is {seed}; write a whole number from 0 to {LARGEST_SEED}")
        if self.num_train_epochs < 0 and self.max_steps <= 0:
            raise TunesmithError(
                f"num_train_epochs is {self.num_train_epochs}; write how often to go through the data, or max_steps"
            )

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise TunesmithError(f"{name} is {getattr(self, name)}; write 1 or more")
        if self.eval_accumulation_steps is not None and self.eval_accumulation_steps < 1:
            raise TunesmithError(f"eval_accumulation_steps is {self.eval_accumulation_steps}; write 1 or more")
        if self.logging_strategy == "steps" and not self.logging_steps > 0:
            raise TunesmithError(
                f"logging_steps is {self.logging_steps}; write 1 to log each step, or set logging_strategy: no"
            )
        if self.memory_limit is not None:
            try:
                byte_count(self.memory_limit)
            except ValueError as error:
                raise TunesmithError(f"memory_limit {error}") from error
        if self.max_bad_steps < 1:
            raise TunesmithError(f"max_bad_steps is {self.max_bad_steps}; the run can stop after 1 at the earliest")
        if self.shuffle_buffer_size < 2:
            raise TunesmithError(f"shuffle_buffer_size is {self.shuffle_buffer_size}; 2 rows or more can be shuffled")
        if self.stream_parts < 1:
            raise TunesmithError(f"stream_parts is {self.stream_parts}; write 1 or more")
        if self.dataset_num_proc is not None and self.dataset_num_proc < 1:
            raise TunesmithError(f"dataset_num_proc is {self.dataset_num_proc}; write 1 or more processes")
        if self.sample_prompts < 0:
            raise TunesmithError(f"sample_prompts is {self.sample_prompts}; write 0 for none, or how many")
        if self.loraplus_lr_ratio is not None and not self.loraplus_lr_ratio > 0:
            raise TunesmithError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}; write a number above 0, such as 16")

    def _check_padding(self) -> None:
        """TRL takes text here, too: auto and none, and a number as its CLI gives it."""
        text = str(self.pad_to_multiple_of).lower()
        self.pad_to_multiple_of, written = None, self.pad_to_multiple_of
        if text in ("auto", "none", "null"):
            return
        if not text.isdecimal() or int(text) < 1:
            raise TunesmithError(f"pad_to_multiple_of is {written!r}; write a number of tokens from 1 on")
        if self.padding_free:
            raise TunesmithError(
                f"pad_to_multiple_of is {text}, but batches have no padding; drop it, or set padding_free: false"
            )
        self.pad_to_multiple_of = int(text)

    def _check_mismatch(self) -> None:
        if self.prompt_mismatch == "accept" and self.turns != "whole":
            raise TunesmithError(
                f"prompt_mismatch: accept is for turns: whole, and turns is {self.turns}; write turns: whole, or leave "
                "prompt_mismatch out"
            )

    def _check_batches(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise TunesmithError(f"max_length is {self.max_length}; at least 2 tokens are needed to predict one")
        if self.packing and self.max_length is None:
            raise TunesmithError("packing needs max_length, the size of a pack; it is None")
        if self.packing and self.packing_strategy != "bfd" and self.overlong != "truncate":
            raise TunesmithError(
                f"overlong is {self.overlong!r}, but packing_strategy: {self.packing_strategy} cuts every long example "
                "into pieces itself; drop one of them"
            )
        if self.packing and not self.padding_free:
            raise TunesmithError("packing puts examples side by side, which padding_free: false forbids; drop one")
        if self.truncation_mode != "keep_start":
            raise TunesmithError(
                f"truncation_mode is {self.truncation_mode!r}; only 'keep_start' is supported. "
                "To keep the end of long prompts use truncate_prompt: true"
            )

    def _check_sampling(self) -> None:
        strategies = ("random", "sequential", "group_by_length", "group_by_prefix", "batch_rebalance")
        if self.train_sampling_strategy not in strategies:
            hint = nearest(self.train_sampling_strategy, strategies)
            raise TunesmithError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; choose {' | '.join(strategies)}{hint}"
            )
        if self.train_sampling_strategy != "group_by_prefix":
            return
        for name, value, reason in (
            ("share_prefix", self.share_prefix == "off", "computes nothing once"),
            ("packing", self.packing, "makes rows of examples that do not begin alike"),
            ("padding_free", not self.padding_free, "computes each row alone"),
        ):
            if value:
                raise TunesmithError(
                    f"train_sampling_strategy is 'group_by_prefix', so that a batch computes once what its rows begin "
                    f"with, and {name}: {getattr(self, name)} {reason}; drop one"
                )

    def _check_processes(self) -> None:
        """Several processes train what one would; what asks for something else is refused."""
        if self.world_size == 1:
            return
        accelerator: Any = self.accelerator_config
        if not self.average_tokens_across_devices:
            raise TunesmithError(
                "average_tokens_across_devices is False, which divides the loss of each process by its own tokens: "
                f"{self.world_size} processes would train otherwise than one. Leave it at True"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise TunesmithError(
                "train_sampling_strategy is 'batch_rebalance', and rows are dealt out to processes by their tokens "
                "already; leave it out, or take group_by_length"
            )
        if accelerator.split_batches:
            raise TunesmithError(
                "accelerator_config.split_batches is True, which divides a batch among processes; leave it out, and "
                "write per_device_train_batch_size as the rows of one process"
            )
        if accelerator.dispatch_batches:
            raise TunesmithError(
                "accelerator_config.dispatch_batches is True, which lets one process read for the others, and fills a "
                "short last batch with rows that were trained on; leave it out, and each process reads its part"
            )

    def _resolve_shard(self) -> None:
        """`fsdp` of `transformers` says what `shard` and `cpu_offload` say; it is off then, since `accelerate` shares
        nothing out."""
        if self.fsdp_config:
            raise TunesmithError(
                "fsdp_config is for accelerate, which shares nothing out here; leave it out, and write shard: full or "
                "grad, cpu_offload and gradient_checkpointing"
            )
        given: Any = self.fsdp
        self.fsdp = None
        words = given.split() if isinstance(given, str) else list(given) if isinstance(given, list) else []
        if not given or words == ["false"]:
            return
        if unknown := [word for word in words if word not in FSDP_WORDS]:
            raise TunesmithError(f"fsdp is {given!r}, and {unknown[0]!r} is not known here; write shard: full or grad")
        named: Shard = "grad" if "shard_grad_op" in words else "full"
        if self.shard not in ("none", named):
            raise TunesmithError(f"fsdp is {given!r}, and shard is {self.shard}; keep shard")
        self.shard, self.cpu_offload = named, self.cpu_offload or "offload" in words

    def _resolve_backend(self) -> None:
        """Gradients in main memory are summed there, those on GPUs by NCCL."""
        if self.cpu_offload and self.ddp_backend is None and torch.cuda.is_available() and not self.use_cpu:
            self.ddp_backend = "cuda:nccl,cpu:gloo"

    def _gather_where_saved(self) -> None:
        """DeepSpeed's third stage would leave weights in parts, in pickle files, at the end of a run."""
        config = getattr(self, "hf_deepspeed_config", None)
        if config is not None and config.is_zero3():
            config.config["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)

    def _check_shard(self) -> None:
        if self.shard == "none":
            if self.cpu_offload:
                raise TunesmithError("cpu_offload is True, and shard is none; write shard: full, or drop it")
            return
        if self.cpu_offload and self.device.type == "cpu":
            raise TunesmithError("cpu_offload is True, but this run is on cpu, which has nothing to move away; drop it")
        if self.world_size == 1:
            return
        for name, value, reason in (
            ("deepspeed", self.deepspeed, "which shares weights out itself"),
            ("precision: fp16", self.fp16, "whose scale each process would find for itself; bf16 has none"),
            ("activation_offloading", self.activation_offloading, "which would keep gathered weights"),
            ("auto_find_batch_size", self.auto_find_batch_size, "and processes can't all begin again"),
        ):
            if value:
                raise TunesmithError(f"shard is {self.shard}, and {name} is set, {reason}; drop one")

    @property
    def place_model_on_device(self) -> bool | None:
        """None leaves it to `transformers`. Weights that are shared out go to the device in parts."""
        shared = self.shard == "full" and self.world_size > 1
        return False if shared and not getattr(self, "precompute_ref_log_probs", False) else None

    def _check_token_batches(self) -> None:
        """What says how many rows share a batch, or which, contradicts batches by tokens."""
        if self.max_tokens_per_batch is None:
            return
        if self.max_tokens_per_batch < 2:
            raise TunesmithError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}; at least 2 tokens are needed to predict one"
            )
        accelerator: Any = self.accelerator_config
        others: dict[str, tuple[Any, Any]] = {  # what is set, and what would not contradict
            "per_device_train_batch_size": (self.per_device_train_batch_size, 8),
            "packing": (self.packing, False),
            "eval_packing": (bool(self.eval_packing), False),
            "train_sampling_strategy": (self.train_sampling_strategy, "random"),
            "auto_find_batch_size": (self.auto_find_batch_size, False),
            "dataloader_drop_last": (self.dataloader_drop_last, False),
            "accelerator_config.split_batches": (accelerator.split_batches, False),
            "accelerator_config.dispatch_batches": (bool(accelerator.dispatch_batches), False),
        }
        for name, (value, neutral) in others.items():
            if value != neutral:
                raise TunesmithError(
                    f"{name} is {value!r}, and max_tokens_per_batch: {self.max_tokens_per_batch} makes batches "
                    "by tokens; drop one"
                )

    def _check_compile(self) -> None:
        if not self.torch_compile:
            return
        if self.torch_compile_mode not in COMPILE_MODES:
            raise TunesmithError(
                f"torch_compile_mode is {self.torch_compile_mode!r}, which records a CUDA graph for each length, and "
                f"every batch has another; choose {' | '.join(mode for mode in COMPILE_MODES if mode)}"
            )
        for name, value, reason in (
            ("gradient_checkpointing", self.activation_checkpointing, "whose recomputed layers it leaves as they are"),
            ("deepspeed", self.deepspeed, "which gathers weights inside the layers that are compiled"),
        ):
            if value:
                raise TunesmithError(f"torch_compile is True, and so is {name}, {reason}; drop one")

    def _refuse_unsupported(self) -> None:
        if (self.router_aux_loss_coef or 0.0) < 0:
            raise TunesmithError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}; a weight of 0 or more, such as 0.001, is needed"
            )
        for name, reason in UNSUPPORTED.items():
            if value := getattr(self, name):
                raise TunesmithError(f"{name} is {value!r}: {reason}")
        strategy = str(getattr(self.hub_strategy, "value", self.hub_strategy))
        if self.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
            raise TunesmithError(
                f"hub_strategy is {strategy}, which sends the optimizer's state; take every_save or end, which send "
                "what others can use"
            )

    def _resolve_precision(self) -> None:
        """Make `precision` and the flags `bf16` and `fp16` that `transformers` reads say the same. Where none of them
        is given, all stay open until a run starts (`model.precision.settle_precision`)."""
        flagged: Precision | None = None
        if self.bf16 is not None or self.fp16:
            flagged = "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"
        if self.precision == "auto":
            self.precision = flagged or "auto"
        elif flagged not in (None, self.precision):
            raise TunesmithError(
                f"precision is {self.precision!r}, but bf16 and fp16 say {flagged}; set only precision"
            )
        if self.precision != "auto":
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        if not self.use_cpu and torch.accelerator.current_accelerator(check_available=True) is None:
            self.use_cpu = True  # `transformers` allows bf16 without a GPU only with this said
        if self.use_cpu:
            self.dataloader_pin_memory = False  # there is no device to pin for, and torch would warn


@dataclass
class SFTConfig(Config):
    """Settings of a supervised fine-tuning run.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 2e-5, `logging_steps` 10, `bf16` None: `precision` decides. With "auto", a trainer settles it by
    measuring the device.

    A value that can't be what the user meant raises TunesmithError when the config is made.
    """

    dataset_text_field: str = setting("text", "The column with plain text.")
    truncate_prompt: bool = setting(False, "Shorten an overlong row's prompt from the left instead of its completion.")
    train_on: TrainOn | None = setting(
        None,
        "assistant | last_assistant | completion | all. Unset: the completion of prompt-completion rows, else all.",
    )
    completion_only_loss: bool | None = setting(None, "TRL's name for train_on: completion (true) or all (false).")
    assistant_only_loss: bool = setting(False, "TRL's name for train_on: assistant.")
    loss_type: LossType = setting("nll", "nll, or dft (Dynamic Fine-Tuning, arXiv:2508.05629); chunked_nll is nll.")

    def __post_init__(self) -> None:
        self._check_supervision()
        super().__post_init__()
        if self.loss_type == "chunked_nll":
            self.loss_type = "nll"

    @property
    def resolved_train_on(self) -> TrainOn | None:
        """What the three fields say together; None leaves it to the format of the rows."""
        if self.train_on is not None:
            return self.train_on
        if self.assistant_only_loss and not self.completion_only_loss:
            return "assistant"
        if self.completion_only_loss is None:
            return None
        return "completion" if self.completion_only_loss else "all"

    @property
    def text_column(self) -> str:
        return self.dataset_text_field

    @property
    def cuts_prompt(self) -> bool:
        return self.truncate_prompt

    def _check_supervision(self) -> None:
        named = {
            "train_on": self.train_on,
            "assistant_only_loss": "assistant" if self.assistant_only_loss else None,
            "completion_only_loss": "completion" if self.completion_only_loss else None,
        }
        if self.completion_only_loss is False and self.train_on == "completion":
            named["completion_only_loss"] = "not completion"
        if self.assistant_only_loss and self.completion_only_loss:
            del named["assistant_only_loss"]  # of a completion, only the assistant's turns are trained on anyway
        choices = {name: value for name, value in named.items() if value is not None}
        if len(set(choices.values())) > 1:
            listed = " and ".join(f"{name} ({value})" for name, value in choices.items())
            raise TunesmithError(f"{listed} contradict each other; set only train_on")


def own_settings(kind: type[TrainingArguments]) -> set[str]:
    """The settings of a config that are ours: those that `transformers` lacks, and those that have another default."""
    ours = kind.__mro__[: kind.__mro__.index(TrainingArguments)]
    return {name for base in ours for name in vars(base).get("__annotations__", ())}


def kinds_of(kind: type[TrainingArguments]) -> dict[str, Any]:
    """The types of settings as they are written. Those of `fields` are changed by HfArgumentParser: no None, no
    choices."""
    return {
        name: item for base in reversed(kind.__mro__) for name, item in vars(base).get("__annotations__", {}).items()
    }


def settable(kind: type[TrainingArguments]) -> list[str]:
    """The names of the settings that a config is made of."""
    return [item.name for item in fields(kind) if item.init or "help" in item.metadata]


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """The settings that make a config like `args`; `to_dict` blacks out every token, also those of the tokenizer."""
    settings: dict[str, Any] = args.to_dict()
    return settings | {name: getattr(args, name) for name in settings if name.endswith("_token")}


def accept_older_names(kind: type[Config]) -> None:
    """`SFTConfig(evaluation_strategy="steps")` means what it meant; a name that is unknown or gone is our error."""
    make, names = kind.__init__, settable(kind)
    unparsed = {*names} - {item.name for item in fields(kind) if item.init}

    @functools.wraps(make)
    def init(self: Config, *args: Any, **settings: Any) -> None:
        settings = by_todays_names(settings, names, kind.__name__)
        for name in unparsed & settings.keys():
            setattr(self, name, settings.pop(name))
        make(self, *args, **settings)

    kind.__init__ = init  # type: ignore[method-assign]


accept_older_names(SFTConfig)
