"""The demo on preferences: a model that has learned order e-mails a little learns from its own mistakes.

After a short supervised fine-tuning, it answers e-mails that it has not seen. Each wrong answer makes a pair with the
right one, on which it is trained with DPO. The answers to held-out e-mails are counted before that and after.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tunesmith.demo.orders import SEED, Row, exact_match, held_out_rows, training_rows, valid_json
from tunesmith.demo.run import Score, answer, measure, right_answer, supervised_trainer
from tunesmith.evaluate.scores import Metric, Result, scored
from tunesmith.settings.config import Precision
from tunesmith.settings.preference import DPOConfig
from tunesmith.train.progress import TrainingProgress
from tunesmith.trainers import DPOTrainer

SUPERVISED_COUNT = 32
"""So few e-mails are shown with their answers that much is left to learn."""
ANSWERED_COUNT = 384
"""So many others are answered, of which the wrong ones make pairs."""
HELD_OUT_COUNT = 100
METRICS = (
    Metric(name="exactly right", score=exact_match),
    Metric(name="valid JSON of an order", score=lambda answer, _: valid_json(answer)),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it: the counts of pairs, the answers to the `held_out` e-mails `before` and `after` the training on
    pairs, and of each metric both shares and their difference, with 95% intervals. `report` is the page about DPO."""

    supervised: int
    answered: int
    pairs: int
    held_out: list[Row]
    before: Score
    after: Score
    results: list[Result]
    report: Path | None


def run_preferences(output: Path, console: Console, seed: int = SEED, precision: Precision = "auto") -> Outcome:
    """Supervised fine-tuning into `output`/supervised, then DPO on the model's own mistakes into `output`/dpo.

    `seed` decides the e-mails, the first weights of the adapters, the answers that are drawn, and the order of
    training.
    """
    rows, held_out = training_rows(SUPERVISED_COUNT + ANSWERED_COUNT, seed), held_out_rows(HELD_OUT_COUNT, seed)
    seen, unseen = rows[:SUPERVISED_COUNT], rows[SUPERVISED_COUNT:]
    teacher = supervised_trainer(output / "supervised", seen, seed, precision, console)
    with TrainingProgress.attach(teacher, console):
        teacher.train()
    teacher.save_model()
    before = measure(teacher, held_out, "after supervised fine-tuning", console)
    torch.manual_seed(seed)
    with console.status(f"Answering {len(unseen)} e-mails, each once, as the model would by chance ..."):
        drawn = answer(teacher, unseen, temperature=1.0)
    pairs = pairs_of(unseen, drawn)
    console.print(f"{len(pairs)} of {len(unseen)} answers are wrong: so many pairs to learn from.", highlight=False)
    settled = teacher.args.precision
    del teacher  # its memory
    trainer = _trainer(output, pairs, seed, settled)
    with TrainingProgress.attach(trainer, console):
        trainer.train()
    after = measure(trainer, held_out, "after DPO", console)
    trainer.save_model()
    expected = list(map(right_answer, held_out))
    return Outcome(
        supervised=len(seen),
        answered=len(unseen),
        pairs=len(pairs),
        held_out=held_out,
        before=before,
        after=after,
        results=[scored(metric, expected, after.answers, before.answers, seed) for metric in METRICS],
        report=trainer.report,
    )


def pairs_of(rows: list[Row], answers: list[str]) -> list[dict[str, Any]]:
    """A pair for each row whose answer is wrong: the right one is chosen, that one rejected."""
    return [
        {
            "prompt": row["messages"][:-1],
            "chosen": row["messages"][-1:],
            "rejected": [{"role": "assistant", "content": text}],
        }
        for row, text in zip(rows, answers, strict=True)
        if not exact_match(text, right_answer(row))
    ]


def _trainer(output: Path, pairs: list[dict[str, Any]], seed: int, precision: Any) -> Any:
    """A trainer of the adapters that supervised fine-tuning has saved; as they are now, they are the reference."""
    args = DPOConfig(
        output_dir=str(output / "dpo"),
        # Right and wrong answers are nearly alike: at this learning rate sigmoid alone makes both unlikely, so that no
        # answer is right any more. With sft, the right ones are learned, too.
        loss_type=["sigmoid", "sft"],
        loss_weights=[0.3, 1.0],
        beta=0.1,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        warmup_steps=4,
        adam_beta2=0.98,
        lr_scheduler_type="linear",
        logging_steps=2,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        seed=seed,
        precision=precision,
        disable_tqdm=True,
    )
    return DPOTrainer(model=str(output / "supervised"), args=args, train_dataset=pairs)
