"""`tunesmith demo`: fine-tune a real model on a task whose success can be counted, and show the difference."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.terminal.output import finish, finish_lines, progress_console

LEARNING_RATE = 2e-3
BATCH_SIZE = 2
MAX_NEW_TOKENS = 72
SHOWN = 3


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    export_data: Annotated[
        Path | None, typer.Option(help="Write the demo's data into this folder and stop.", show_default=False)
    ] = None,
) -> None:
    """Fine-tune the demo model on order e-mails and compare its answers before and after.

    Takes about five minutes on two CPU cores. Example: tunesmith demo --output runs/demo
    """
    console = progress_console()
    if export_data is not None:
        from tunesmith.demo.orders import export

        paths = list(export(export_data))
        finish_lines({"files": paths}, [f"Wrote {path}" for path in paths])
        return
    run(output, console)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out answers against the expected ones; shares in [0, 1]."""

    answers: list[str]
    exact: float
    valid: float


def run(output: Path, console: Console) -> Score:
    """The whole demo, told on `console`, its result where results go; returns the score after training."""
    started = time.perf_counter()
    console.print("[bold]Task[/]: an order e-mail in, strict JSON out: customer, items, date, urgency.")
    console.print("Loading the demo model, SmolLM2-135M-Instruct, and the libraries ...")
    from tunesmith.demo.orders import held_out_rows, training_rows

    rows, held_out = training_rows(), held_out_rows()
    trainer = _trainer(output, rows, held_out, console)
    with trainer.model.disable_adapter():  # which change nothing yet, and take time
        before = _measure(trainer, held_out, "before", console)
    _train(trainer, console)
    after = _measure(trainer, held_out, "after", console)
    trainer.save_model()
    seconds = time.perf_counter() - started
    scores = {
        name: {"exactly_right": score.exact, "valid_json": score.valid}
        for name, score in (("before", before), ("after", after))
    }
    about = {"output": str(output), "held_out": len(held_out), "seconds": seconds}
    finish(about | scores, lambda: _show(held_out, before, after, Console()))
    console.print(f"\nTrained on {len(rows)} e-mails in {output}; everything took {seconds / 60:.1f} minutes.")
    if trainer.report is not None:
        console.print(f"How it went: {trainer.report}", highlight=False, soft_wrap=True)
    _next_commands(output, held_out[0]["messages"], console)
    return after


def _trainer(output: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]], console: Console) -> Any:
    from peft import LoraConfig

    from tunesmith.home import DEMO
    from tunesmith.model.demo_model import demo_model_path
    from tunesmith.model.precision import settle_precision
    from tunesmith.settings.config import SFTConfig
    from tunesmith.trainers import SFTTrainer

    demo_model_path(progress=lambda line: console.print(line, highlight=False))
    args = SFTConfig(
        output_dir=str(output),
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        warmup_steps=8,
        adam_beta2=0.98,  # the default 0.999 averages over more steps than this run has
        lr_scheduler_type="linear",
        train_on="assistant",
        eval_strategy="steps",
        eval_steps=0.5,
        sample_prompts=SHOWN,
        logging_steps=9,  # 16 lines of its 135 steps, where no view is drawn in place
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    console.print(f"Settled on {settle_precision(args)}.", highlight=False, soft_wrap=True)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(model=DEMO, args=args, train_dataset=rows, eval_dataset=held_out, peft_config=adapter)


def _train(trainer: Any, console: Console) -> None:
    from tunesmith.train.progress import TrainingProgress

    with TrainingProgress.attach(trainer, console):
        trainer.train()


def _measure(trainer: Any, held_out: list[dict[str, Any]], when: str, console: Console) -> Score:
    """Generate an answer for every held-out e-mail, greedily, and count."""
    from tunesmith.demo.orders import exact_match, valid_json
    from tunesmith.model.generate import generate

    prompts = [row["messages"][:-1] for row in held_out]
    expected = [row["messages"][-1]["content"] for row in held_out]
    with console.status(f"Answering {len(prompts)} e-mails the model has never seen, {when} training ..."):
        answers = generate(
            trainer.model,
            trainer.processing_class,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=len(prompts),
        )
    count = len(answers)
    exact = sum(map(exact_match, answers, expected)) / count
    valid = sum(map(valid_json, answers)) / count
    console.print(f"{when.capitalize()} training: {exact:.0%} of {count} new e-mails exactly right.", highlight=False)
    return Score(answers=answers, exact=exact, valid=valid)


def _show(held_out: list[dict[str, Any]], before: Score, after: Score, console: Console) -> None:
    # Not the table's title, which would be broken into lines as wide as the table.
    console.print(
        f"\n{len(held_out)} held-out e-mails: other names, items and phrasings than in training", highlight=False
    )
    table = Table()
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row("exactly right", f"{before.exact:.0%}", f"[bold green]{after.exact:.0%}[/]")
    table.add_row("valid JSON of an order", f"{before.valid:.0%}", f"[bold green]{after.valid:.0%}[/]")
    console.print(table)
    examples = Table(title="Three of them", show_lines=True)
    for name in ("e-mail", "before", "after"):
        examples.add_column(name, overflow="fold", ratio=1)
    for row, old, new in list(zip(held_out, before.answers, after.answers, strict=True))[:SHOWN]:
        # Model output is text, not markup: a "[" in it must not style the table.
        examples.add_row(*(_plain(cell) for cell in (row["messages"][1]["content"], old, new)))
    console.print(examples)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _next_commands(output: Path, messages: list[dict[str, str]], console: Console) -> None:
    from shlex import quote

    mail = messages[1]["content"].replace("\n", " ")
    commands = (
        f"tunesmith chat {output} --system {quote(messages[0]['content'])} --prompt {quote(mail)}",
        "tunesmith demo --export-data data/orders",
        "tunesmith train --model demo --data data/orders/train.jsonl --lora r=16 --output runs/mine",
    )
    console.print("\nNext:")
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
