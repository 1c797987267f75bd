"""What the trainer refuses, and the special tokens on which model and tokenizer must agree."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainingArguments,
)

from tests.train.runs import END, PAIR_ROWS, TEXT_ROWS
from tunesmith import SFTConfig, SFTTrainer, TunesmithError

LORA = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def stream() -> Any:
    return Dataset.from_list(TEXT_ROWS).to_iterable_dataset()


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


# A name, what the trainer is given, and what it says. A function is called with a model.
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "what is no model": ({"model": lambda _: nn.Linear(2, 2)}, "model is Linear; give a name, a folder, 'demo', or a"),
    "no settings": ({"args": Dataset.from_list(TEXT_ROWS)}, "args is Dataset, and this trainer takes SFTConfig"),
    "two models": ({"model_init": lambda: None}, "model and model_init both say what is trained; give one"),
    "all splits": (
        {"train_dataset": DatasetDict(train=Dataset.from_list(TEXT_ROWS), test=Dataset.from_list(TEXT_ROWS))},
        "train_dataset has the splits train, test, of which one is to train on: dataset['train']",
    ),
    "nothing to evaluate on": (
        {"eval_strategy": "epoch"},
        "eval_strategy is epoch, and there is nothing to evaluate on",
    ),
    "no data": ({"train_dataset": None}, "`train_dataset` is required: give a Dataset, an IterableDataset or a list"),
    "empty data": ({"train_dataset": []}, "train data: the data set is empty"),
    "stream without end": ({"train_dataset": stream(), "max_steps": -1}, "a stream of unknown length: set max_steps"),
    "packed stream": ({"train_dataset": stream(), "packing": True}, "train: packing needs all lengths"),
    "unprepared list": (
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        "train: skip_prepare_dataset needs a datasets.Dataset, not list",
    ),
    "row of another kind": ({"train_dataset": ["a"]}, "train data: row 0 is str, expected an object"),
    "unknown columns": ({"train_dataset": [{"txt": "a"}]}, "train data: row 0: no known format: the columns are txt"),
    "eval set by name": (
        {"eval_dataset": {"good": PAIR_ROWS, "bad": [{"txt": "a"}]}},
        "bad data: row 0: no known format",
    ),
    "two losses": ({"loss_type": "dft", "compute_loss_func": print}, "loss_type: dft and compute_loss_func both"),
    "packed metrics": (
        {"eval_dataset": PAIR_ROWS, "eval_packing": True, "compute_metrics": print},
        "compute_metrics gets logits row by row, and eval_packing: true packs rows; drop one",
    ),
    "formatted completion": (
        {"completion_only_loss": True, "formatting_func": str},
        "formatting_func makes texts or conversations; with train_on: completion it must return",
    ),
    "assistant turns of text": (
        {"assistant_only_loss": True, "train_dataset": TEXT_ROWS},
        "train data: row 0: train_on: assistant needs conversations; this row is plain text",
    ),
    "unknown end": ({"eos_token": "<|im_ends|>"}, "eos_token is '<|im_ends|>', which is not in the tokenizer's vocab"),
    "unknown padding": ({"pad_token": "<pad>"}, "pad_token is '<pad>', which is not in the tokenizer's vocabulary"),
    "no tokenizer": ({"processing_class": object()}, "processing_class is object; a tokenizer is needed"),
    "tokenizer of nobody": ({"processing_class": None}, "the model does not say where it came from; pass its tokeni"),
    "loading a loaded model": (
        {"model_init_kwargs": {"dtype": "float32"}},
        "model_init_kwargs is for a model given by name; this one is loaded already",
    ),
    "quantizing a loaded model": (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        "quantization_config is for a model given by name; this one is loaded already",
    ),
    "adapters on adapters": (
        {"model": lambda model: get_peft_model(model, copy.deepcopy(LORA)), "peft_config": LORA},
        "the model has adapters and peft_config asks for more; merge them first",
    ),
    "no peft config": ({"peft_config": {"r": 8}}, "peft_config is dict; expected a peft config such as LoraConfig"),
    "unknown target": (
        {"peft_config": LoraConfig(target_modules=["query_projection"])},
        "peft_config: target_modules has 'query_projection', which the model does not have",
    ),
    "frozen": ({"model": frozen}, "no parameter of the model requires a gradient, so nothing would be trained"),
    "frozen adapters": (
        {"model": lambda model: frozen(get_peft_model(model, copy.deepcopy(LORA)))},
        "load adapters with is_trainable=True",
    ),
    "no head": (
        {"model": lambda model: AutoModel.from_config(model.config)},
        "LlamaModel has no output layer over the vocabulary; use a causal LM class",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_is_refused_with_a_reason(
    name: str, trainer_of: Callable[..., Any], model_of: Callable[..., PreTrainedModel]
) -> None:
    arguments, message = REFUSALS[name]
    make_model = arguments.get("model", lambda model: model)
    with pytest.raises(TunesmithError, match=re.escape(message)):
        trainer_of(**arguments | {"model": make_model(model_of())})


def test_a_model_is_loaded_as_trls_script_says(tiny_model: Path, config: Callable[..., SFTConfig]) -> None:
    init = {"revision": "main", "trust_remote_code": False, "attn_implementation": None, "torch_dtype": "bfloat16"}
    trainer = SFTTrainer(str(tiny_model), args=config(model_init_kwargs=init), train_dataset=TEXT_ROWS)
    model: Any = trainer.model
    assert model.dtype == torch.bfloat16


def test_a_config_of_another_class_keeps_the_tokens_it_names(tiny_model: Path, config: Callable[..., Any]) -> None:
    args = TrainingArguments(output_dir=str(config().output_dir), report_to="none", use_cpu=True, hub_token="secret")
    trainer = SFTTrainer(str(tiny_model), args=args, train_dataset=TEXT_ROWS, max_seq_length=32)
    made: Any = trainer.args
    assert (made.hub_token, made.eos_token, made.max_length) == ("secret", None, 32)


def test_an_encoder_is_refused_when_its_first_batch_comes(trainer_of: Callable[..., Any]) -> None:
    config = AutoConfig.for_model("bert", vocab_size=259, **ENCODER)
    trainer = trainer_of(model=AutoModelForCausalLM.from_config(config))
    with pytest.raises(TunesmithError, match="a token of BertLMHeadModel sees the tokens behind it"):
        trainer.train()


def test_mistakes_in_the_data_are_found_before_weights_load(tiny_model: Path, config: Callable[..., SFTConfig]) -> None:
    """The folder has no weights: reading them would be another error."""
    folder = Path(config().output_dir or "") / "no-weights"
    folder.mkdir(parents=True)
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TunesmithError, match="train data: row 1: no 'text'"):
        SFTTrainer(str(folder), args=config(), train_dataset=[{"text": "a"}, {"label": 1}])


@pytest.mark.parametrize("field", ["trainer", "model_init_kwargs"])
def test_a_quantization_may_be_given_once(field: str, tiny_model: Path, config: Callable[..., SFTConfig]) -> None:
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    kwargs = {"quantization_config": quantization} if field == "model_init_kwargs" else None
    with pytest.raises(TunesmithError, match="given twice" if kwargs else "8-bit and 4-bit weights can't be trained"):
        SFTTrainer(
            str(tiny_model),
            args=config(model_init_kwargs=kwargs),
            train_dataset=TEXT_ROWS,
            quantization_config=quantization,
        )


def test_model_init_kwargs_reach_the_model(tiny_model: Path, config: Callable[..., SFTConfig]) -> None:
    settings = {"attn_implementation": "eager", "dtype": "bfloat16"}
    trainer = SFTTrainer(str(tiny_model), args=config(model_init_kwargs=settings), train_dataset=TEXT_ROWS)
    model: Any = trainer.model
    assert model.config._attn_implementation == "tunesmith_eager"
    assert model.dtype == torch.bfloat16


def test_the_frozen_weights_of_an_adapted_model_have_the_precision_of_the_run(
    tiny_model: Path, config: Callable[..., SFTConfig]
) -> None:
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        trainer = SFTTrainer(str(tiny_model), args=config(bf16=bf16), train_dataset=TEXT_ROWS, peft_config=LORA)
        model: Any = trainer.model
        parameters: Iterator[tuple[str, Any]] = model.named_parameters()
        dtypes = {"lora" in name: parameter.dtype for name, parameter in parameters}
        assert dtypes == {False: expected, True: torch.float32}


def test_the_end_and_padding_tokens_are_the_ones_asked_for(
    trainer_of: Callable[..., Any], model_of: Callable[..., PreTrainedModel]
) -> None:
    model = model_of()
    trainer = trainer_of(model=model, eos_token="<|endoftext|>", pad_token="<|im_start|>", train_dataset=TEXT_ROWS)
    assert trainer.processing_class.eos_token_id == 0
    assert trainer.processing_class.pad_token_id == 1
    assert model.config.eos_token_id == 0
    assert model.config.pad_token_id == 1
    assert trainer.train_dataset[0]["input_ids"][-1] == 0


def test_generation_stops_at_what_ended_the_supervised_texts(
    trainer_of: Callable[..., Any], model_of: Callable[..., PreTrainedModel]
) -> None:
    """The end-of-sequence token stays <|endoftext|>; the turns of the template end with <|im_end|>."""
    model = model_of(eos_token_id=0)
    assert model.generation_config is not None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trainer_of(model=model, eos_token="<|endoftext|>", assistant_only_loss=True, train_dataset=[{"messages": turns}])
    assert model.generation_config.eos_token_id == [0, END]


def test_settings_that_transformers_refuses_to_write_are_saved_as_they_were(
    trainer_of: Callable[..., Any], model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """A temperature without sampling, as some models are published: a run must not fail at its end."""
    model = model_of()
    assert model.generation_config is not None
    model.generation_config.temperature = 0.5
    trainer_of(model=model).save_model()
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["eos_token_id"], "do_sample" in saved) == (0.5, END, False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config.temperature == 0.5


def test_saved_models_say_where_they_come_from(trainer_of: Callable[..., Any]) -> None:
    for arguments in ({}, {"peft_config": LORA}):
        model = trainer_of(**arguments).model
        assert set(model.model_tags) == {"tunesmith", "sft"}


def test_a_peft_config_serves_for_another_model_too(trainer_of: Callable[..., Any]) -> None:
    """To peft, "all-linear" means the names in the model that it is first used with."""
    shared = LoraConfig(target_modules="all-linear")
    for name in ("llama", "opt"):
        trainer_of(name, peft_config=shared)
    assert shared.target_modules == "all-linear"


def test_a_model_that_can_not_take_flat_batches_says_so_and_pads(
    trainer_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of("gpt_neo", packing=True, max_length=64)
    assert "Batches are padded: GPTNeoForCausalLM does not use transformers' attention interface." in caplog.text
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == len(PAIR_ROWS)


def test_a_saved_folder_holds_the_settings_as_json_and_no_pickle(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(hub_token="secret")
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "training_args.json" in names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    text = (tmp_path / "saved" / "training_args.json").read_text()
    assert json.loads(text)["max_length"] == 1024
    assert "secret" not in text
