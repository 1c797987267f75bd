"""Questions to a run and to its base model, for `tunesmith eval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import note as say
from tunesmith.terminal.output import progress_console

if TYPE_CHECKING:
    from tunesmith.data.tokenize import Counts
    from tunesmith.evaluate.questions import Question
    from tunesmith.model.generate import Answer
    from tunesmith.runs.record import RunRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is asked, and how."""

    run: str
    limit: int | None
    max_new_tokens: int
    batch_size: int
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
class Answered:
    """The questions that were asked and their answers, in one order. `notes` say what was decided or left out."""

    questions: list["Question"]
    tuned: list["Answer"]
    base: list["Answer"] | None
    notes: list[str]


def ask(found: Sequence["Question"], settings: Settings, counts: "Counts") -> Answered:
    """The answers of the run and of its base model. `counts` is told which rows don't fit into the model."""
    from peft import PeftModel

    from tunesmith.model.load import load_run, resolve_model, run_folder

    folder = run_folder(Path(resolve_model(settings.run, say)))
    record = _record(folder)
    model, tokenizer = load_run(settings.run, trust_remote_code=settings.trust_remote_code, progress=say)
    as_chat, why = _as_chat(found[0], tokenizer, settings, record)
    notes = [why] if why else []
    asked = _drawn(found, model, tokenizer, settings, as_chat, counts)
    encoded = [ids for _, ids in asked]
    tuned = _answers("tuned", model, tokenizer, encoded, settings)
    base = None
    if settings.with_base and isinstance(model, PeftModel):
        with model.disable_adapter():  # and without virtual tokens, which are the outer model's
            base = _answers("base", model.get_base_model(), tokenizer, encoded, settings)
    elif settings.with_base:
        del model  # two may not fit
        other, missing = _base_model(record, max(map(max, encoded)), settings)
        notes += [missing] if missing else []
        base = None if other is None else _answers("base", other, tokenizer, encoded, settings)
    return Answered(questions=[item for item, _ in asked], tuned=tuned, base=base, notes=notes)


def _record(folder: Path) -> "RunRecord | None":
    """What is known of the run in `folder`; that of a checkpoint is beside it."""
    from tunesmith.runs.record import RunRecord

    found = RunRecord.read(folder)
    return RunRecord.read(folder.parent) if found is None and folder.name.startswith("checkpoint-") else found


def _drawn(
    found: Sequence["Question"], model: Any, tokenizer: Any, settings: Settings, as_chat: bool, counts: "Counts"
) -> list[tuple["Question", list[int]]]:
    """The questions to ask with their tokens, in the order of the data: all that leave the model room to answer, or
    `limit` of them drawn at random."""
    import numpy as np

    from tunesmith.model.generate import room_of

    room, new = room_of(model), settings.max_new_tokens
    order = np.random.default_rng(settings.seed).permutation(len(found)) if settings.limit else range(len(found))
    kept: dict[int, list[int]] = {}
    for i in map(int, order):
        ids = _ids(found[i], tokenizer, as_chat)
        if room is not None and len(ids) + new > room:
            counts.drop(f"a prompt too long to answer in {new:,} of the model's {room:,} tokens", found[i].place)
            continue
        kept[i] = ids
        if len(kept) == settings.limit:
            break
    if not kept:
        raise TunesmithError(
            f"every prompt is too long: the model has room for {room:,} tokens, of which max_new_tokens {new:,} are "
            "for the answer; lower --max-new-tokens, or give shorter prompts"
        )
    return [(found[i], kept[i]) for i in sorted(kept)]


def _as_chat(first: "Question", tokenizer: Any, settings: Settings, record: "RunRecord | None") -> tuple[bool, str]:
    """Whether prompts that are texts are asked as a user's message, and why, where nobody said so: as the run was
    trained, if that is known."""
    is_text, given, templated = isinstance(first.prompt, str), settings.as_chat, tokenizer.chat_template is not None
    if not templated and (given or not is_text):
        raise TunesmithError(
            "the model has no chat template, so it can't be asked messages (nor --chat, nor --system); give rows with "
            "'prompt' and 'completion' as text"
        )
    if not is_text:
        if given is False:
            raise TunesmithError("--text is for prompts that are texts, and these are messages; leave it out")
        return True, ""
    if given is not None or not templated:
        return bool(given), ""
    prompts = record.prompts if record is not None else ()
    as_chat = not prompts or not isinstance(prompts[0].prompt, str)
    why = "as in training" if prompts else "no record says how it was in training"
    how, other = ("as a user's message", "--text") if as_chat else ("as they are", "--chat")
    return as_chat, f"prompts that are texts are asked {how} ({why}); {other} does otherwise"


def _ids(question: "Question", tokenizer: Any, as_chat: bool) -> list[int]:
    from jinja2 import TemplateError

    from tunesmith.data.sandbox import TooLong
    from tunesmith.model.generate import prompt_ids, text_ids

    try:
        if isinstance(question.prompt, str) and not as_chat:
            return text_ids(tokenizer, question.prompt)
        prompt = question.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return prompt_ids(tokenizer, messages, question.arguments)
    except (TemplateError, TooLong, ValueError, TypeError, OverflowError) as error:
        ours = isinstance(error, TunesmithError)
        raise TunesmithError(
            f"{question.place}: {'' if ours else 'the chat template refuses the prompt: '}{error}"
        ) from error


def _base_model(record: "RunRecord | None", largest: int, settings: Settings) -> tuple[Any, str]:
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
    known = int(embeddings.num_embeddings)
    if largest >= known:
        return None, f"no base model beside it: prompts have tokens that the run added to those of {origin.name}"
    return model, ""


def _answers(name: str, model: Any, tokenizer: Any, encoded: list[list[int]], settings: Settings) -> list["Answer"]:
    """The likeliest answers, with a line on stderr that says how many are there."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunesmith.model.generate import Sampling, generate_from_ids

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
            raise TunesmithError(
                f"{settings.batch_size} answers at a time don't fit in memory; write --batch-size "
                f"{max(1, settings.batch_size // 2)}, or a lower --max-new-tokens"
            ) from error
