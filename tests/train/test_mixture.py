"""Named sources: trained on together as often as said, each with its own format, evaluated one by one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith import SFTConfig, SFTTrainer, TunesmithError
from tunesmith.data.mixture import DataSource

TEXTS = [{"text": f"text {n}"} for n in range(10)]
PAIRS = [{"question": f"{n}?", "answer": f"{n}!"} for n in range(6)]
QUESTIONS = {"prompt": "question", "completion": "answer"}


@pytest.fixture
def mixture(
    config: Callable[..., SFTConfig], tokenizer: PreTrainedTokenizerBase, model_of: Callable[..., PreTrainedModel]
) -> Any:
    def make(sources: dict[str, Any], eval_dataset: Any = None, **settings: Any) -> SFTTrainer:
        return SFTTrainer(
            model=model_of(),
            args=config(max_steps=2, **settings),
            train_dataset=sources,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )

    return make


def texts(trainer: SFTTrainer, dataset: Any) -> list[str]:
    tokenizer: Any = trainer.processing_class
    return [tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in dataset["input_ids"]]


def test_sources_with_formats_of_their_own_are_mixed_as_often_as_said(mixture: Any) -> None:
    trainer = mixture(
        {
            "texts": DataSource(rows=TEXTS, weight=2),
            "pairs": DataSource(rows=Dataset.from_list(PAIRS), count=3, columns=QUESTIONS),
        }
    )
    found = Counter(texts(trainer, trainer.train_dataset))
    assert found == Counter({row["text"]: 2 for row in TEXTS}) + Counter({key: 1 for key in found if "?" in key})
    assert sum(found.values()) == 23
    order = ["?" in text for text in texts(trainer, trainer.train_dataset)]
    assert order != sorted(order), "the sources are not shuffled together"
    pair = next(row for row in trainer.train_dataset if row["labels"][0] == -100)
    assert trainer.processing_class.decode([label for label in pair["labels"] if label != -100]).endswith("!<|im_end|>")


def test_what_a_source_holds_out_is_evaluated_under_its_name_and_never_trained_on(mixture: Any) -> None:
    trainer = mixture({"texts": DataSource(rows=TEXTS, held_out=0.2), "more": [{"text": "more"}]})
    held = texts(trainer, trainer.eval_dataset["texts"])
    assert len(held) == 2
    assert not set(held) & set(texts(trainer, trainer.train_dataset))
    trainer.train()
    assert "eval_texts_loss" in trainer.evaluate()


def test_the_same_seed_gives_the_same_mixture_and_packing_keeps_all_of_it(mixture: Any) -> None:
    sources = {"texts": DataSource(rows=TEXTS, weight=1.5), "pairs": DataSource(rows=PAIRS, columns=QUESTIONS)}
    one, two, other = mixture(sources), mixture(sources), mixture(sources, seed=7)
    assert one.train_dataset["input_ids"][:] == two.train_dataset["input_ids"][:]
    assert one.train_dataset["input_ids"][:] != other.train_dataset["input_ids"][:]
    packed = mixture(sources, packing=True, max_length=64)
    tokens = sum(map(len, one.train_dataset["input_ids"]))
    assert sum(map(len, packed.train_dataset["input_ids"])) == tokens


def test_weights_of_one_source_do_not_weigh_another(mixture: Any) -> None:
    weighted = [{**row, "weight": 0.5} for row in TEXTS]
    sources = {"weighted": weighted, "plain": DataSource(rows=PAIRS, columns=QUESTIONS)}
    trainer = mixture(sources, packing=True, max_length=512)
    assert {*trainer.train_dataset[0]["weights"]} >= {0.5, 1.0}
    trainer.train()


def test_held_out_rows_and_eval_data_are_two_answers_to_one_question(mixture: Any) -> None:
    with pytest.raises(TunesmithError, match="keep one"):
        mixture({"texts": DataSource(rows=TEXTS, held_out=0.2)}, eval_dataset=TEXTS)


def test_one_source_alone_is_no_mixture(mixture: Any) -> None:
    trainer = mixture({"texts": DataSource(rows=TEXTS, held_out=0.2)}, eval_strategy="epoch")
    assert list(trainer.preflight.splits) == ["train", "eval"]
    assert not any("texts" in note for note in trainer.preflight.notes)
    assert {"eval_loss", "eval_entropy"} <= trainer.evaluate().keys()
    again = mixture({"texts": DataSource(rows=TEXTS, weight=2)})
    assert f"train: an epoch uses {2 * len(TEXTS)} of texts" in again.preflight.notes
