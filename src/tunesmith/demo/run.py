"""The demo: a small model learns to answer order e-mails, and its answers before and after are counted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from rich.console import Console

from tunesmith.demo.orders import SEED, Row, exact_match, held_out_rows, training_rows, valid_json
from tunesmith.home import DEMO
from tunesmith.model.demo_model import demo_model_path
from tunesmith.model.generate import generate
from tunesmith.model.precision import settle_precision
from tunesmith.settings.config import Precision, SFTConfig
from tunesmith.train.progress import TrainingProgress
from tunesmith.trainers import SFTTrainer

MAX_NEW_TOKENS = 52
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST_ADAPTED, LAYERS = 10, 30
"""The lowest third of the layers has no adapters, so that a backward pass ends above it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out answers against the expected ones; shares in [0, 1]."""

    answers: list[str]
    exactly_right: float
    valid_json: float

    def shares(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "answers"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of the demo. `trained` counts the e-mails it was trained on."""

    trained: int
    held_out: list[Row]
    before: Score
    after: Score
    report: Path | None


def run(output: Path, console: Console, seed: int = SEED, precision: Precision = "auto") -> Outcome:
    """Trains on the e-mails, and measures before and after; what happens on the way is printed to `console`.

    `seed` decides the e-mails, the first weights of the adapters, and the order of training; `precision` is that of
    `SFTConfig`.
    """
    rows, held_out = training_rows(seed=seed), held_out_rows(seed=seed)
    trainer = supervised_trainer(output, rows, seed, precision, console)
    with trainer.model.disable_adapter():  # which change nothing yet, and take time
        before = measure(trainer, held_out, "before training", console)
    with TrainingProgress.attach(trainer, console):
        trainer.train()
    after = measure(trainer, held_out, "after training", console)
    trainer.save_model()
    return Outcome(trained=len(rows), held_out=held_out, before=before, after=after, report=trainer.report)


def supervised_trainer(output: Path, rows: list[Row], seed: int, precision: Precision, console: Console) -> Any:
    """A trainer that makes the demo model answer e-mails like those of `rows`, in one pass over them."""
    demo_model_path(progress=lambda line: console.print(line, highlight=False))
    args = SFTConfig(
        output_dir=str(output),
        learning_rate=2e-3,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        warmup_steps=8,
        adam_beta2=0.98,  # the default 0.999 averages over more steps than this run has
        lr_scheduler_type="linear",
        train_on="assistant",
        logging_steps=9,  # 16 lines of its 135 steps, where no view is drawn in place
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        seed=seed,
        precision=precision,
        disable_tqdm=True,
    )
    if note := settle_precision(args):
        console.print(f"Settled on {note}.", highlight=False, soft_wrap=True)
    adapter = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=ADAPTED,
        layers_to_transform=list(range(FIRST_ADAPTED, LAYERS)),
        task_type="CAUSAL_LM",
    )
    return SFTTrainer(model=DEMO, args=args, train_dataset=rows, peft_config=adapter)


def measure(trainer: Any, held_out: list[Row], when: str, console: Console) -> Score:
    """Answers every held-out e-mail greedily, and counts; `when` is said, such as "after training"."""
    expected, count = list(map(right_answer, held_out)), len(held_out)
    with console.status(f"Answering {count} e-mails the model has never seen, {when} ..."):
        answers = answer(trainer, held_out)
    exact = sum(map(exact_match, answers, expected)) / count
    console.print(f"{when[0].upper()}{when[1:]}: {exact:.0%} of {count} new e-mails exactly right.", highlight=False)
    return Score(answers=answers, exactly_right=exact, valid_json=sum(map(valid_json, answers)) / count)


def answer(trainer: Any, rows: list[Row], temperature: float = 0.0) -> list[str]:
    """What the trainer's model answers to the e-mails of `rows`."""
    prompts = [row["messages"][:-1] for row in rows]
    settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": temperature}
    return generate(trainer.model, trainer.processing_class, prompts, **settings)


def right_answer(row: Row) -> str:
    return row["messages"][-1]["content"]
