"""A recipe as text to read: each setting with the reason that the facts give for it."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.init.advice import GOALS, METHODS, PREFERENCES, Facts, Schedule, schedule, train_on, wanted_length
from tunesmith.text import counted, verb

WIDTH = 110
SMALL_MODEL = 500_000_000
"""Parameters below which a model takes, and needs, a higher learning rate."""
LEARNING_RATES = {"all weights": ("3e-4", "2e-5"), "adapters": ("1e-3", "2e-4")}
"""Of small models, and of others: the rule of docs/adapters.md and of chapter 3 of the guide, which measures the first
on 135 million parameters."""
PREFERENCE_RATES = {"all weights": ("5e-6", "1e-6"), "adapters": ("1e-4", "1e-5")}
"""The same of runs on preferences."""
WARMUP, LEAST_WARMED = 0.05, 20
"""The share of the steps in which the learning rate rises, in runs of at least so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A setting of a recipe and why it has this value."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Settings that belong together, under a heading."""

    title: str
    lines: tuple[Line, ...]


def values(sections: Sequence[Section]) -> dict[str, Any]:
    """What the recipe sets."""
    return {line.key: line.value for section in sections for line in section.lines}


def write(heading: Sequence[str], sections: Sequence[Section]) -> str:
    """The text of the recipe: `heading` as comments, then the sections. Lines of the heading that begin with spaces are
    commands, which stay whole however long they are: they are there to be copied."""
    parts = ["\n".join(wrapped for line in heading for wrapped in _comment(line))]
    for section in sections:
        lines = [text for line in section.lines for text in _written(line)]
        parts.append("\n".join([f"# {section.title}", *lines]))
    return "\n\n".join(parts) + "\n"


def _written(line: Line) -> list[str]:
    """Behind the setting where there is room for the reason, else above it."""
    setting = f"{_yaml(line.key)}: {_yaml(line.value)}"
    why = _plain(line.why)
    if not why:
        return [setting]
    if len(setting) + len(why) + 4 <= WIDTH:
        return [f"{setting}  # {why}"]
    return [*_comment(why), setting]


def _comment(text: str) -> list[str]:
    if text.startswith("  "):
        return [f"# {_printable(text)}"]
    return textwrap.wrap(
        _plain(text),
        WIDTH,
        initial_indent="# ",
        subsequent_indent="#   ",
        break_long_words=False,
        break_on_hyphens=False,
    ) or ["#"]


def _plain(text: str) -> str:
    """`text` in one line, without characters that YAML does not allow even in a comment."""
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _yaml(value: Any) -> str:
    """`value` as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()


# The settings


def sections(facts: Facts) -> list[Section]:
    """All settings of the recipe."""
    plan = schedule(facts)
    return [
        Section(title="The model and the data", lines=tuple(_data(facts, plan))),
        Section(title="What is learned", lines=tuple(_learned(facts, plan))),
        Section(title=f"What is trained: {METHODS[facts.fit.method]}", lines=tuple(_method(facts))),
        Section(title="Steps", lines=tuple(_steps(facts, plan))),
        Section(title="What is kept of the run", lines=tuple(_records(plan))),
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
    if facts.rows.kind in PREFERENCES:
        why = f"learns from {GOALS[wanted.goal]}; as `tunesmith {wanted.goal}`"
        lines.append(Line(key="trainer", value=wanted.goal, why=why))
    if model.template:
        lines.append(Line(key="chat_template_path", value=model.template, why="how messages become one text"))
    if plan.held_out:
        source = {source_name(wanted.data[0]): {"path": path, "held_out": plan.held_out}}
        count = facts.rows.rows - plan.train_rows
        why = f"{plan.held_out:.2%} of the rows, {count:,}, are not trained on: each epoch ends with the loss on them"
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


def _learned(facts: Facts, plan: Schedule) -> list[Line]:
    return _preference(facts, plan) if facts.rows.kind in PREFERENCES else _supervision(facts, plan)


def _preference(facts: Facts, plan: Schedule) -> list[Line]:
    rows, length = facts.rows, facts.fit.length
    if facts.wanted.goal == "dpo":
        lines = [Line(key="loss_type", value="sigmoid", why="DPO; the page about preferences lists others")]
    elif plan.micro > 1:
        why = "how far the model is from its reference is estimated in each micro-batch"
        lines = [Line(key="loss_type", value="kto", why=why)]
    else:
        why = "memory has room for one answer at once, and kto needs two"
        lines = [Line(key="loss_type", value="apo_zero_unpaired", why=why)]
    bad = rows.rows - rows.good
    if facts.wanted.goal == "kto" and rows.good and bad and rows.good != bad:
        key, rarer = ("desirable_weight", rows.good) if rows.good < bad else ("undesirable_weight", bad)
        why = f"{rows.good:,} answers are good and {bad:,} bad; so weighed, both count alike"
        lines.append(Line(key=key, value=round((rows.rows - rarer) / rarer, 2), why=why))
    lines.append(Line(key="beta", value=0.1, why="higher stays closer to the model that training begins with"))
    over = facts.lengths.over(length)
    cut = "; what is too much goes from the prompt's front" if over else ""
    why = f"of a prompt with one answer. {_length_reason(facts, plan)}{cut}"
    return [*lines, Line(key="max_length", value=length, why=why)]


def _supervision(facts: Facts, plan: Schedule) -> list[Line]:
    what, why = train_on(facts.wanted.goal, facts.rows)
    lines = [] if what is None else [Line(key="train_on", value=what, why=why)]
    length = facts.fit.length
    lines.append(Line(key="max_length", value=length, why=_length_reason(facts, plan)))
    over = facts.lengths.over(length)
    if plan.packing and facts.wanted.goal == "continue":
        why = "several texts side by side in a pack; none of them sees another"
        lines.append(Line(key="packing", value=True, why=why))
        if over:
            why = "longer texts are cut into pieces, and all of them are learned"
            lines.append(Line(key="overlong", value="split", why=why))
    elif plan.packing:
        count = length / max(1.0, facts.lengths.mean)
        why = f"your rows are short: about {count:,.0f} share a pack, side by side, and none of them sees another"
        lines.append(Line(key="packing", value=True, why=why))
    elif over:
        lines.append(_overlong(facts, over))
    return lines


def _length_reason(facts: Facts, plan: Schedule) -> str:
    lengths, length, context = facts.lengths, facts.fit.length, facts.model.context
    about, over = "about " if lengths.sampled else "", lengths.over(length)
    if plan.packing:
        rows = "texts" if facts.wanted.goal == "continue" else "rows"
        return f"tokens of a pack; your {rows} have {lengths.mean:,.0f} on average, the longest {lengths.longest:,}"
    what = "answers" if facts.rows.kind in PREFERENCES else "rows"
    most = f"99% of your {what} have {lengths.share(0.99):,} tokens or fewer"
    if not over:
        return f"all of your {what} fit: {most}, the longest {lengths.longest:,}"
    limit = ""
    if context is not None and length >= context:
        limit = "; the model has no positions for more"
    elif length < wanted_length(facts.wanted.goal, facts.rows, lengths, facts.model):
        limit = "; memory has no room for more"
    return f"{most}; {about}{over:,} {verb(over, 'is', 'are')} longer{limit}"


def _overlong(facts: Facts, over: int) -> Line:
    """What happens to rows that are too long."""
    goal = facts.wanted.goal
    which = f"{'about ' if facts.lengths.sampled else ''}{counted(over, 'longer row')}"
    are = verb(over, "is", "are")
    if goal == "classify" and facts.rows.separate:
        why = f"{which} {verb(over, 'loses', 'lose')} the beginning of the question, not the label"
        return Line(key="truncate_prompt", value=True, why=why)
    if goal in ("classify", "json", "tools"):
        why = f"the {which} {are} left out: half an answer would teach a wrong end"
        return Line(key="overlong", value="drop", why=why)
    why = f"the {which} {are} cut; drop leaves {verb(over, 'it', 'them')} out, error stops"
    return Line(key="overlong", value="truncate", why=why)


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
    kind = "all weights" if facts.fit.method == "full" else "adapters"
    small = facts.model.parameters < SMALL_MODEL
    why = f"usual for {kind} of a model of {facts.model.parameters / 1e6:,.0f} million parameters"
    why += "; larger ones want less" if small else ""
    rates = PREFERENCE_RATES if facts.rows.kind in PREFERENCES else LEARNING_RATES
    return Line(key="learning_rate", value=rates[kind][0 if small else 1], why=why)


def _steps(facts: Facts, plan: Schedule) -> list[Line]:
    fit, what = facts.fit, "packs" if plan.packing else "rows"
    fits = "the most that a step needs" if plan.micro < fit.rows or plan.accumulation == 1 else "the most that fits"
    if not fit.fits:
        fits = "even this is planned to be too much"
    size = plan.micro * plan.accumulation
    epochs = f"for {counted(plan.train_rows, 'row')}: {counted(plan.steps, 'step')}"
    micro = f"{what} at once; on {facts.device}, {fits}"
    step = f"micro-batches of a step, which has {size} {what if size > 1 else what[:-1]}"
    lines = [
        Line(key="num_train_epochs", value=plan.epochs, why=epochs),
        Line(key="per_device_train_batch_size", value=plan.micro, why=micro),
        Line(key="gradient_accumulation_steps", value=plan.accumulation, why=step),
    ]
    if fit.checkpointing:
        why = "layers are computed twice, to fit into memory"
        lines.append(Line(key="gradient_checkpointing", value=True, why=why))
    lines.append(Line(key="lr_scheduler_type", value="cosine", why="the learning rate falls to 0 at the end"))
    if plan.steps >= LEAST_WARMED:
        warmup = max(1, round(WARMUP * plan.steps))
        lines.append(Line(key="warmup_steps", value=warmup, why="the learning rate rises in the first steps"))
    why = "the fastest of fp32, bf16 and fp16, measured when the run starts"
    return [*lines, Line(key="precision", value="auto", why=why)]


def _records(plan: Schedule) -> list[Line]:
    every, why = max(1, min(10, plan.steps // 20)), "a line is printed every so many steps; metrics.jsonl has each"
    return [
        Line(key="logging_steps", value=every, why=why),
        Line(key="save_strategy", value="epoch", why="a checkpoint after each epoch, to go on from"),
        Line(key="save_total_limit", value=2, why="the newest checkpoints; older ones are deleted"),
        Line(key="seed", value=42, why="the order of the rows, and what is held out"),
    ]
