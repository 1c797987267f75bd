"""The settings of a recipe, each with the reason that the facts give for it."""

import re
from pathlib import Path
from typing import Any

from tunesmith.init.advice import GOALS, METHODS, Facts, Schedule, schedule, train_on, wanted_length
from tunesmith.init.recipe_text import Line, Section
from tunesmith.text import counted, verb

SMALL_MODEL = 500_000_000
"""Parameters below which a model takes, and needs, a higher learning rate."""
LEARNING_RATES = {"full": ("5e-5", "2e-5"), "adapters": ("1e-3", "2e-4")}
"""Of small models, and of others. 1e-3 is what the demo's task was learned best with, of LoRA on 135 million."""
WARMUP, LEAST_WARMED = 0.05, 20
"""The share of the steps in which the learning rate rises, in runs of at least so many."""


def sections(facts: Facts) -> list[Section]:
    """All settings of the recipe."""
    plan = schedule(facts)
    return [
        Section(title="The model and the data", lines=tuple(_data(facts, plan))),
        Section(title="What is learned", lines=tuple(_supervision(facts, plan))),
        Section(title=f"What is trained: {METHODS[facts.fit.method]}", lines=tuple(_method(facts))),
        Section(title="Steps", lines=tuple(_steps(facts, plan))),
        Section(title="What is kept of the run", lines=tuple(_kept(plan))),
    ]


def source_name(path: str) -> str:
    """A name for the source of the rows. It names what is held out, too, for which `train` would be misleading."""
    name = re.sub(r"\W+", "_", Path(path.split(":")[0]).stem).strip("_").lower()
    return name if name and name not in ("train", "eval", "test", "data", "validation") else "rows"


def heading(facts: Facts, recipe: str) -> list[str]:
    """What the recipe is for, and how to go on."""
    rows, goal, data = facts.rows, facts.wanted.goal, ", ".join(facts.wanted.data)
    roles = f" of {', '.join(rows.roles)}" if rows.roles else ""
    return [
        f"Written by `tunesmith init` for {data}: {counted(rows.rows, 'row')}, format {rows.format}{roles}.",
        f"Goal: {goal}, {GOALS[goal]}. Every line may be changed; `tunesmith train --fields` lists all there are.",
        "Look first:",
        f"  tunesmith check {recipe}",
        f"  tunesmith inspect {recipe}",
        "Then:",
        f"  tunesmith train {recipe}",
    ]


def _data(facts: Facts, plan: Schedule) -> list[Line]:
    wanted, model = facts.wanted, facts.model
    path: Any = wanted.data[0] if len(wanted.data) == 1 else list(wanted.data)
    lines = [Line(key="model", value=model.name, why=model.note)]
    if model.template:
        lines.append(Line(key="chat_template_path", value=model.template, why="how messages become one text"))
    if plan.held_out:
        source = {source_name(wanted.data[0]): {"path": path, "held_out": plan.held_out}}
        count = facts.rows.rows - plan.train_rows
        why = f"{plan.held_out:.2%} of the rows, {count:,}, are not trained on: the loss on them is told after an epoch"
        lines.append(Line(key="data", value=source, why=why.replace(".00%", "%")))
    else:
        count = facts.rows.rows
        few = f"{counted(count, 'row')} {verb(count, 'is', 'are')} too few"
        why = f"{few} to hold some out; give others as eval_data: FILE"
        lines.append(Line(key="data", value=path, why=why))
    if wanted.columns:
        named = ", ".join(f"{theirs} is the {ours}" for ours, theirs in wanted.columns.items())
        lines.append(Line(key="columns", value=dict(wanted.columns), why=f"our names of your columns: {named}"))
    lines.append(Line(key="output", value=wanted.output, why="the folder of the run"))
    return lines


def _supervision(facts: Facts, plan: Schedule) -> list[Line]:
    what, why = train_on(facts.wanted.goal, facts.rows)
    lines = [] if what is None else [Line(key="train_on", value=what, why=why)]
    length = facts.fit.length
    lines.append(Line(key="max_length", value=length, why=_length_reason(facts, plan)))
    over = facts.lengths.over(length)
    if plan.packing:
        return lines + _packing(facts)
    if over:
        lines.append(_overlong(facts, over))
    return lines


def _length_reason(facts: Facts, plan: Schedule) -> str:
    lengths, length, context = facts.lengths, facts.fit.length, facts.model.context
    about, over = "about " if lengths.sampled else "", lengths.over(length)
    if facts.wanted.goal == "continue":
        return f"tokens of a pack; your texts have {lengths.mean:,.0f} on average, the longest {lengths.longest:,}"
    if plan.packing:
        return f"tokens of a pack; your rows have {lengths.mean:,.0f} on average, the longest {lengths.longest:,}"
    said = f"99% of your rows have {lengths.share(0.99):,} tokens or fewer"
    if not over:
        return f"all of your rows fit: {said}, the longest {lengths.longest:,}"
    capped = ""
    if context is not None and length >= context:
        capped = "; the model has no positions for more"
    elif length < wanted_length(facts.wanted.goal, facts.rows, lengths, facts.model):
        capped = "; memory has no room for more"
    return f"{said}; {about}{over:,} {verb(over, 'is', 'are')} longer{capped}"


def _packing(facts: Facts) -> list[Line]:
    per_pack = facts.fit.length / max(1.0, facts.lengths.mean)
    if facts.wanted.goal == "continue":
        why = "several texts side by side in a pack; none of them sees another"
        over = facts.lengths.over(facts.fit.length)
        split = Line(key="overlong", value="split", why="longer texts are cut into pieces, and all of them are learned")
        return [Line(key="packing", value=True, why=why), *([split] if over else [])]
    why = f"your rows are short: about {per_pack:,.0f} share a pack, side by side, and none of them sees another"
    return [Line(key="packing", value=True, why=why)]


def _overlong(facts: Facts, over: int) -> Line:
    """What happens to rows that are too long."""
    goal = facts.wanted.goal
    which = f"{'about ' if facts.lengths.sampled else ''}{counted(over, 'longer row')}"
    are = verb(over, "is", "are")
    if goal == "classify" and facts.rows.separate:
        return Line(
            key="truncate_prompt",
            value=True,
            why=f"{which} {verb(over, 'loses', 'lose')} the beginning of the question, not the label",
        )
    if goal in ("classify", "json", "tools"):
        return Line(
            key="overlong", value="drop", why=f"the {which} {are} left out: half an answer would teach a wrong end"
        )
    return Line(
        key="overlong",
        value="truncate",
        why=f"the {which} {are} cut; drop leaves {verb(over, 'it', 'them')} out, error stops",
    )


def _method(facts: Facts) -> list[Line]:
    method, rate = facts.fit.method, _learning_rate(facts)
    if method == "full":
        return [rate]
    rank = 32 if facts.wanted.goal == "continue" else 16
    why = "rank and scale of the adapters, on every linear layer but the head"
    lines = [Line(key="lora", value={"r": rank, "alpha": 2 * rank, "target": "all-linear"}, why=why)]
    if method != "lora":
        forced = "" if facts.wanted.method else "; in 16 bits it would not fit into memory"
        bits = "LLM.int8" if method == "8bit" else "NF4"
        lines.append(Line(key="quantize", value=method, why=f"the frozen weights are kept in {bits}{forced}"))
    return [*lines, rate]


def _learning_rate(facts: Facts) -> Line:
    kind = "full" if facts.fit.method == "full" else "adapters"
    small = facts.model.parameters < SMALL_MODEL
    what = "all weights" if kind == "full" else "adapters"
    size = f"a model of {facts.model.parameters / 1e6:,.0f} million parameters"
    more = "; larger ones want less" if small else ""
    return Line(
        key="learning_rate", value=LEARNING_RATES[kind][0 if small else 1], why=f"usual for {what} of {size}{more}"
    )


def _steps(facts: Facts, plan: Schedule) -> list[Line]:
    fit, what = facts.fit, "packs" if plan.packing else "rows"
    fits = "the most that a step needs" if plan.micro < fit.rows or plan.accumulation == 1 else "the most that fits"
    if not fit.fits:
        fits = "even this is planned to be too much"
    size = plan.micro * plan.accumulation
    lines = [
        Line(
            key="num_train_epochs",
            value=plan.epochs,
            why=f"for {counted(plan.train_rows, 'row')}: {counted(plan.steps, 'step')}",
        ),
        Line(
            key="per_device_train_batch_size",
            value=plan.micro,
            why=f"{what} at once; on {facts.device}, {fits}",
        ),
        Line(
            key="gradient_accumulation_steps",
            value=plan.accumulation,
            why=f"so many times that make a step, of {size} {what if size > 1 else what[:-1]}",
        ),
    ]
    if fit.checkpointing:
        why = "layers are computed twice, to fit into memory"
        lines.append(Line(key="gradient_checkpointing", value=True, why=why))
    lines.append(Line(key="lr_scheduler_type", value="cosine", why="the learning rate falls to 0 at the end"))
    if plan.steps >= LEAST_WARMED:
        warmup = max(1, round(WARMUP * plan.steps))
        lines.append(Line(key="warmup_steps", value=warmup, why="the learning rate rises in the first steps"))
    lines.append(
        Line(key="precision", value="auto", why="the fastest of fp32, bf16 and fp16, measured when the run starts")
    )
    return lines


def _kept(plan: Schedule) -> list[Line]:
    return [
        Line(
            key="logging_steps",
            value=max(1, min(10, plan.steps // 20)),
            why="a line is printed each so many; metrics.jsonl has every step",
        ),
        Line(key="save_strategy", value="epoch", why="a checkpoint after each epoch, to go on from"),
        Line(key="save_total_limit", value=2, why="the newest checkpoints; older ones are deleted"),
        Line(key="seed", value=42, why="the order of the rows, and what is held out"),
    ]
