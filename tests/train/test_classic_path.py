"""The script that a tutorial on TRL's trainer has: a plain model, a file with texts, a saved model that writes on."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
    set_seed,
)

from tunesmith import SFTConfig, SFTTrainer

ROWS = 400


@pytest.fixture
def small_opt(shared_data: Path, tmp_path: Path) -> Path:
    """The folder of a random OPT of two layers, with a byte-level tokenizer of the reviews and no chat template."""
    reviews = datasets.load_dataset(
        "json", data_files=str(shared_data / "movie_reviews.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(reviews[:2000]["text"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>", pad_token="<pad>")
    set_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    folder = tmp_path / "opt"
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_classic_script_trains_saves_and_writes_on(shared_data: Path, small_opt: Path, tmp_path: Path) -> None:
    dataset = datasets.load_dataset(
        "json",
        data_files=str(shared_data / "movie_reviews.jsonl"),
        split=f"train[:{ROWS}]",
        cache_dir=str(tmp_path / "cache"),
    )
    training_args = SFTConfig(
        output_dir=str(tmp_path / "opt-reviews"),
        max_length=64,
        learning_rate=3e-3,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        logging_steps=5,
        save_steps=10,
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
        precision="fp32",
    )
    model = AutoModelForCausalLM.from_pretrained(small_opt)
    trainer = SFTTrainer(model=model, args=training_args, train_dataset=dataset)
    trainer.train()

    steps = ROWS // 16 * 2
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert list(losses) == list(range(5, steps + 1, 5))
    assert losses[5] > 6.0  # about log(1000) at the start
    assert losses[steps] < losses[5] - 0.5  # how often each token occurs is soon learned
    folder = tmp_path / "opt-reviews"
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{steps - 10}", f"checkpoint-{steps}"]

    trainer.save_model(training_args.output_dir)
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    (result,) = generator("the film is", max_new_tokens=8, do_sample=False)
    assert result["generated_text"].startswith("the film is")
    assert len(result["generated_text"]) > len("the film is")
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_the_labels_of_the_classic_script_are_the_texts_with_their_end(
    shared_data: Path, small_opt: Path, tmp_path: Path
) -> None:
    path = str(shared_data / "movie_reviews.jsonl")
    dataset = datasets.load_dataset("json", data_files=path, split="train[:50]", cache_dir=str(tmp_path / "cache"))
    args = SFTConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, precision="fp32", max_length=64)
    trainer = SFTTrainer(model=str(small_opt), args=args, train_dataset=dataset)
    tokenizer = AutoTokenizer.from_pretrained(small_opt)
    prepared: Any = trainer.train_dataset
    for row, source in zip(prepared, dataset, strict=True):
        expected = [*tokenizer(source["text"])["input_ids"], tokenizer.eos_token_id][:64]
        assert row["input_ids"] == row["labels"] == expected
