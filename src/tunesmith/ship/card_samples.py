"""Answers before and after training, for the card: asked when a run is pushed, if nobody asked before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from tunesmith.errors import TunesmithError
from tunesmith.model.generate import Messages, generate
from tunesmith.model.load import load_run
from tunesmith.runs.record import Prompt, RunRecord, Sample

LONGEST = 128
"""New tokens of an answer."""


def with_samples(record: RunRecord, folder: Path, say: Callable[[str], None]) -> RunRecord:
    """`record` with its prompts answered by the model in `folder` and by its base model. Without prompts, with samples
    already, or where the base model can't be loaded, as it is; `say` is told why."""
    if record.samples or not record.prompts:
        return record
    say(f"Answering {len(record.prompts)} prompts before and after training, for the card ...")
    try:
        return replace(record, samples=_samples(record, folder))
    except TunesmithError as error:
        say(f"note: the card shows no answers: {error}")
        return record


def _samples(record: RunRecord, folder: Path) -> tuple[Sample, ...]:
    model, tokenizer = load_run(str(folder))
    # A text is no question to who has learned conversations.
    prompts = [item for item in record.prompts if not (isinstance(item.prompt, str) and tokenizer.chat_template)]
    asked = [_messages(item) for item in prompts]
    after = generate(model, tokenizer, asked, max_new_tokens=LONGEST)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            before = generate(model, tokenizer, asked, max_new_tokens=LONGEST)
    elif record.base_model.kind in ("hub", "demo"):
        del model
        # With the tokenizer of the run: the same tokens are asked.
        before = generate(load_run(record.base_model.name)[0], tokenizer, asked, max_new_tokens=LONGEST)
    else:
        raise TunesmithError("the base model was a local folder")
    return tuple(
        Sample(prompt=prompt, before=first, after=second)
        for prompt, first, second in zip(prompts, before, after, strict=True)
    )


def _messages(item: Prompt) -> Messages:
    return [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else list(item.prompt)
