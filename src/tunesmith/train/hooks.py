"""Every name of other libraries that is not promised to stay and that this package relies on, with the reason.

`check` looks for those of training when the trainer is imported, with the parameters that are needed: a new version of
a library fails by name, and never silently. A hook that was renamed would otherwise just not be called any more: the
guard against NaN would stop guarding. A test looks for private names in the source that are missing here.
"""

import dis
import inspect
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from tunesmith.errors import TunesmithError


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """`name` of `owner`, a module or a class in one ("transformers.Trainer"). `parameters` are those that we give or
    receive by name or place; None: it is no function. An attribute that instances get in a method counts, too. What is
    not for `training` is looked for by tests only: nobody's training stops because a plan could not be counted."""

    owner: str
    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    training: bool = True

    def problem(self) -> str:
        """What is wrong with it in the libraries that are installed; empty when it is as we need it."""
        owner = _resolved(self.owner)
        if owner is None:
            return f"there is no {self.owner}"
        value = getattr(owner, self.name, None)
        if self.parameters is None:
            there = hasattr(owner, self.name) or _of_instances(owner, self.name)
            return "" if there else f"{self.owner} has no {self.name}"
        if value is None:
            return f"{self.owner} has no {self.name}"
        missing = [name for name in self.parameters if name not in inspect.signature(value).parameters]
        return f"{self.owner}.{self.name} takes no {', '.join(missing)}" if missing else ""


TRAINER = "transformers.Trainer"


def _hook(name: str, why: str, *parameters: str) -> Name:
    return Name(owner=TRAINER, name=name, why=why, parameters=parameters)


AGENT = "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent"
EPOCH = ("epochs_trained", "steps_trained_in_current_epoch")
STATE = ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial")
HOOKS = (
    # In the order in which a run calls them.
    _hook("init_hf_repo", "makes the hub's repository", "token"),
    _hook("_build_accelerator_args", "keeps accelerate from compiling the whole model"),
    _hook("train", "chooses the checkpoint, holds the folder", "resume_from_checkpoint"),
    _hook("_hp_search_setup", "a search changes what training reads only", "trial"),
    _hook("call_model_init", "prepares each model of a search", "trial"),
    _hook("_set_signature_columns_if_needed", "says which columns reach the collator"),
    _hook("_get_dataloader", "batches by tokens and by length", "dataset", "description", "batch_size", "is_training"),
    _hook("get_total_train_batch_size", "counts the rows of a step", "args"),
    _hook("_init_training_state", "parts go back to where they were", *STATE),
    _hook("create_optimizer", "LoRA+", "model"),
    _hook("get_optimizer_cls_and_kwargs", "LoRA+", "args", "model"),
    _hook("_load_from_checkpoint", "weights that are shared out are read in parts", "resume_from_checkpoint", "model"),
    _hook("_load_optimizer_and_scheduler", "reads states without pickle", "checkpoint"),
    _hook("_load_scaler", "reads states without pickle", "checkpoint"),
    _hook("_load_rng_state", "goes on with the same random numbers", "checkpoint"),
    _hook("_run_epoch", "knows where in an epoch the run is", "model", "epoch", *EPOCH),
    _hook("get_batch_samples", "counts the micro-batches that were taken", "epoch_iterator", "num_batches", "device"),
    _hook("_get_num_items_in_batch", "the one normaliser of a step", "batch_samples", "device"),
    _hook("_defer_fsdp_gradient_reduction", "gradients are summed over processes once a step"),
    _hook("training_step", "out-of-memory recovery", "model", "inputs", "num_items_in_batch"),
    _hook("_prepare_inputs", "moves a batch to the device", "inputs"),
    _hook("compute_loss", "the objective", "model", "inputs", "return_outputs", "num_items_in_batch"),
    _hook("compute_loss_context_manager", "autocast in evaluation"),
    _hook("_get_grad_norm", "the guard against gradients that are not finite", "model", "grad_norm"),
    _hook("_maybe_log_save_evaluate", "a line of metrics.jsonl a step", "tr_loss", "grad_norm", "learning_rate"),
    _hook("log", "adds the objective's means", "logs", "start_time"),
    _hook("evaluation_loop", "the mean over tokens", "dataloader", "description", "metric_key_prefix"),
    _hook("prediction_step", "the loss of a batch", "model", "inputs", "prediction_loss_only", "ignore_keys"),
    _hook("_save_checkpoint", "writes checkpoints whole or not at all", "model", "trial"),
    _hook("_get_output_dir", "the folder of a trial", "trial"),
    _hook("store_flos", "the state that a checkpoint keeps"),
    _hook("_save", "settings as JSON, not as a pickle", "output_dir", "state_dict"),
    _hook("save_model", "writes the model of a checkpoint", "output_dir", "_internal_call"),
    _hook("_push_from_checkpoint", "sends what others can use", "checkpoint_folder"),
    _hook("_load_best_model", "weights that are shared out are read in parts"),
    _hook("_finalize_training", "waits for the last checkpoint before the best is read"),
    _hook("push_to_hub", "sends a run with its card", "commit_message", "token", "revision"),
)
ATTRIBUTES = (
    Name(owner=TRAINER, name="loss_is_scaled_for_ga", why="the loss is divided by the weight of the step already"),
    Name(
        owner=TRAINER,
        name="is_distributed_loading_by_transformers",
        why="a model whose weights are shared out is not wrapped",
    ),
    Name(owner=TRAINER, name="_signature_columns", why="columns that reach the collator"),
    Name(owner=TRAINER, name="_train_batch_size", why="rows of a micro-batch, which auto_find_batch_size changes"),
    Name(owner=TRAINER, name="_tr_loss", why="the sum of losses that were not logged yet, for an exact resume"),
    Name(owner=TRAINER, name="_total_loss_scalar", why="the sum of which `train_loss` is the mean"),
    Name(owner=TRAINER, name="_globalstep_last_logged", why="the step of the last log, for an exact resume"),
    Name(
        owner=TRAINER,
        name="_remove_unused_columns",
        why="the loader of one of several processes is made as theirs",
        parameters=("dataset", "description"),
    ),
    Name(
        owner=TRAINER,
        name="_get_collator_with_removed_columns",
        why="the loader of one of several processes is made as theirs",
        parameters=("data_collator", "description"),
    ),
    Name(owner="transformers.TrainingArguments", name="_VALID_DICT_FIELDS", why="settings that are dictionaries"),
    Name(owner="transformers.PreTrainedModel", name="_is_stateful", why="tells models that carry a state along a row"),
    Name(owner="transformers.PreTrainedModel", name="_supports_attention_backend", why="tells who takes our attention"),
    Name(owner="transformers.PreTrainedConfig", name="_attn_implementation", why="the attention that ours stands over"),
    Name(
        owner="transformers.utils.chat_template_utils",
        name="_compile_jinja_template",
        why="the environment that chat templates run in",
        parameters=("chat_template",),
    ),
    Name(
        owner="transformers.utils.chat_template_utils",
        name="_alias_reasoning_fields",
        why="what a template sees of messages is what it sees of those of `apply_chat_template`",
        parameters=("chat",),
    ),
    Name(
        owner="transformers.utils.chat_template_utils",
        name="_plain_template_data",
        why="what a template sees of messages is what it sees of those of `apply_chat_template`",
        parameters=("value",),
    ),
    Name(owner="peft.PeftModel", name="_adapters_disabled", why="whether virtual tokens are in front of a row now"),
    Name(owner="datasets.Dataset", name="_indices", why="the order of a shuffled data set, without reading it"),
    Name(owner="datasets.Dataset", name="_fingerprint", why="finds prepared data again"),
    Name(owner="datasets.IterableDataset", name="_ex_iterable", why="whether a stream is shuffled in a buffer"),
    Name(owner="datasets.IterableDataset", name="_formatting", why="whether the place in a stream can be kept"),
    Name(owner="datasets.IterableDataset", name="_distributed", why="whether a stream is a process's part already"),
    Name(owner="datasets.IterableDataset", name="_token_per_repo_id", why="a stream shuffled in our own buffer"),
    Name(owner="datasets.iterable_dataset", name="_BaseExamplesIterable", why="what the own shuffle buffer is one of"),
    *(
        Name(owner=f"accelerate.state.{kind}", name="_shared_state", why="trainers side by side keep their own")
        for kind in ("PartialState", "AcceleratorState")
    ),
    Name(owner="accelerate.hooks", name="add_hook_to_module", why="sets the `_hf_hook` that keeps a layer's forward"),
    *(
        Name(owner=AGENT, name=name, why=why, parameters=parameters, training=False)
        for name, why, parameters in (
            ("_monitor_workers", "hears that another machine has failed", ("worker_group",)),
            ("_stop_workers", "gives processes the seconds to end that are ours", ("worker_group",)),
            ("_shutdown", "ends processes after so many seconds", ("timeout",)),
        )
    ),
    Name(owner="torch.nn.Module", name="_forward_hooks", why="layers that others watch keep their forward"),
    Name(owner="torch.nn.Module", name="_forward_pre_hooks", why="layers that others watch keep their forward"),
    *(
        Name(owner=owner, name=name, why="the plan counts the memory of a step on fake tensors", training=False)
        for owner, name in (
            ("torch.nn.Module", "_parameters"),
            ("torch.nn.Module", "_buffers"),
            ("torch._subclasses.fake_tensor", "FakeTensor"),
            ("torch._subclasses.fake_tensor", "FakeTensorMode"),
            ("torch.utils._python_dispatch", "TorchDispatchMode"),
            ("torch.utils._python_dispatch", "_disable_current_modes"),
            ("torch.UntypedStorage", "_cdata"),
        )
    ),
    *(
        Name(owner=owner, name=name, why="the view is redrawn when the window changes", training=False)
        for owner, name in (
            ("rich.live.Live", "_lock"),
            ("rich.live.Live", "_live_render"),
            ("rich.live_render.LiveRender", "_shape"),
        )
    ),
)
OPTIONAL = {
    "_commit_hash": "the revision of a model from the hub, which `transformers` notes in a config that it downloaded",
    "_linear_pointwise": "oneDNN's products; without it, fp32 goes through the BLAS that torch has",
    "_scaled_dot_product_flash_attention_for_cpu": "attention with its sums; without it, PyTorch's backward runs, too",
    "_checkpoint_conversion_mapping": "names in files of some models; without it there is nothing to convert",
    "_alias_reasoning_fields": "other names of reasoning in messages; without it there is one name",
    "_is_accelerate_prepared": "accelerate's mark on a prepared model; without it, nothing is taken for prepared",
    "_hf_hook": "set by accelerate.hooks.add_hook_to_module, which is looked for",
}
"""Private names that may be missing: the code asks for them and goes on without."""


def check(*, training: bool = True) -> None:
    """Raises TunesmithError that names what is missing, and what it is needed for; with `training`, what that needs."""
    names = [name for name in (*HOOKS, *ATTRIBUTES) if name.training or not training]
    problems = [f"{problem} ({name.why})" for name in names if (problem := name.problem())]
    if problems:
        installed = ", ".join(
            f"{library} {version(library)}" for library in ("transformers", "peft", "datasets", "torch")
        )
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise TunesmithError(
            f"this version of tunesmith does not fit {installed}, of which it needs:{listed}\n"
            "Install the versions that pyproject.toml allows, or a newer tunesmith"
        )


def _resolved(owner: str) -> Any:
    try:
        return import_module(owner)
    except ImportError:
        module, _, name = owner.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _of_instances(owner: Any, name: str) -> bool:
    """Whether a class or one of its bases declares the attribute, or sets it in a method: instances have it."""
    if not isinstance(owner, type):
        return False
    if any(name in vars(kind).get("__annotations__", ()) for kind in owner.__mro__):
        return True
    functions = (getattr(value, "__func__", value) for kind in owner.__mro__ for value in vars(kind).values())
    codes = (inspect.unwrap(function).__code__ for function in functions if inspect.isfunction(function))
    steps = (step for code in codes if name in code.co_names for step in dis.get_instructions(code))
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in steps)
