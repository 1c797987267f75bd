"""Scores of documents by a sequence classifier, in one call of the model, without padding.

`answer_scores` gives the `forward` of a classifier with one output one more argument, `ends`. With it, the model runs
its decoder on a batch, and applies its head `score` to the hidden states where documents are scored. Going through
`forward` keeps what wraps it working: PEFT, DistributedDataParallel, FSDP, autocast, gradient checkpointing.

Shapes: B rows, T tokens a row, D documents, H hidden size.
"""

import functools
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.batches import Batch
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model, has_virtual_tokens
from tunesmith.model.attention import document_map, supports_documents, use_documents

HEAD = "score"
"""The name of the head in classifiers that score a text at its last token."""


def check_classifier(model: Model) -> None:
    """Raises TunesmithError for a model that does not give one score to a text."""
    base, name = base_model(model), type(base_model(model)).__name__
    if not name.endswith("ForSequenceClassification"):
        raise TunesmithError(
            f"model is {name}; a reward is the one output of a sequence classifier: give the model by its name, which "
            "gets a new head, or load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    if base.config.num_labels != 1:
        raise TunesmithError(
            f"{name} has {base.config.num_labels} outputs (num_labels), and a reward is one; load it with num_labels=1"
        )
    if has_virtual_tokens(model):
        raise TunesmithError(
            "peft_config: virtual tokens hide from the model where a padded text ends, so its score would be that of "
            "padding; take LoraConfig"
        )


def why_padded(model: PreTrainedModel) -> str:
    """Why `model` can't score documents in one row, or an empty string when it can."""
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Module) or model.base_model is model:
        return f"{type(model).__name__} has no head that scores a text at its last token"
    return supports_documents(model)


def answer_scores(model: PreTrainedModel) -> None:
    """Let `model(..., ends=(D,))` return the scores (D,), in fp32, of the documents of a flat row. Other calls are
    unchanged. `lengths` and `parents` are those of `Batch`."""
    original = model.forward
    plain = getattr(original, "__func__", None) or (lambda _self, *args, **kwargs: original(*args, **kwargs))

    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, ends: Tensor | None = None, **kwargs: Any) -> Any:
        if ends is None:
            return plain(self, *args, **kwargs)
        assert not args  # a batch is given by name
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        inputs["attention_mask"] = document_map(inputs.pop("lengths"), inputs.pop("parents", None))
        hidden = self.base_model(**inputs | {"use_cache": False}).last_hidden_state.flatten(0, 1)
        return _head_scores(getattr(self, HEAD), hidden[ends.to(hidden.device)])

    # A method, not a function: a deep copy of the model, and accelerate's wrapper, bind it to themselves.
    model.forward = MethodType(forward, model)
    use_documents(model)


def _head_scores(head: nn.Module, hidden_DH: Tensor) -> Tensor:
    """(D,) The head's output in the precision of its weights: a margin is a small difference of scores."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    weight = next(head.parameters())
    with torch.autocast(hidden_DH.device.type, enabled=False):
        scores: Tensor = head(hidden_DH.to(device=weight.device, dtype=weight.dtype))
    return scores[:, 0].float()


def scores_of(model: nn.Module, batch: Batch) -> Tensor:
    """(D,) The scores of the documents of a batch: flat, by a model that answers them (`answer_scores`), or padded, by
    the model's own forward, which finds the ends itself."""
    if batch.lengths is not None:
        scores: Tensor = model(**batch.inputs(), ends=batch.ends())
        return scores
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[:, 0].float()


def train_head_in_fp32(model: Model) -> None:
    """A head that is trained beside frozen weights of a lower precision has weights that hold small updates."""
    if isinstance(model, PeftModel):
        for parameter in getattr(base_model(model), HEAD, nn.Module()).parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
