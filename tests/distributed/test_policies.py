"""Two processes draw the answers, give the rewards and train the weights of one, and none waits in vain."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.forked import finished, started, together
from tests.models import tiny
from tests.train.runs import largest_difference
from tunesmith import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TunesmithError
from tunesmith.model import ways
from tunesmith.model.generate import Sampling
from tunesmith.train.generator import Generated
from tunesmith.train.sharding import gathered
from tunesmith.train.together import AnotherFailed

pytestmark = pytest.mark.processes
PROMPTS = [
    {"prompt": [{"role": "user", "content": f"{word}, {i}?"}], "letter": letter}
    for i, (word, letter) in enumerate(
        zip(("One", "Another", "A third one", "Last", "One") * 2, "eatseatsea", strict=True)
    )
]
"""10 prompts, of which two are alike."""


def letters(completions: list[Any], letter: list[str], log_metric: Any, **_: Any) -> list[float]:
    """How much of an answer is above the letter in the alphabet."""
    texts = [answer[0]["content"] for answer in completions]
    log_metric("characters", sum(map(len, texts)) / len(texts))
    return [sum(c > one for c in text) / 8 for text, one in zip(texts, letter, strict=True)]


def ids_of(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Does not apply to some answers."""
    return [None if ids[0] % 5 == 0 else ids[0] / 50 for ids in completion_ids]


def of_some(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The same for all answers to all prompts but one."""
    asked = [prompt[0]["content"] for prompt in prompts]
    return [
        ids[-1] / 50 if text.startswith("A third") else 0.25 for text, ids in zip(asked, completion_ids, strict=True)
    ]


def same(completions: list[Any], **_: Any) -> list[float]:
    return [0.1] * len(completions)


class Script:
    """Answers that follow from the seed of each, and from nothing else."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
        assert sampling.seeds is not None
        return [Generated(ids=[3 + (seed >> i) % 40 for i in range(6)], finish="length") for seed in sampling.seeds]


Case = tuple[Any, int, int, dict[str, Any]]
# Trainer, answers of a micro-batch of all processes, micro-batches of a step, and settings.
CASES: dict[str, Case] = {
    "grpo": (GRPOTrainer, 8, 1, {}),
    "groups apart": (GRPOTrainer, 4, 1, {}),
    "accumulation": (GRPOTrainer, 4, 2, {"reward_funcs": [letters, ids_of], "max_steps": 3}),
    "a generation of two steps, twice": (
        GRPOTrainer, 8, 1,
        {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "loss_type": "grpo", "max_steps": 5},
    ),
    "two generations a step": (GRPOTrainer, 8, 2, {"steps_per_generation": 1, "scale_rewards": "batch", "held_out": 1}),
    "rewards apart": (
        GRPOTrainer, 8, 1,
        {"reward_funcs": [letters, ids_of], "multi_objective_aggregation": "normalize_then_sum"},
    ),
    "bnpo": (GRPOTrainer, 8, 1, {"loss_type": "bnpo", "accumulates": True}),
    "some groups are level": (GRPOTrainer, 8, 1, {"reward_funcs": of_some}),
    "all groups are level": (GRPOTrainer, 8, 1, {"reward_funcs": same}),
    "scripted": (GRPOTrainer, 8, 1, {"script": True, "reward_funcs": ids_of}),
    "padded model": (GRPOTrainer, 8, 1, {"model": "gpt_neo", "max_completion_length": 5}),
    "adapters": (GRPOTrainer, 8, 1, {"lora": True, "beta": 0.1}),
    "shared out": (GRPOTrainer, 8, 1, {"shard": "full", "beta": 0.1}),
    "shared out, accumulation": (GRPOTrainer, 4, 2, {"shard": "grad", "max_steps": 3, "held_out": 1}),
    "adapters, shared out": (RLOOTrainer, 8, 1, {"shard": "full", "lora": True}),
    "padded model, shared out": (GRPOTrainer, 8, 1, {"model": "gpt_neo", "max_completion_length": 5, "shard": "full"}),
    "short of memory": (RLOOTrainer, 8, 2, {"steps_per_generation": 1, "limit": 2}),
    "rloo": (RLOOTrainer, 8, 1, {"normalize_advantages": True}),
    "rloo, accumulation": (RLOOTrainer, 4, 2, {"lora": True, "steps_per_generation": 4}),
}  # fmt: skip


def trainer_of(case: Case, processes: int, tokenizer: Path, folder: Path, **more: Any) -> Any:
    kind, rows, accumulation, own_settings = case
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", **own_settings, **more}
    own = {
        name: settings.pop(name, None)
        for name in ("model", "lora", "script", "reward_funcs", "accumulates", "held_out", "limit")
    }
    if own["accumulates"] and processes == 1:  # micro-batches as large as those of two
        rows, accumulation = rows // 2, accumulation * 2
    args = (GRPOConfig if kind is GRPOTrainer else RLOOConfig)(
        output_dir=str(folder), report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=rows // processes, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=8 // processes,
        num_generations_eval=1 if own["held_out"] else 2,
        **{"num_generations": 4, "max_completion_length": 8} | settings,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, self_test="off",
    )  # fmt: skip
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    kind.draw_page = None
    trainer = kind(
        tiny(own["model"] or "llama", len(loaded)),
        own["reward_funcs"] or letters,
        args,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[: own["held_out"] or 5],
        processing_class=loaded,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if own["lora"] else None,
        generator=Script() if own["script"] else None,
    )
    if own["limit"] and os.environ["RANK"] == "1":
        _limit(trainer, own["limit"])
    return trainer


def _limit(trainer: Any, most: int) -> None:
    """Memory is out for more than `most` answers in training."""
    right = trainer.batch_loss

    def small(model: Any, batch: Any, **arguments: Any) -> Any:
        if model.training and len(batch.documents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(model, batch, **arguments)

    trainer.batch_loss = small


def noted(trainer: Any) -> list[Any]:
    """The answers that this process draws, with the numbers of generation and answer, and their advantages."""
    drawn: list[Any] = []
    make = trainer._generation

    def noting(prompts: Any) -> Any:
        trials = make(prompts)
        numbers = trainer.deal.numbers(len(trials) * trainer.args.world_size)
        for number, trial in zip(numbers, trials, strict=True):
            drawn.append([trainer.window.generations, number, trial.input_ids, trial.rewards, trial.advantage])
        return trials

    trainer._generation = noting
    return drawn


def run_all(folder: Path, tokenizer: Path, cases: dict[str, Case]) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ways.force(False)
    for name, case in cases.items():
        trainer = trainer_of(case, processes, tokenizer, folder / name)
        drawn = noted(trainer)
        trainer.train()
        measured = trainer.evaluate()
        said = {"drawn": drawn, "logs": trainer.state.log_history, "eval": measured}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(said))
        weights = gathered(trainer.model, kept=rank == 0)
        if rank == 0:
            save_file({key: value.clone().contiguous() for key, value in weights.items()}, folder / f"{name}.st")


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of each number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        together(processes, run_all, folder / str(processes), tiny_model, CASES)
    return folder


UNTOLD = ("second", "time", "epoch", "num_tokens", "total_flos")
OF_TOKENS = ("entropy", "difference/mean")
"""Are over what is computed: of a micro-batch without anything to learn, one answer."""


def told(entry: dict[str, Any], *, level: bool) -> dict[str, Any]:
    left_out = UNTOLD + OF_TOKENS * level
    return {key: value for key, value in entry.items() if not key.endswith(left_out)}


def check_equal(runs: Path, name: str) -> None:
    one = json.loads((runs / "1" / f"{name}.0.json").read_text())
    two = [json.loads((runs / "2" / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
    answers = sorted(two[0]["drawn"] + two[1]["drawn"])
    assert len(two[0]["drawn"]) == len(two[1]["drawn"]) > 0
    for found, expected in zip(answers, sorted(one["drawn"]), strict=True):
        assert found[:3] == expected[:3]
        assert found[3] == pytest.approx(expected[3], nan_ok=True)
        assert found[4] == pytest.approx(expected[4], abs=1e-4)
    weights = [load_file(runs / str(processes) / f"{name}.st") for processes in (1, 2)]
    assert largest_difference(*weights) < 1e-6
    assert len(two[0]["logs"]) == len(one["logs"]) > 2
    for found, expected in zip(two[0]["logs"], one["logs"], strict=True):
        assert told(found, level="level" in name) == pytest.approx(told(expected, level="level" in name), abs=1e-5)
    assert told(two[0]["eval"], level=False) == pytest.approx(told(one["eval"], level=False), abs=1e-5)
    lines = [
        [json.loads(line) for line in (runs / processes / name / "answers.jsonl").read_text().splitlines()]
        for processes in "12"
    ]
    for found, expected in zip(*lines, strict=True):
        assert found["prompt"] == expected["prompt"]
        assert [found[key]["text"] for key in ("best", "worst")] == [expected[key]["text"] for key in ("best", "worst")]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_draw_and_train_as_one_does(name: str, runs: Path) -> None:
    check_equal(runs, name)


def test_what_is_level_changes_no_bit_and_functions_are_heard_on_all_processes(runs: Path, tiny_model: Path) -> None:
    before = tiny("llama", len(AutoTokenizer.from_pretrained(tiny_model))).state_dict()
    after = load_file(runs / "2" / "all groups are level.st")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    [entry, *_] = json.loads((runs / "2" / "grpo.0.json").read_text())["logs"]
    assert entry["characters"] > 0


# Resuming

SAVING: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
RESUMED: Case = (
    GRPOTrainer,
    8,
    1,
    {"generation_batch_size": 16, "num_iterations": 2, "beta": 0.1, "accumulates": True},
)
"""A generation is used in four steps, so the checkpoint is within one."""


def run_saving(folder: Path, tokenizer: Path, kill_at: int = 0) -> None:
    ways.force(False)
    trainer = trainer_of(RESUMED, int(os.environ["WORLD_SIZE"]), tokenizer, folder, **SAVING)

    def kill(line: Any) -> None:
        if line.get("step") == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.listeners.append(kill)
    try:
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    except RuntimeError:
        assert kill_at  # and the first process is gone
        os._exit(1)
    if trainer.is_world_process_zero():
        save_file({key: value.clone() for key, value in trainer.model.state_dict().items()}, folder / "end.st")


def test_killed_within_a_generation_and_resumed_they_end_with_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    """One process goes on, too, whose micro-batches are as large, and twice as many."""
    whole, killed, one = (tmp_path / name for name in ("whole", "killed", "one"))
    together(2, run_saving, whole, tiny_model)
    children = started(2, run_saving, killed, tiny_model, 5)
    assert [finished(child, 100) for child in children] == [-signal.SIGKILL, 1]
    shutil.copytree(killed / "checkpoint-3", one / "checkpoint-3")
    together(2, run_saving, killed, tiny_model)
    together(1, run_saving, one, tiny_model)
    weights = [load_file(folder / "end.st") for folder in (whole, killed, one)]
    assert largest_difference(*weights[:2]) == 0.0
    assert largest_difference(weights[0], weights[2]) < 1e-6


# What fails on one process


def failing(completions: list[Any], **_: Any) -> list[float]:
    if os.environ["RANK"] == "1":
        raise FileNotFoundError(2, "the judge is asleep")
    return [0.0] * len(completions)


def run_failing(folder: Path, tokenizer: Path) -> None:
    case: Case = (GRPOTrainer, 8, 1, {"reward_funcs": failing})
    trainer = trainer_of(case, 2, tokenizer, folder)
    if os.environ["RANK"] == "1":
        with pytest.raises(TunesmithError, match=r"the reward failing failed on .*, answer .*the judge is asleep"):
            trainer.train()
    else:
        with pytest.raises(AnotherFailed):
            trainer.train()


def test_a_reward_that_fails_on_one_process_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    together(2, run_failing, tmp_path, tiny_model)


class Stranger(Script):
    """Says of its tokens what the model does not, on one process."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
        answers = super().__call__(prompts, sampling)
        logprobs = [-40.0] * 6 if os.environ["RANK"] == "1" else None
        return [Generated(ids=answer.ids, finish="length", logprobs=logprobs) for answer in answers]


def run_apart(folder: Path, tokenizer: Path) -> None:
    trainer = trainer_of((GRPOTrainer, 8, 1, {}), 2, tokenizer, folder)
    trainer.judge.generator = Stranger()
    with pytest.raises(TunesmithError, match="the model and its generator differ by"):
        trainer.train()


def test_another_generator_on_one_process_stops_all(tiny_model: Path, tmp_path: Path) -> None:
    together(2, run_apart, tmp_path, tiny_model)


def run_unevenly(folder: Path, tokenizer: Path) -> None:
    for name, lora in (("whole", False), ("adapters", True)):
        case: Case = (GRPOTrainer, 8, 1, {"shard": "full", "lora": lora})
        trainer = trainer_of(case, 2, tokenizer, folder / name)
        calls, drawing = [0], trainer.judge.generator

        def short(
            prompts: Any, sampling: Sampling, drawing: Any = drawing, calls: list[int] = calls
        ) -> list[Generated]:
            calls[0] += 1
            most = 1 if os.environ["RANK"] == "1" else sampling.max_new_tokens
            return list(drawing(prompts, replace(sampling, max_new_tokens=most)))

        trainer.judge.generator = short
        trainer.train()
        assert calls == [2]
        assert trainer.state.global_step == 2


def test_where_weights_are_shared_out_short_answers_wait_for_no_long_ones(tiny_model: Path, tmp_path: Path) -> None:
    together(2, run_unevenly, tmp_path, tiny_model)
