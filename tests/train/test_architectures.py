"""What a run saves loads with plain `transformers` and `peft`, on every architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline

from tests.models import ARCHITECTURES, PADDED
from tunesmith import SFTConfig, SFTTrainer

ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in [("What is it?", "A stone."), ("And that, over there?", "Water"), ("Why?", "I don't know")]
]
PROBE = {"input_ids": torch.tensor([[60, 61, 62, 63, 64, 65, 66]]), "use_cache": False}


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**PROBE).logits
    return found


def answer_of(model: Any, tokenizer: Any) -> str:
    """What the chat pipeline answers."""
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    question = [{"role": "user", "content": "What is it?"}]
    (result,) = chat(question, max_new_tokens=3, do_sample=False)
    assert result["generated_text"][:-1] == question
    answer = result["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert isinstance(answer["content"], str)
    return str(answer["content"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trained_model_loads_with_transformers_and_answers(
    name: str,
    model_of: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: Callable[..., SFTConfig],
) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = config(assistant_only_loss=True)
    trainer = SFTTrainer(model=model, args=args, train_dataset=ROWS, processing_class=tokenizer)
    assert trainer.loaders.batching.padded is (name in PADDED)
    result = trainer.train()
    assert 4.0 < result.training_loss < 8.0  # a random model: about log(259)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())

    trainer.save_model()
    assert args.output_dir is not None
    loaded = AutoModelForCausalLM.from_pretrained(args.output_dir)
    loaded_tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert answer_of(loaded, loaded_tokenizer) == answer_of(model, tokenizer)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_adapters_load_with_peft_and_answer(
    name: str,
    model_of: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: Callable[..., SFTConfig],
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    model_of(name).save_pretrained(base)
    tokenizer.save_pretrained(base)
    args = config()
    trainer = SFTTrainer(
        model=str(base),
        args=args,
        train_dataset=ROWS,
        peft_config=LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2"),
    )
    untouched = logits(trainer.model)
    trainer.train()
    trained = logits(trainer.model)
    assert not torch.equal(trained, untouched)  # an adapter starts as nothing

    trainer.save_model()
    assert args.output_dir is not None
    assert not list(Path(args.output_dir).glob("model*.safetensors"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(args.output_dir)
    loaded_tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    # In training the adapter's product is added in place, so the last bits round in another way.
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-5, atol=1e-6)
    assert answer_of(loaded, loaded_tokenizer) == answer_of(trainer.model, tokenizer)
