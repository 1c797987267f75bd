"""Writes what pages say of settings and options, from the fields and the parser themselves: all of `settings.md`, and
the tables of options in `commands.md`.

    python docs/reference.py
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from typer.main import get_command

from tunesmith.cli.main import app
from tunesmith.settings.coerce import members_of
from tunesmith.settings.config import UNSUPPORTED
from tunesmith.settings.policy import NOT_HERE
from tunesmith.settings.recipe import KEYS, Setting, all_settings

SETTINGS = Path(__file__).with_name("settings.md")
COMMANDS = Path(__file__).with_name("commands.md")
OPTIONS = re.compile(r"(?<=<!-- options of )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
VALUES: dict[Any, str] = {str: "TEXT", list[str]: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}
"""What stands for a value of an option that doesn't say it itself."""
OF_EVERY_COMMAND = {"--quiet", "--json", "--help"}
LISTED = 5
"""A setting with more choices than this has them behind its help."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings of one kind: `names` in the order of the page, apart by spaces."""

    title: str
    text: str
    names: str


HEADER = """# Settings

<!-- Written by docs/reference.py from the fields of SFTConfig. Their help is changed there. -->

Each setting is a line of a recipe (`max_length: 2048`), an option of `tunesmith train`, `check`, `inspect` and `plan`
(`--max-length 2048`), and a field of `SFTConfig` in Python (`max_length=2048`).

These are in recipes and on the command line only: {keys}.
In Python, `SFTTrainer` is given what they name, and `output` is `output_dir`.

Fields of `transformers.TrainingArguments` mean what they mean there. Which fields TRL has, and which it has not, is on
the page [Moving from TRL](trl.md). In a recipe, *unset* is `null`. A name that is no setting, a value of another type,
and settings that contradict each other are errors. `tunesmith train --fields` prints this list.
"""
GROUPS = (
    Group(
        title="Model and chat template",
        text="More on [chat templates](templates.md).",
        names="model model_init_kwargs trust_remote_code chat_template_path chat_template_kwargs eos_token pad_token "
        "router_aux_loss_coef trainer",
    ),
    Group(
        title="Data",
        text="More on [data](data.md), named sources among it.",
        names="data eval_data split eval_split columns dataset_text_field on_bad_row merge_turns shuffle_dataset "
        "shuffle_buffer_size stream_parts dataset_num_proc dataset_kwargs remove_unused_columns label_names",
    ),
    Group(
        title="What is trained on, and the loss",
        text="More on [masks](templates.md).",
        names="train_on completion_only_loss assistant_only_loss turns prompt_mismatch marks drop_reasoning "
        "specials_in_content allow_no_eos loss_type label_smoothing_factor "
        "neftune_noise_alpha average_tokens_across_devices",
    ),
    Group(
        title="Length and packing",
        text="More on [long rows](data.md#long-rows) and on [packing](speed.md).",
        names="max_length overlong truncate_prompt truncation_mode packing packing_strategy eval_packing padding_free "
        "pad_to_multiple_of share_prefix",
    ),
    Group(
        title="Adapters, 8 and 4 bits",
        text="More on [adapters](adapters.md), with all keys of `lora`.",
        names="lora quantize loraplus_lr_ratio",
    ),
    Group(
        title="Batches, steps and their order",
        text="",
        names="per_device_train_batch_size gradient_accumulation_steps max_tokens_per_batch num_train_epochs max_steps "
        "auto_find_batch_size train_sampling_strategy length_column_name dataloader_drop_last seed data_seed "
        "full_determinism",
    ),
    Group(
        title="Optimizer and learning rate",
        text="With `lora`, the learning rate of a recipe is 2e-4 unless it says another.",
        names="learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm",
    ),
    Group(
        title="Precision, speed and memory",
        text="More on [speed](speed.md) and [memory](memory.md).",
        names="precision bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs activation_offloading memory_limit rehearse torch_compile "
        "torch_compile_backend torch_compile_mode torch_empty_cache_steps",
    ),
    Group(
        title="Checks, checkpoints and resuming",
        text="More on [reliability](reliability.md).",
        names="output output_dir self_test max_bad_steps save_strategy save_steps save_total_limit save_only_model "
        "save_on_each_node async_save enable_jit_checkpoint resume_from_checkpoint force_resume allow_pickle "
        "ignore_data_skip restore_callback_states_from_checkpoint load_best_model_at_end metric_for_best_model "
        "greater_is_better",
    ),
    Group(
        title="Evaluation and samples",
        text="More on [results and scores](results.md).",
        names="eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size sample_prompts "
        "bf16_full_eval fp16_full_eval prediction_loss_only batch_eval_metrics include_for_metrics "
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object",
    ),
    Group(
        title="Logs and trackers",
        text="More on [what a run leaves](results.md).",
        names="logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level "
        "log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id",
    ),
    Group(
        title="Publishing",
        text="More on [the hub](adapters.md#the-hub).",
        names="push_to_hub hub_model_id hub_private_repo hub_strategy hub_revision hub_token hub_always_push",
    ),
    Group(
        title="Devices and processes",
        text="More on [several processes](scale.md).",
        names="processes max_restarts shard cpu_offload use_cpu fsdp fsdp_config deepspeed accelerator_config "
        "parallelism_config ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_find_unused_parameters "
        "ddp_broadcast_buffers ddp_static_graph "
        "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers "
        "dataloader_multiprocessing_context dataloader_in_order dataloader_pin_memory debug "
        "skip_memory_metrics local_rank do_train do_eval do_predict",
    ),
)


# Settings


def settings_page() -> str:
    """What `settings.md` is to hold. Raises ValueError for a setting that is in no group, or in two."""
    known = all_settings()
    named = [name for group in GROUPS for name in group.names.split()] + list(UNSUPPORTED)
    odd = sorted({name for name in named if named.count(name) > 1} | (set(named) ^ set(known)))
    if odd:
        raise ValueError(f"each setting has one place in GROUPS; these have none, or two, or are no settings: {odd}")
    keys = ", ".join(f"`{name}`" for name in KEYS)
    groups = "".join(_group(group, known) for group in GROUPS)
    return HEADER.format(keys=keys) + groups + _others() + _policies() + _refused(known)


def _others() -> str:
    """What other commands than `tunesmith train` have beside the settings of all runs."""
    supervised, parts = all_settings(), ""
    for title, trainer, config, page in (
        ("Pairs of answers", "dpo", "DPOConfig", "preferences"),
        ("Judged answers", "kto", "KTOConfig", "preferences"),
        ("Reward models", "reward", "RewardConfig", "preferences"),
        ("A teacher", "distill", "DistillationConfig", "distillation"),
    ):
        known = all_settings(trainer)
        text = f"Of `tunesmith {trainer}` and `{config}` only; more on [{page}]({page}.md)."
        own = {name for name in known if name not in supervised or known[name].help != supervised[name].help}
        names = " ".join(name for name in known if name in own - {"learning_rate"})
        parts += _group(Group(title=title, text=text, names=names), known)
    return parts


def _policies() -> str:
    """What `tunesmith grpo` and `tunesmith rloo` have beside the settings of all runs."""
    others, parts = all_settings(), ""
    titles = (("Rewards of answers, by groups", "grpo", "GRPOConfig"), ("Leave-one-out", "rloo", "RLOOConfig"))
    for title, trainer, config in titles:
        known = all_settings(trainer)
        text = f"Of `tunesmith {trainer}` and `{config}` only; more on [policies](policies.md)."
        if trainer == "rloo":
            text += " The others are those of GRPO."
        own = [name for name in known if name not in NOT_HERE]
        names = [name for name in own if name not in others or known[name].default != others[name].default]
        if trainer == "rloo":
            grpo = all_settings("grpo")
            names = [name for name in names if name not in grpo or known[name].default != grpo[name].default]
        parts += _group(Group(title=title, text=text, names=" ".join(names)), known)
    items = "".join(f"- `{name}`: {_marked(reason, known)}.\n" for name, (_, reason) in NOT_HERE.items())
    return (
        parts + f"\n### Names of TRL that change nothing\n\nTaken at TRL's default, and refused at others.\n\n{items}"
    )


def _group(group: Group, known: Mapping[str, Setting]) -> str:
    text = f"{group.text}\n\n" if group.text else ""
    return f"\n## {group.title}\n\n{text}" + "".join(_item(name, known) for name in group.names.split())


def _item(name: str, known: Mapping[str, Setting]) -> str:
    """A list, because a table with these names is wider than a telephone."""
    setting = known[name]
    choices = _choices(setting.kind)
    one_of = f" One of {_listed(choices)}." if len(choices) > LISTED else ""
    about = " · ".join(filter(None, [f"`{name}`", _kind(setting), _default(setting)]))
    return f"- {about}<br>\n  {_marked(setting.help, known)}{one_of}\n"


def _refused(known: Mapping[str, Setting]) -> str:
    items = "".join(f"- `{name}`: {_marked(reason, known)}.\n" for name, reason in UNSUPPORTED.items())
    return f"\n## Refused\n\nThese are refused unless they are off.\n\n{items}"


def _choices(kind: Any) -> list[str]:
    found: list[Any] = []
    for member in members_of(kind):
        if isinstance(member, type) and issubclass(member, Enum):
            found += [item.value for item in member]
        found += get_args(member) if get_origin(member) is Literal else []
    return [_word(choice) for choice in found]


def _kind(setting: Setting) -> str:
    """The values that it takes. That null is among them its default says, where that is null."""
    choices, words = _choices(setting.kind), []
    if choices:
        words.append("a name" if len(choices) > LISTED else _listed(choices))
    origins = [get_origin(member) or member for member in members_of(setting.kind)]
    names = {bool: "`true`, `false`", int: "whole number", float: "number", dict: "object", list: "list", str: "text"}
    words += [word for kind, word in names.items() if kind in origins]
    if type(None) in origins and setting.default is not None and setting.default is not MISSING:
        words.append("`null`")
    return ", ".join(words) or "an object, in Python"


def _default(setting: Setting) -> str:
    value = getattr(setting.default, "value", setting.default)
    if value is MISSING:
        return ""
    if value is None:
        return "unset"
    return "default " + ("empty" if value in ("", []) else f"`{_word(value)}`")


def _word(value: Any) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(choices: list[str]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices)


def _marked(text: str, known: Mapping[str, Setting]) -> str:
    """`text` with the names of settings as code; one without an underscore may be a word."""
    names = "|".join(sorted((name for name in known if "_" in name), key=len, reverse=True))
    parts = text.split("`")
    parts[::2] = [re.sub(rf"\b(?:{names})\b", r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts)


# Options


def with_options(page: str) -> str:
    """`page` with the table of a command's options between `<!-- options of NAME -->` and `<!-- end -->`."""
    return OPTIONS.sub(lambda found: f"{found[1]} -->\n{_options(found[1])}", page)


def _options(name: str) -> str:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    kinds = {item.name: members_of(get_args(item.annotation)[0]) for item in _parameters(command.callback)}
    rows = [
        f"| {_option(item, kinds)} | {_explained(item)} |\n"
        for item in command.params
        if item.opts[0].startswith("-") and not OF_EVERY_COMMAND & set(item.opts)
    ]
    return "\n" + "".join(["| option | what it does |\n| --- | --- |\n", *rows]) + "\n"


def _parameters(function: Any) -> list[Parameter]:
    """Those that are options or arguments: typer's own context has no help."""
    return [item for item in signature(function).parameters.values() if get_origin(item.annotation) is Annotated]


def _option(item: Any, kinds: Mapping[str, list[Any]]) -> str:
    """`--limit N`, or `--check`, `--no-check`."""
    words = [word for kind, word in VALUES.items() if kind in kinds[item.name]]
    value = "" if item.is_flag else f" {item.metavar or words[0]}"
    return ", ".join(f"`{name}{value}`" for name in (*item.opts, *item.secondary_opts))


def _explained(item: Any) -> str:
    """Its help, and what it is without being given, where that says more than that it is not."""
    default = f"Default: `{item.opts[0] if item.is_flag else item.default}`."
    is_said = item.default is not None and item.default is not False
    said = "Needed." if item.required else default if is_said else ""
    return " ".join(filter(None, [item.help.replace("|", "\\|"), said]))


if __name__ == "__main__":
    SETTINGS.write_text(settings_page(), encoding="utf-8", newline="\n")
    if COMMANDS.exists():
        COMMANDS.write_text(with_options(COMMANDS.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
