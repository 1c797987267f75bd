"""Runs that trained adapters on tiny models, merged, and what is compared of them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tunesmith.ship.merge import MergeOptions, MergeReport, merge

VOCABULARY = 259
"""Of the tiny model's tokenizer, whose tokens the base models have rows for."""
IDS = torch.arange(3, 43)[None]


def lora(**settings: Any) -> LoraConfig:
    given: dict[str, Any] = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"}
    return LoraConfig(**given | settings)


def shake(model: torch.nn.Module) -> None:
    """Moves what is trained, so that nothing is left as adapters start, at no effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.05)


def save_run(folder: Path, base: PreTrainedModel, config: PeftConfig, tokenizer: Path, **save: Any) -> Path:
    """The folder of a run that trained adapters on `base`, which is saved beside it with the arguments `save`."""
    base.save_pretrained(folder / "base", **save)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    adapted: Any = get_peft_model(loaded, config)
    shake(adapted)
    adapted.save_pretrained(str(folder / "run"))
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "run")
    return folder / "run"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def with_adapters(run: Path) -> Tensor:
    """What the adapters on their base model say, in fp32."""
    name = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, str(run)))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def merged(run: Path, **options: Any) -> tuple[MergeReport, Any]:
    """The report, and the model that plain `transformers` loads from the folder."""
    given: dict[str, Any] = {"check": False}
    report = merge(run, run.parent / "merged", MergeOptions(**given | options))
    loaded: Any = AutoModelForCausalLM.from_pretrained(report.folder, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return report, model


def names(folder: Path) -> set[str]:
    """Of the weights in the files of `folder`."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}
