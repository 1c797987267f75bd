"""What a run writes of itself: a line a step, losses of single examples, answers over time; and it changes nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.models import flat, padded
from tests.train.runs import PAIR_ROWS, REASONING, TALKS, UNEVEN_ROWS, token_losses, trained
from tests.train.test_guard import poison
from tunesmith import SFTTrainer
from tunesmith.data.batches import FlatCollator
from tunesmith.data.samplers import by_document
from tunesmith.errors import TunesmithError
from tunesmith.model.generate import generate
from tunesmith.model.load import load_run
from tunesmith.runs.files import EXAMPLES, METRICS, PREFLIGHT, SAMPLES, append, keep_up_to, read, read_lines
from tunesmith.runs.record import RunRecord
from tunesmith.train.ledger import KEPT, Ledger, losses_of
from tunesmith.types import Example

CHATS = [
    {"messages": [{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": text * 2}]}
    for text in ("one", "two", "three", "four")
]

LIKE_ROWS = [{"prompt": f"the same beginning {i % 4}", "completion": "x" * i} for i in range(1, 9)]
"""Whose beginnings are computed once."""


def lines_of(trainer: SFTTrainer, file: str = METRICS) -> list[dict[str, Any]]:
    return read_lines(Path(str(trainer.args.output_dir)) / file)


def steps_of(trainer: SFTTrainer) -> list[dict[str, Any]]:
    return [line for line in lines_of(trainer) if "loss" in line]


# Lines


def test_each_optimizer_step_is_a_line_however_rarely_the_run_logs(trainer_of: Callable[..., Any]) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    often = trainer_of(logging_steps=1, lr_scheduler_type="linear", **settings)
    often.train()
    lines = steps_of(often)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    logged = [entry for entry in often.state.log_history if "loss" in entry]
    for line, entry in zip(lines, logged, strict=True):
        assert line["loss"] == pytest.approx(entry["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert line["learning_rate"] == entry["learning_rate"]
        assert line["tokens_per_second"] > 0
        assert line["memory_mb"] > 50
    assert sum(line["tokens"] for line in lines) == logged[-1]["num_tokens"]
    # Two epochs of all rows: what is supervised in them.
    labels = [label for row in often.train_dataset for label in row["labels"]]
    assert sum(line["supervised_tokens"] for line in lines) == 2 * sum(label != -100 for label in labels)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    seldom = trainer_of(logging_steps=4, lr_scheduler_type="linear", **settings)
    seldom.train()
    assert [line["loss"] for line in steps_of(seldom)] == [line["loss"] for line in lines]


def test_evaluations_and_events_are_lines_and_numbers_that_are_none_are_null(
    trainer_of: Callable[..., Any],
) -> None:
    trainer = trainer_of(max_steps=3, eval_dataset=PAIR_ROWS, eval_strategy="steps", eval_steps=2)
    poison(trainer, {2})
    trainer.train()
    lines = lines_of(trainer)
    assert [(line["step"], line["loss"] is None) for line in lines if "loss" in line] == [
        (1, False),
        (2, True),
        (3, False),
    ]
    events = [(line["step"], line["event"]) for line in lines if "event" in line]
    assert events == trainer.events
    assert "the step was left out" in events[0][1]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert evaluations == {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert 2 in evaluations


def test_a_resumed_run_drops_the_lines_behind_its_checkpoint_and_repeats_none(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = trainer_of(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    first = trainer_of(output_dir=str(tmp_path / "run"), **settings | {"save_steps": 4})
    first.train()  # it went on to step 6 after its only checkpoint but the last
    path = tmp_path / "run" / METRICS
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')  # and was killed
    again = trainer_of(output_dir=str(tmp_path / "run"), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [line["step"] for line in steps_of(again)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in steps_of(again)] == [line["loss"] for line in steps_of(whole)]
    seconds = [line["seconds"] for line in steps_of(again)]
    assert seconds == sorted(seconds)
    trainer_of(output_dir=str(tmp_path / "run"), max_steps=1).train()  # another run in the same folder
    assert len(read_lines(path)) == 1


def test_lines_outlast_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, {"step": 1, "text": "a\n\ud800\u2028", "loss": math.nan, "deep": [{"x": -math.inf}]})
    append(path, {"step": 2})
    assert read_lines(path)[0] == {"step": 1, "text": "a\n\ud800\u2028", "loss": None, "deep": [{"x": None}]}
    assert keep_up_to(path, 1) == read_lines(path) == [read_lines(path)[0]]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(TunesmithError, match=r"lines.jsonl, line 2 is no JSON object: 'nonsense'"):
        read_lines(path)
    assert keep_up_to(tmp_path / "none", 3) == []


def test_a_disk_that_takes_no_line_costs_the_line_and_not_the_run(
    trainer_of: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / METRICS).mkdir(parents=True)  # no file can be opened there, whoever asks
    trainer = trainer_of(max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "the run is not followed any further" in caplog.text


def test_the_preflight_report_is_kept_with_how_much_of_the_examples_is_supervised(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(eval_dataset=PAIR_ROWS[:2])
    trainer.train()
    found = read(tmp_path / "run" / PREFLIGHT)
    assert found is not None
    assert found["notes"] == trainer.preflight.notes
    assert found["splits"]["train"]["counts"]["examples"] == 8
    counts = [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]
    buckets = found["supervised_lengths"]["train"]
    assert sum(count for _, _, count in buckets) == 8
    assert (buckets[0][0] <= min(counts), buckets[-1][1]) == (True, max(counts))


# Losses of examples


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_free": False},
        {"packing": True, "max_length": 64},
        {"share_prefix": "off", "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"max_tokens_per_batch": 64, "per_device_train_batch_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [PAIR_ROWS, LIKE_ROWS])
def test_the_loss_of_each_example_is_what_the_model_gives_it_alone(
    settings: dict[str, Any], rows: list[dict[str, Any]], trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(train_dataset=rows, num_train_epochs=1, max_steps=-1, learning_rate=0.0, **settings)
    expected: list[float] = []
    alone = trainer.data.examples["train"]
    expected = sorted(float(losses.mean()) for losses in token_losses(trainer.model, alone))
    trainer.train()
    found = read(tmp_path / "run" / EXAMPLES)
    assert found is not None
    assert found["rows"] == len(rows) == sum(found["histogram"])
    assert found["mean"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert [entry["loss"] for entry in found["easiest"]] == pytest.approx(expected[:KEPT], rel=1e-4)
    text = {"".join(part for part, _ in entry["parts"]) for entry in found["hardest"]}
    assert text == {f"{row['prompt']}{row['completion']}<|im_end|>" for row in rows}
    learned = {"".join(part for part, mark in entry["parts"] if mark) for entry in found["easiest"]}
    assert learned == {f"{row['completion']}<|im_end|>" for row in rows}


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 512}, {"padding_free": False}], ids=str)
def test_each_document_of_a_conversation_has_a_loss_of_its_own(
    settings: dict[str, Any], trainer_of: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = REASONING
    common = {"num_train_epochs": 1, "max_steps": -1, "learning_rate": 0.0, "train_on": "assistant"}
    trainer = trainer_of(train_dataset=TALKS, **common | settings)
    documents = by_document(trainer.data.examples["train"])
    expected = sorted(float(losses.mean()) for losses in token_losses(trainer.model, documents))
    trainer.train()
    found = read(tmp_path / "run" / EXAMPLES)
    assert found is not None
    assert found["rows"] == len(expected) == 12
    assert [entry["loss"] for entry in found["easiest"]] == pytest.approx(expected[:KEPT], rel=1e-4)
    learned = sorted("".join(part for part, mark in entry["parts"] if mark) for entry in found["hardest"])
    assert learned == sorted(
        f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}<|im_end|>"
        for row in TALKS
        for message in row["messages"]
        if message["role"] == "assistant"
    )


def test_a_row_that_stands_out_is_the_hardest_and_one_seen_again_is_there_once() -> None:
    ledger = Ledger()
    for step in range(1, 60):
        loss = 3.0 / step + (2.0 if step == 40 else 0.0)
        batch = flat([{"input_ids": [5, 6, 7, step % 50]}])
        ledger.add(batch, torch.full((3,), loss))
        ledger.end_step(step)
    ledger.end_pass()
    found = ledger.as_json(lambda ids: " ".join(map(str, ids)))
    assert found is not None
    assert found["hardest"][0]["step"] == 40
    assert found["hardest"][0]["parts"] == [["5", False], ["6 7 40", True]]
    assert [entry["step"] for entry in found["easiest"]] == list(range(59, 59 - KEPT, -1))
    texts = [str(entry["parts"]) for entry in found["hardest"]]
    assert len(set(texts)) == len(texts) == KEPT


def test_a_pass_that_broke_off_does_not_hide_the_whole_one_before_it() -> None:
    ledger = Ledger()
    for rows in (5, 2):
        for step in range(rows):
            ledger.add(flat([{"input_ids": [1, 2, step]}]), torch.ones(2))
            ledger.end_step(step + 1)
        ledger.end_pass()
    assert (ledger.as_json(str) or {})["rows"] == 5


def test_a_step_that_begins_again_counts_once() -> None:
    ledger = Ledger()
    batch = padded([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    ledger.add(batch, torch.ones(3))
    ledger.forget_step()
    ledger.add(batch, torch.tensor([1.0, 3.0, math.nan]))
    ledger.end_step(1)
    ledger.end_pass()
    found = ledger.as_json(str)
    assert found is not None
    assert (found["rows"], found["mean"]) == (1, 2.0)  # no mean of what is not finite
    assert [loss for loss, _ in losses_of(batch, torch.tensor([1.0, 3.0, 5.0]))] == [2.0, 5.0]


def test_pairs_are_counted_by_length_and_the_worst_are_kept() -> None:
    ledger = Ledger()
    batch = FlatCollator().batch(
        [
            tuple(Example(input_ids=[1, 2, *answer], labels=[-100, -100, *answer]) for answer in answers)
            for answers in (([3, 4], [5]), ([6], [7, 8]), ([9], [10]))
        ]
    )
    nll = torch.ones(8)
    ledger.add(batch, nll, torch.tensor([0.5, -2.0, math.nan]))  # the last one does not count
    ledger.end_step(1)
    ledger.add(batch, nll, torch.tensor([0.7, 0.1, 0.4]))
    ledger.end_step(2)
    ledger.end_pass()
    found = ledger.as_json(lambda ids: " ".join(map(str, ids)))
    assert found is not None
    assert found["lengths_of_pairs"] == [
        ["the chosen answer is longer", 2, 2],
        ["the rejected answer is longer", 2, 1],
        ["both are equally long", 1, 1],
    ]
    assert [pair["step"] for pair in found["worst_pairs"]] == [2, 2, 2]  # of a pair that came again, the latest
    assert [pair["margin"] for pair in found["worst_pairs"]] == pytest.approx([0.1, 0.4, 0.7])
    assert [found["worst_pairs"][0][name] for name in ("prompt", "chosen", "rejected")] == ["1 2", "6", "7 8"]


# Samples


def test_answering_changes_nothing_of_what_is_trained(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"max_steps": 4, "eval_dataset": CHATS[:2], "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"train_dataset": CHATS, "per_device_train_batch_size": 2}
    weights, modes = [], []
    for prompts in (0, 2):
        lora = LoraConfig(lora_dropout=0.2, target_modules="all-linear")  # which draws random numbers
        folder = str(tmp_path / str(prompts))
        trainer = trainer_of(sample_prompts=prompts, output_dir=folder, peft_config=lora, **settings)
        weights.append(trained(trainer))
        modes.append([module.training for module in trainer.model.modules()])
    assert len(read_lines(tmp_path / "2" / SAMPLES)) == 6
    assert not (tmp_path / "0" / SAMPLES).exists()
    assert modes[0] == modes[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_held_out_prompts_are_answered_before_with_each_evaluation_and_at_the_end(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.05}
    trainer = trainer_of(train_dataset=CHATS[2:], eval_dataset=CHATS[:2], sample_prompts=2, **settings)
    trainer.train()
    lines = lines_of(trainer, SAMPLES)
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert [line["expected"] for line in lines[:2]] == ["oneone", "twotwo"]
    prompts = [line["prompt"] for line in lines[-2:]]
    assert lines[0]["answer"] != lines[-2]["answer"]
    trainer.save_model()
    saved, tokenizer = load_run(str(tmp_path / "run"))
    assert [line["answer"] for line in lines[-2:]] == generate(saved, tokenizer, prompts, max_new_tokens=128)
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert [(sample.before, sample.after) for sample in record.samples] == [
        (lines[i]["answer"], lines[i + 6]["answer"]) for i in range(2)
    ]
    assert record.samples[0].prompt.prompt == tuple(CHATS[0]["messages"][:1])


def test_texts_are_continued_as_texts(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(sample_prompts=1, max_steps=60, learning_rate=0.02, train_dataset=PAIR_ROWS[:1] * 8)
    trainer.train()
    assert [(line["prompt"], line["expected"]) for line in lines_of(trainer, SAMPLES)] == [("?", "a")] * 2
    assert lines_of(trainer, SAMPLES)[-1]["answer"] == "a"


def test_prompts_that_leave_no_room_and_rows_without_one_are_passed_over(
    trainer_of: Callable[..., Any],
) -> None:
    rows = [{"prompt": "long " * 40, "completion": "x"}, {"prompt": "short", "completion": "y"}]
    trainer = trainer_of(sample_prompts=3, train_dataset=rows, max_length=None)
    trainer.train()  # the tiny model has room for 128 tokens
    assert {line["prompt"] for line in lines_of(trainer, SAMPLES)} == {"short"}
    texts = trainer_of(sample_prompts=3, train_dataset=[{"text": "no question"}], max_steps=1)
    texts.train()
    assert lines_of(texts, SAMPLES) == []


def test_a_model_that_cannot_answer_is_trained_all_the_same(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(sample_prompts=1, max_steps=2)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tunesmith.train.samples.generate_from_ids", fail)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.events == [(0, "prompts are not answered any more: RuntimeError: out of memory")]


def test_a_resumed_run_keeps_the_answers_from_before(trainer_of: Callable[..., Any]) -> None:
    settings = {"sample_prompts": 1, "save_strategy": "steps", "save_steps": 2, "train_dataset": UNEVEN_ROWS}
    trainer_of(max_steps=2, **settings).train()
    again = trainer_of(max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    assert [line["step"] for line in lines_of(again, SAMPLES)] == [0, 2, 4]
    [sample] = again.record().samples
    assert sample.before == lines_of(again, SAMPLES)[0]["answer"]
    assert json.loads(again.record().to_json())["samples"]
