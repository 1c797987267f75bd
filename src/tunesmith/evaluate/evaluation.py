"""Rows that were not trained on, asked of a run and of its base model, and how good the answers are."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.formats import FormatOptions, parse_rows
from tunesmith.data.read import read_rows
from tunesmith.data.tokenize import Counts
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.scores import Metric, Result, fitting, refuse_unfit, scored
from tunesmith.terminal.output import note as say
from tunesmith.terminal.output import progress_console
from tunesmith.types import Judged, Pair, Row, Text, Tokens

if TYPE_CHECKING:
    from tunesmith.model.generate import Answer
    from tunesmith.runs.record import RunRecord

Prompt = str | tuple[dict[str, Any], ...]
"""A text to go on with, or messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is asked, and how."""

    run: str
    limit: int | None
    max_new_tokens: int
    batch_size: int | None
    with_base: bool
    as_chat: bool | None
    seed: int
    trust_remote_code: bool

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TunesmithError(f"{name} is {value}; it is at least 1")
        if self.seed < 0:
            raise TunesmithError(f"seed is {self.seed}; it is at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What the answers came to. `reason`: why these metrics, where nobody named any."""

    answered: "Answered"
    metrics: Sequence[Metric]
    results: Sequence[Result]
    counts: Counts
    reason: str

    def cut_off(self) -> dict[str, list[int]]:
        """Which answers did not end, by the model that gave them."""
        by_model = self.answered.by_model()
        return {name: [i for i, item in enumerate(answers) if not item.ended] for name, answers in by_model.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "metrics_chosen_for": self.reason,
            "rows": len(self.answered.questions),
            "metrics": [result_as_json(result) for result in self.results],
            "cut_off": {name: len(rows) for name, rows in self.cut_off().items()},
            "left_out": {why: {"rows": count, "places": at} for why, (count, at) in self.counts.dropped.items()},
            "notes": self.answered.notes,
        }

    def lines(self) -> Iterable[str]:
        """A line of JSON for each row: the question, the answers and their scores."""
        for i, question in enumerate(self.answered.questions):
            line: dict[str, Any] = {"place": question.place, "prompt": question.prompt, "expected": question.expected}
            for model, answers in self.answered.by_model().items():
                scores = {item.name: item.score(answers[i].text, question.expected) for item in self.metrics}
                line[model] = {"answer": answers[i].text, "cut_off": not answers[i].ended, "scores": scores}
            yield json.dumps(line, ensure_ascii=False) + "\n"


def result_as_json(result: Result) -> dict[str, Any]:
    about = {"name": result.metric.name, "kind": "share" if result.metric.is_share else "mean", "rows": result.count}
    estimates = {"tuned": result.tuned, "base": result.base, "difference": result.difference}
    return about | {name: None if item is None else asdict(item) for name, item in estimates.items()}


def evaluate(settings: Settings, source: "Source", metrics: Sequence[Metric]) -> Evaluation:
    """Asks the rows of `source`, and scores the answers by `metrics`; without any, by those that fit.

    Raises TunesmithError for what can't be read, asked or scored.
    """
    counts = Counts()
    asked = questions(source, counts)
    expected = [item.expected for item in asked]
    metrics, reason = (metrics, "") if metrics else fitting(expected)
    if reason:
        say(f"metrics: {', '.join(item.name for item in metrics)}, because {reason}")
    refuse_unfit(metrics, expected)
    answered = ask(asked, settings, counts)
    for note in answered.notes:
        say(f"note: {note}")
    expected = [item.expected for item in answered.questions]
    texts = {model: [answer.text for answer in answers] for model, answers in answered.by_model().items()}
    results = [scored(item, expected, texts["tuned"], texts.get("base"), settings.seed) for item in metrics]
    return Evaluation(answered=answered, metrics=metrics, results=results, counts=counts, reason=reason)


# The questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One row: `place` says which, `arguments` are for the chat template, such as `tools`."""

    place: str
    prompt: Prompt
    expected: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the rows are: as `read_rows` and `FormatOptions` take it. `system` is put in place of the rows' own system
    message. `rows`: they are there already, each with its place, and `data` is what they are called."""

    data: str
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    rows: Sequence[tuple[str, Mapping[str, Any]]] | None = None

    def read(self) -> Any:
        """All rows, each with its place."""
        return read_rows(self.data, self.split, default_split="test") if self.rows is None else self.rows


def as_trained(settings: Settings, source: Source) -> Source:
    """`source` under the column names that the run in a folder was trained under, where its first row has them all."""
    record = record_of(settings) if Path(settings.run).is_dir() else None
    columns = record.settings.get("columns") if record is not None else None
    if not isinstance(columns, Mapping) or not columns:
        return source
    _, first = next(iter(source.read()), ("", {}))
    if not all(name in first for name in columns.values()):
        return source
    named = ", ".join(f"{theirs!r} as {ours!r}" for ours, theirs in columns.items())
    say(f"columns: {named}, as in training; --columns does otherwise")
    return replace(source, columns=columns)


def questions(source: Source, counts: Counts) -> list[Question]:
    """All rows that have a prompt and an answer; `counts` is told of the others.

    Raises TunesmithError for what can't be read, and where no row is left.
    """
    options = FormatOptions(columns=source.columns)
    asked: list[Question] = []
    for place, row in parse_rows(source.read(), options):
        counts.rows += 1
        question = _question(place, row, source.system)
        if isinstance(question, Question):
            asked.append(question)
        else:
            counts.drop(question, place)
    if not asked:
        reason, (count, places) = next(iter(counts.dropped.items()))
        raise TunesmithError(
            f"{source.data} has no row with a prompt and an answer: {count:,} with {reason} ({', '.join(places)})"
        )
    return asked


def _question(place: str, row: Row, system: str | None) -> Question | str:
    """The question of a row, or what it comes with instead."""
    if isinstance(row, Tokens):
        return "token ids, which are no text to ask"
    if isinstance(row, Pair | Judged):
        return "a preference, not a prompt and an answer"
    if isinstance(row, Text):
        if row.prompt is None:
            return "one text, not a prompt and an answer"
        prompt: Prompt = row.prompt
        expected, arguments = row.text[len(row.prompt) :], {}
        if not row.prompt.strip():
            return "no prompt"
    else:
        behind = range(row.prompt_length or 0, len(row.messages))
        at = max((i for i in behind if row.messages[i].role == "assistant"), default=None)
        if not at:
            return "no answer" if at is None else "no prompt"
        prompt = tuple(message.fields for message in row.messages[:at])
        content, arguments = row.messages[at].fields.get("content"), dict(row.template_kwargs)
        expected = "".join(part["text"] for part in content) if isinstance(content, list) else str(content or "")
        if row.tools:
            arguments["tools"] = row.tools
        if not expected.strip() and row.messages[at].fields.get("tool_calls"):
            return "a call of a tool for its answer, not a text"
    if not expected.strip():
        return "no answer"
    if system is not None:
        messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        prompt = ({"role": "system", "content": system}, *(item for item in messages if item["role"] != "system"))
    return Question(place=place, prompt=prompt, expected=expected, arguments=arguments)


# The answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The questions that were asked and their answers, in one order. `notes` say what was decided or left out."""

    questions: list[Question]
    tuned: list["Answer"]
    base: list["Answer"] | None
    notes: list[str]

    def by_model(self) -> dict[str, list["Answer"]]:
        return {"tuned": self.tuned} | ({} if self.base is None else {"base": self.base})


def ask(asked: Sequence[Question], settings: Settings, counts: Counts) -> Answered:
    """The answers of the run and of its base model. `counts` is told which rows don't fit into the model."""
    from peft import PeftModel

    from tunesmith.model.load import load_run

    record = record_of(settings)
    model, tokenizer = load_run(settings.run, trust_remote_code=settings.trust_remote_code, progress=say)
    as_chat, why = _as_chat(asked[0], tokenizer, settings, record)
    notes = [why] if why else []
    drawn = _drawn(asked, model, tokenizer, settings, as_chat, counts)
    encoded = [ids for _, ids in drawn]
    tuned = _answers("tuned", model, tokenizer, encoded, settings)
    base = None
    if settings.with_base and isinstance(model, PeftModel):
        with model.disable_adapter():  # and without virtual tokens, which are the outer model's
            base = _answers("base", model.get_base_model(), tokenizer, encoded, settings)
    elif settings.with_base:
        del model  # two may not fit
        other, missing = base_model_of(record, max(map(max, encoded)), settings)
        notes += [missing] if missing else []
        base = None if other is None else _answers("base", other, tokenizer, encoded, settings)
    return Answered(questions=[item for item, _ in drawn], tuned=tuned, base=base, notes=notes)


def record_of(settings: Settings) -> "RunRecord | None":
    """The record of the run, that of a checkpoint's run included."""
    from tunesmith.model.load import resolve_model, run_folder
    from tunesmith.runs.checkpoints import NAME as CHECKPOINT
    from tunesmith.runs.record import RunRecord

    folder = run_folder(Path(resolve_model(settings.run, say)))
    record = RunRecord.read(folder)
    if record is None and CHECKPOINT.fullmatch(folder.name):
        record = RunRecord.read(folder.parent)
    return record


def _drawn(
    asked: Sequence[Question], model: Any, tokenizer: Any, settings: Settings, as_chat: bool, counts: Counts
) -> list[tuple[Question, list[int]]]:
    """The questions to ask with their tokens, in the order of the data: all that leave the model room to answer, or
    `limit` of them drawn at random."""
    import numpy as np

    from tunesmith.model.generate import room_of

    room, new = room_of(model), settings.max_new_tokens
    order = np.random.default_rng(settings.seed).permutation(len(asked)) if settings.limit else range(len(asked))
    encoded: dict[int, list[int]] = {}
    for i in map(int, order):
        ids = _ids(asked[i], tokenizer, as_chat)
        if room is not None and len(ids) + new > room:
            counts.drop(f"a prompt too long to answer in {new:,} of the model's {room:,} tokens", asked[i].place)
            continue
        encoded[i] = ids
        if len(encoded) == settings.limit:
            break
    if not encoded:
        raise TunesmithError(
            f"every prompt is too long: the model has room for {room:,} tokens, of which max_new_tokens {new:,} are "
            "for the answer; lower --max-new-tokens, or give shorter prompts"
        )
    return [(asked[i], encoded[i]) for i in sorted(encoded)]


def _as_chat(first: Question, tokenizer: Any, settings: Settings, record: "RunRecord | None") -> tuple[bool, str]:
    """Whether prompts that are texts are asked as a user's message, and why, where nobody said so: as the run was
    trained, if that is known."""
    is_text, wanted, templated = isinstance(first.prompt, str), settings.as_chat, tokenizer.chat_template is not None
    if not templated and (wanted or not is_text):
        raise TunesmithError(
            "the model has no chat template, so it can't be asked messages (nor --chat, nor --system); give rows with "
            "'prompt' and 'completion' as text"
        )
    if not is_text:
        if wanted is False:
            raise TunesmithError("--text is for prompts that are texts, and these are messages; leave it out")
        return True, ""
    if wanted is not None or not templated:
        return bool(wanted), ""
    prompts = record.prompts if record is not None else ()
    as_chat = not prompts or not isinstance(prompts[0].prompt, str)
    why = "as in training" if prompts else "no record says how it was in training"
    how, other = ("as a user's message", "--text") if as_chat else ("as they are", "--chat")
    return as_chat, f"prompts that are texts are asked {how} ({why}); {other} does otherwise"


def _ids(question: Question, tokenizer: Any, as_chat: bool) -> list[int]:
    from tunesmith.data.prompts import prompt_ids, text_ids

    try:
        if isinstance(question.prompt, str) and not as_chat:
            return text_ids(tokenizer, question.prompt)
        prompt = question.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return prompt_ids(tokenizer, messages, question.arguments, keep_specials=True)
    except TunesmithError as error:
        raise TunesmithError(f"{question.place}: {error}") from error


def base_model_of(record: "RunRecord | None", largest: int, settings: Settings) -> tuple[Any, str]:
    """The model that a run without adapters started from, or None and why there is none. `largest` is the highest
    token id that it will be asked."""
    from tunesmith.model.load import load_run

    if record is None:
        return None, f"no base model beside it: {settings.run} has no record (run.json) that names one"
    origin = record.base_model
    if origin.kind not in ("hub", "demo"):
        return None, f"no base model beside it: it was the local folder {origin.name}"
    try:
        model, _ = load_run(origin.name, trust_remote_code=settings.trust_remote_code, progress=say)
    except TunesmithError as error:
        return None, f"no base model beside it: {error}"
    embeddings: Any = model.get_input_embeddings()
    if largest >= embeddings.num_embeddings:
        return None, f"no base model beside it: prompts have tokens that the run added to those of {origin.name}"
    return model, ""


def _answers(name: str, model: Any, tokenizer: Any, encoded: list[list[int]], settings: Settings) -> list["Answer"]:
    """The likeliest answers, with a line on stderr that says how many are there."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunesmith.model.generate import ROWS, Sampling, generate_from_ids

    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    shown = (TextColumn("answers, {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=progress_console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(encoded))
        try:
            return generate_from_ids(
                model,
                tokenizer,
                encoded,
                sampling,
                batch_size=settings.batch_size,
                progress=lambda done: progress.update(task, completed=done),
            )
        except torch.OutOfMemoryError as error:
            rows = settings.batch_size or ROWS
            raise TunesmithError(
                f"{rows} answers at a time don't fit in memory; write --batch-size {max(1, rows // 2)}, or a lower "
                "--max-new-tokens"
            ) from error
