"""What TRL's `SFTConfig` and `SFTTrainer` have, for the tests of TRL's names. TRL is installed by `make docs` and
`make bench` only: there `tests/test_trl.py` compares this with TRL itself."""

from typing import Any

VERSION = "1.16.0"

ADDED: dict[str, Any] = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "chat_template_path": None,
    "dataset_text_field": "text",
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "eos_token": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
    "pad_to_multiple_of": "auto",
    "eval_packing": None,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "loss_type": "nll",
    "activation_offloading": False,
    "pad_token": None,
}
"""The fields that `TrainingArguments` does not have, and their defaults."""

CHANGED: dict[str, Any] = {"learning_rate": 2e-5, "bf16": None, "gradient_checkpointing": True, "logging_steps": 10}
"""Those of `TrainingArguments` that have another default. TRL makes `bf16: None` True, unless `fp16` is."""

CHOICES: dict[str, list[str]] = {
    "truncation_mode": ["keep_end", "keep_start"],
    "packing_strategy": ["bfd", "bfd_split", "wrapped"],
    "loss_type": ["nll", "dft", "chunked_nll"],
}
"""The fields of `ADDED` that are one of several words."""

ARGUMENTS = [
    "model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "compute_loss_func",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics",
    "quantization_config",
    "peft_config",
    "formatting_func",
]
"""Of `SFTTrainer`, in their order."""
