"""The text of a model card, below its header."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.runs.record import adapters_of
from tunesmith.ship.markdown import block, inline, shortened, table

if TYPE_CHECKING:
    from tunesmith.runs.record import Method, Origin, RunRecord, Sample, SourceCount, Text
    from tunesmith.ship.licence import Licence

SHOWN_SAMPLES = 5
SHOWN_CHARACTERS = 1500
"""Of a prompt or an answer."""

ADAPTER_CODE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
model = AutoPeftModelForCausalLM.from_pretrained("{repo}")
"""
CHAT_ANSWER = """messages = [{"role": "user", "content": "Hello! What can you do?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
TEXT_ANSWER = """inputs = tokenizer("Once upon a time", return_tensors="pt")
"""
GENERATE = """output = model.generate(**inputs.to(model.device), max_new_tokens=200, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
PIPELINE_CODE = """from transformers import pipeline

generator = pipeline("text-generation", model="{repo}")
"""
CHAT_PIPELINE = """messages = [{"role": "user", "content": "Hello! What can you do?"}]
print(generator(messages, max_new_tokens=200, do_sample=False)[0]["generated_text"][-1]["content"])"""
TEXT_PIPELINE = """print(generator("Once upon a time", max_new_tokens=200, do_sample=False)[0]["generated_text"])"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What the page tells. `base_id` is the base model on the hub, None where it is nowhere but here; `tokenizer` where
    the tokenizer is loaded from; `results` as `tunesmith.ship.card.results` gives them."""

    repo: str
    base: "Origin"
    base_id: str | None
    is_adapter: bool
    tokenizer: str
    is_chat: bool
    licence: "Licence"
    picture: str | None
    results: "list[tuple[SourceCount | str, str, float]]"
    record: "RunRecord | None"
    samples: "tuple[Sample, ...]"


def page(content: Page) -> str:
    """Markdown in which every text that is not ours is shown as it is."""
    parts = [
        f"# {inline(content.repo.split('/')[-1])}",
        _summary(content),
        "## Use",
        block(snippet(content), "python"),
        *_results(content),
        *_samples(content),
        *_data(content),
        *_training(content),
        "## Licence",
        _licence(content),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def snippet(content: Page) -> str:
    """Python that loads the model by its name on the hub, and lets it answer."""
    if content.is_adapter:
        load = ADAPTER_CODE.format(tokenizer=content.tokenizer, repo=content.repo)
        return load + (CHAT_ANSWER if content.is_chat else TEXT_ANSWER) + GENERATE
    load = PIPELINE_CODE.format(repo=content.repo)
    return load + (CHAT_PIPELINE if content.is_chat else TEXT_PIPELINE)


def _summary(content: Page) -> str:
    base = _base(content)
    made = f"Adapters for {base}" if content.is_adapter else f"{base} with all of its weights tuned"
    if content.record and not content.is_adapter and content.record.method.kind != "full":
        made = f"{base} with adapters merged into its weights"
    note = ""
    if content.base.kind == "demo":
        note = (
            "\n\nThe base model was trained from its 4-bit (Q4_1) form, unpacked to float32. On the original weights, "
            "which the name above stands for, answers may differ a little."
        )
    return f"{made}, by supervised fine-tuning with tunesmith.{note}"


def _base(content: Page) -> str:
    if content.base_id:
        return f"[{inline(content.base_id)}](https://huggingface.co/{content.base_id})"
    return inline(content.base.name)


def _results(content: Page) -> list[str]:
    rows = [
        [inline(dataset if isinstance(dataset, str) else dataset.source), _METRICS[metric], f"{value:.4f}"]
        for dataset, metric, value in content.results
    ]
    parts = []
    if rows:
        parts.append(table(["evaluated on", "metric", "value"], rows))
        parts.append("All are over the supervised tokens of the set, each predicted from the true text before it.")
    if content.picture:
        parts.append(f"![The loss over the steps of training.]({content.picture})")
    return ["## Results", *parts] if parts else []


_METRICS = {"loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy of tokens"}


def _samples(content: Page) -> list[str]:
    if not content.samples:
        return []
    parts = ["## Before and after"]
    for sample in content.samples[:SHOWN_SAMPLES]:
        parts += ["**Prompt**", _block(spoken(sample.prompt.prompt))]
        parts += ["**Before**", _block(sample.before), "**After**", _block(sample.after)]
        if sample.prompt.expected is not None:
            parts += ["**In the data**", _block(sample.prompt.expected)]
        parts.append("---")
    return parts[:-1]


def spoken(asked: "Text") -> str:
    """A prompt as text: a text as it is, messages with their roles, but a lone user's without."""
    if isinstance(asked, str):
        return asked
    if len(asked) == 1 and asked[0].get("role") == "user":
        return _content(asked[0])
    return "\n\n".join(f"{message.get('role')}: {_content(message)}" for message in asked)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)


def _block(text: str) -> str:
    return block(shortened(text, SHOWN_CHARACTERS))


def _data(content: Page) -> list[str]:
    data = content.record.data if content.record else ()
    if not data:
        return []
    rows = [
        [
            inline(count.split),
            inline(count.source),
            _origin(count.origin),
            *(f"{n:,}" for n in (count.examples, count.tokens, count.supervised_tokens, count.dropped)),
        ]
        for count in data
    ]
    head = ["split", "source", "from", "examples", "tokens", "supervised tokens", "rows dropped"]
    return ["## Data", table(head, rows), "Only supervised tokens were learned; the others were read as their context."]


def _origin(origin: "Origin") -> str:
    if origin.kind == "hub":
        name = origin.name.partition(":")[0]
        return f"[{inline(origin.name)}](https://huggingface.co/datasets/{name})"
    return inline(origin.name)


def _training(content: Page) -> list[str]:
    record = content.record
    if record is None:
        return []
    share = record.trainable_parameters / max(1, record.total_parameters)
    facts = {
        "method": _method(record.method),
        "trained parameters": f"{record.trainable_parameters:,} of {record.total_parameters:,} ({share:.2%})",
        "base model": _base(content) + (f" at {inline(record.base_revision)}" if record.base_revision else ""),
        "duration": _duration(record.seconds) if record.seconds is not None else "",
        "device": inline(record.device),
    }
    rows = [[name, value] for name, value in facts.items() if value]
    rows += [[inline(name), inline(_setting(value))] for name, value in record.settings.items()]
    versions = ", ".join(f"{inline(name)} {inline(number)}" for name, number in record.versions.items())
    return ["## Training", table(["", ""], rows), f"Versions: {versions}." if versions else ""]


def _method(method: "Method") -> str:
    parts = ["full fine-tuning" if method.kind == "full" else adapters_of(method.kind)]
    parts += [f"rank {method.rank}"] if method.rank is not None else []
    parts += [f"alpha {method.alpha:g}"] if method.alpha is not None else []
    parts += [f"dropout {method.dropout:g}"] if method.dropout else []
    parts += [f"on {inline(', '.join(method.targets))}"] if method.targets else []
    parts += [f"over a base model in {method.bits} bits"] if method.bits else []
    return ", ".join(parts)


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "under 1 s"


def _licence(content: Page) -> str:
    licence, base = content.licence, _base(content)
    if licence.identifier is None:
        return (
            f"Not stated. A tuned model is bound by the licence of {base}, and by those of its data: "
            "look them up before you use or pass on this one."
        )
    named = f" ({inline(licence.name)})" if licence.name else ""
    return f"{inline(licence.identifier)}{named}, {licence.source}."
