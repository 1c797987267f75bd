"""The model card: a page that says what the model is, what it learned from, and how to load it.

Texts of the data, names and answers are escaped: they are shown as they are, and can't change the page.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tunesmith.data.prompts import form_in
from tunesmith.errors import TunesmithError
from tunesmith.runs.files import loss_name
from tunesmith.runs.record import Origin, RunRecord, Sample, prompt_text, setting_text
from tunesmith.ship.licence import Licence, licence_of
from tunesmith.text import duration, shorten

CARD, PICTURE = "README.md", "curves.png"
DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
WIDGET_LENGTH = 600
"""Characters of an example; the hub shows them in a small field."""
SHOWN_SAMPLES = 5
SHOWN_CHARACTERS = 1500
"""Of a prompt or an answer."""
ANSWER_TOKENS = 128
"""New tokens of an answer, at most."""
MANY_POINTS = 60
"""Up to so many points of a curve, each is marked."""
EVALUATED = re.compile(r"eval_(?:(?P<name>.+?)_)?(?P<metric>loss|mean_token_accuracy|rewards/accuracies|accuracy)")
METRICS = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy of tokens",
    "rewards/accuracies": "accuracy of pairs",
    "accuracy": "accuracy of pairs",
}
SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of writing."""

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
SCORE_CODE = """import torch
from {library} import {auto}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
model = {auto}.from_pretrained("{repo}"{arguments})
"""
CHAT_SCORE = """messages = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
"""
TEXT_SCORE = """inputs = tokenizer("What is 2 + 2? 4" + tokenizer.eos_token, return_tensors="pt")
"""
SCORE = """with torch.no_grad():
    print(float(model(**inputs).logits))  # the higher, the better"""
PIPELINE_CODE = """from transformers import pipeline

generator = pipeline("text-generation", model="{repo}")
"""
CHAT_PIPELINE = """messages = [{"role": "user", "content": "Hello! What can you do?"}]
print(generator(messages, max_new_tokens=200, do_sample=False)[0]["generated_text"][-1]["content"])"""
TEXT_PIPELINE = """print(generator("Once upon a time", max_new_tokens=200, do_sample=False)[0]["generated_text"])"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """What the files of a run's folder say by themselves."""

    adapter: dict[str, Any] | None
    has_tokenizer: bool
    has_template: bool
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Those of the chat template in training."""

    @classmethod
    def read(cls, folder: Path) -> "ModelFolder":
        settings = read_settings(folder / "tokenizer_config.json")
        return cls(
            adapter=read_settings(folder / "adapter_config.json"),
            has_tokenizer=settings is not None,
            has_template=(folder / "chat_template.jinja").is_file() or bool((settings or {}).get("chat_template")),
            template_arguments=form_in(settings or {}).arguments,
        )

    @property
    def base_model(self) -> str | None:
        """The name or folder that the adapters give."""
        name = (self.adapter or {}).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What the card tells. `base_id` is the base model's name on the hub, None if it is only on this machine; `results`
    are those of the last evaluation."""

    repo: str
    model: ModelFolder
    record: RunRecord | None
    base: Origin
    base_id: str | None
    licence: Licence
    picture: bytes | None
    results: "tuple[Result, ...]"
    samples: tuple[Sample, ...]

    @property
    def base_link(self) -> str:
        """The base model in Markdown."""
        return _link(self.base_id, self.base_id) if self.base_id else inline(self.base.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The value of a `metric` ("loss", "perplexity", "accuracy of tokens" or "accuracy of pairs") on a data set, which
    has a name on the hub or None."""

    dataset: str
    hub_name: str | None
    metric: str
    value: float


def model_card(
    folder: Path,
    record: RunRecord | None,
    repo: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    samples: bool = True,
) -> dict[str, bytes]:
    """The card of the run in `folder` for `repo` (OWNER/NAME), and the picture in it, by their names in the repository.

    `base_model` is the hub's name of the base model where the run names a folder, `licence` an identifier of the hub's;
    `samples` says whether prompts and answers may be shown. Without a `record` the card says what the files do. The
    same run gives the same bytes. Raises TunesmithError for a licence that is no identifier.
    """
    model = ModelFolder.read(folder)
    base = base_origin(model, record)
    card = Card(
        repo=repo,
        model=model,
        record=record,
        base=base,
        base_id=base_model or hub_name(base),
        licence=licence_of(base, model.base_model, licence),
        picture=curves(record.history) if record else None,
        results=tuple(_results(record)) if record else (),
        samples=record.samples if record and samples else (),
    )
    text = f"---\n{_header(card).to_yaml()}\n---\n\n{_page(card)}"
    return {CARD: text.encode()} | ({PICTURE: card.picture} if card.picture else {})


def read_settings(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON; None without one, and for a file that is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def base_origin(model: ModelFolder, record: RunRecord | None) -> Origin:
    """Where the base model is from, after the adapters themselves, or else the record."""
    if model.base_model is not None:
        return Origin.of_model(model.base_model)
    return record.base_model if record else Origin(kind="memory", name="an unnamed base model")


def hub_name(base: Origin) -> str | None:
    """The base model's name on the hub, None where only this machine has it."""
    return {"hub": base.name, "demo": DEMO_BASE}.get(base.kind)


def with_samples(record: RunRecord, folder: Path, say: Callable[[str], None]) -> RunRecord:
    """`record` with its prompts answered by the model in `folder` and by its base model.

    A record without prompts, or with samples already, is returned unchanged. So is one whose base model can't be
    loaded; `say` is told why.
    """
    if record.samples or not record.prompts or record.trainer == "reward":  # which writes no answers
        return record
    say(f"Answering {len(record.prompts)} prompts before and after training, for the card ...")
    try:
        return replace(record, samples=_answered(record, folder))
    except TunesmithError as error:
        say(f"note: the card shows no answers: {error}")
        return record


def _answered(record: RunRecord, folder: Path) -> tuple[Sample, ...]:
    from peft import PeftModel  # which takes seconds

    from tunesmith.model.generate import generate
    from tunesmith.model.load import load_run

    model, tokenizer = load_run(str(folder))
    # A model that has learned conversations can't be asked with a plain text.
    prompts = [item for item in record.prompts if not (isinstance(item.prompt, str) and tokenizer.chat_template)]
    chats = [
        [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else list(item.prompt)
        for item in prompts
    ]
    after = generate(model, tokenizer, chats, max_new_tokens=ANSWER_TOKENS)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            before = generate(model, tokenizer, chats, max_new_tokens=ANSWER_TOKENS)
    elif record.base_model.kind in ("hub", "demo"):
        del model
        # The tokenizer of the run gives the same prompt tokens.
        before = generate(load_run(record.base_model.name)[0], tokenizer, chats, max_new_tokens=ANSWER_TOKENS)
    else:
        raise TunesmithError("the base model was a local folder")
    return tuple(Sample(prompt=p, before=b, after=a) for p, b, a in zip(prompts, before, after, strict=True))


# The header, which the hub sorts by


def _header(card: Card) -> ModelCardData:
    kind = str((card.model.adapter or {}).get("peft_type", "")).lower()
    trained_on = [count.origin for count in card.record.data if count.split == "train"] if card.record else []
    data = ModelCardData(
        library_name="transformers" if card.model.adapter is None else "peft",
        pipeline_tag=_task(card),
        base_model=card.base_id,
        license=card.licence.identifier,
        license_name=card.licence.name,
        license_link=card.licence.link,
        tags=[
            "tunesmith",
            _trainer(card),
            *([kind] if kind else []),
            *(["conversational"] if card.model.has_template else []),
        ],
        datasets=list(dict.fromkeys(filter(None, map(_dataset_id, trained_on)))) or None,
        eval_results=[
            EvalResult(
                task_type=_task(card),
                dataset_type=result.hub_name or re.sub(r"[^a-z0-9]+", "-", result.dataset.lower()).strip("-") or "eval",
                dataset_name=result.dataset,
                metric_type=result.metric.split()[0],
                metric_name=result.metric.capitalize(),
                metric_value=round(result.value, 6),
            )
            for result in card.results
        ]
        or None,
        model_name=card.repo.split("/")[-1] if card.results else None,
    )
    if card.base_id is not None:
        data["base_model_relation"] = "finetune" if card.model.adapter is None else "adapter"
    if widget := _widget(card.samples):
        data["widget"] = widget
    return data


def _dataset_id(origin: Origin) -> str | None:
    """The name of the data on the hub; None for a local file."""
    return origin.name.partition(":")[0] if origin.kind == "hub" else None


def _results(record: RunRecord) -> Iterable[Result]:
    counts = {count.split: count for count in record.data if count.split != "train"}
    for key, value in record.metrics.items():
        parts = EVALUATED.fullmatch(key)
        if parts is None or value is None:
            continue
        name = parts["name"] or "eval"
        values = {METRICS[parts["metric"]]: value}
        if parts["metric"] == "loss" and record.trainer == "sft" and value < 50:
            values["perplexity"] = math.exp(value)
        count = counts.get(name)
        dataset, on_hub = (name, None) if count is None else (count.source, _dataset_id(count.origin))
        yield from (Result(dataset=dataset, hub_name=on_hub, metric=m, value=v) for m, v in values.items())


def _widget(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """The first sample that is short enough, as the hub's page offers it to visitors."""
    for sample in samples:
        prompt, output = sample.prompt.prompt, {"text": shorten(sample.after, WIDGET_LENGTH)}
        if len(prompt_text(prompt)) > WIDGET_LENGTH:
            continue
        if isinstance(prompt, str):
            return [{"text": prompt, "output": output}]
        if all(isinstance(message.get("content"), str) for message in prompt):
            messages = [{"role": str(message.get("role")), "content": message["content"]} for message in prompt]
            return [{"messages": messages, "output": output}]
    return []


# The page


def _page(card: Card) -> str:
    parts = [
        f"# {inline(card.repo.split('/')[-1])}",
        _summary(card),
        "## Use",
        block(_snippet(card), "python"),
        *_results_section(card),
        *_samples_section(card),
        *(_data_section(card, card.record) if card.record and card.record.data else []),
        *(_training_section(card, card.record) if card.record else []),
        "## Licence",
        _licence(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(card: Card) -> str:
    if card.model.adapter is not None:
        model = f"Adapters for {card.base_link}"
    elif card.record and card.record.method.kind != "full":
        model = f"{card.base_link} with adapters merged into its weights"
    else:
        model = f"{card.base_link} with all of its weights tuned"
    note = ""
    if card.base.kind == "demo":
        note = (
            "\n\nThe base model was trained from its 4-bit (Q4_1) form, unpacked to float32. On the original weights, "
            "which the name above stands for, answers may differ a little."
        )
    if card.model.template_arguments:
        given = ", ".join(f"`{name}={value!r}`" for name, value in card.model.template_arguments.items())
        note += f"\n\nIts conversations were rendered with {given} for the chat template: ask it so, too."
    ways = {
        "sft": "supervised fine-tuning",
        "dpo": "preference optimization (DPO) on pairs of answers",
        "kto": "preference optimization (KTO) on answers that are good or bad",
        "distill": "distillation",
        "reward": "reward modelling on pairs of answers",
        "grpo": "group relative policy optimization (GRPO) on rewards of its own answers",
        "rloo": "REINFORCE leave-one-out (RLOO) on rewards of its own answers",
    }
    if _trainer(card) == "reward":
        note = (
            " It is a sequence classifier: it gives a whole text, a prompt with its answer, one score, higher for "
            f"better answers.{note}"
        )
    return f"{model}, by {ways[_trainer(card)]} with tunesmith.{note}"


def _trainer(card: Card) -> str:
    if card.record is None and (card.model.adapter or {}).get("task_type") == "SEQ_CLS":
        return "reward"
    return card.record.trainer if card.record else "sft"


def _task(card: Card) -> str:
    """What the model is for, by the hub's name."""
    return "text-classification" if _trainer(card) == "reward" else "text-generation"


def _snippet(card: Card) -> str:
    """Python that loads the model by its name on the hub, and lets it answer."""
    record = card.record
    # Adapters may be saved without a tokenizer; then prompts of messages tell that the base model has a template.
    prompts = [*(sample.prompt for sample in record.samples), *record.prompts] if record else []
    is_chat = card.model.has_template or any(not isinstance(prompt.prompt, str) for prompt in prompts)
    if _trainer(card) == "reward":
        return _score_snippet(card, is_chat=is_chat)
    if card.model.adapter is None:
        return PIPELINE_CODE.format(repo=card.repo) + (CHAT_PIPELINE if is_chat else TEXT_PIPELINE)
    tokenizer = card.repo if card.model.has_tokenizer else card.base_id or card.repo
    load = ADAPTER_CODE.format(tokenizer=tokenizer, repo=card.repo)
    answer = CHAT_ANSWER if is_chat else TEXT_ANSWER
    for name, value in card.model.template_arguments.items():
        answer = answer.replace('return_tensors="pt")', f'return_tensors="pt", {name}={value!r})')
    return load + answer + GENERATE


def _score_snippet(card: Card, *, is_chat: bool) -> str:
    """Python that loads the model by its name on the hub, and scores an answer."""
    whole = card.model.adapter is None
    load = SCORE_CODE.format(
        library="transformers" if whole else "peft",
        auto="AutoModelForSequenceClassification" if whole else "AutoPeftModelForSequenceClassification",
        tokenizer=card.repo if card.model.has_tokenizer else card.base_id or card.repo,
        repo=card.repo,
        arguments="" if whole else ", num_labels=1",
    )
    return load + (CHAT_SCORE if is_chat else TEXT_SCORE) + SCORE


def _results_section(card: Card) -> list[str]:
    parts = []
    if card.results:
        rows = [[inline(result.dataset), result.metric, f"{result.value:.4f}"] for result in card.results]
        parts.append(table(["evaluated on", "metric", "value"], rows))
        trainer = _trainer(card)
        what = {"dpo": "pairs", "kto": "answers", "reward": "pairs"}.get(trainer, "supervised tokens")
        how = "whose answers are scored as whole texts" if trainer == "reward" else None
        if trainer in ("grpo", "rloo"):
            parts.append("All are over answers that the model drew to the prompts of the set.")
        else:
            parts.append(f"All are over the {what} of the set, {how or 'each predicted from the true text before it'}.")
    if card.picture:
        parts.append(f"![The loss over the steps of training.]({PICTURE})")
    return ["## Results", *parts] if parts else []


def _samples_section(card: Card) -> list[str]:
    parts = ["## Before and after"]
    for sample in card.samples[:SHOWN_SAMPLES]:
        texts = {"Prompt": prompt_text(sample.prompt.prompt), "Before": sample.before, "After": sample.after}
        if sample.prompt.expected is not None:
            texts["In the data"] = sample.prompt.expected
        for title, text in texts.items():
            parts += [f"**{title}**", block(shorten(text, SHOWN_CHARACTERS))]
        parts.append("---")
    return parts[:-1]  # without a rule at the end, or without any sample nothing


def _data_section(card: Card, record: RunRecord) -> list[str]:
    rows = []
    for count in record.data:
        name, on_hub = count.origin.name, _dataset_id(count.origin)
        origin = inline(name) if on_hub is None else _link(name, f"datasets/{on_hub}")
        numbers = (count.examples, count.tokens, count.supervised_tokens, count.dropped)
        rows.append([inline(count.split), inline(count.source), origin, *(f"{number:,}" for number in numbers)])
    head = ["split", "source", "from", "examples", "tokens", "supervised tokens", "rows dropped"]
    learned = "Only supervised tokens were learned; the others were read as their context."
    if _trainer(card) == "reward":
        learned = "An example is a pair of answers; what is called supervised is where each of them is scored."
    return ["## Data", table(head, rows), learned]


def _training_section(card: Card, record: RunRecord) -> list[str]:
    facts = {
        "method": inline(str(record.method)),
        "trained parameters": record.trained_share,
        "base model": card.base_link + (f" at {inline(record.base_revision)}" if record.base_revision else ""),
        "duration": duration(record.seconds) if record.seconds is not None else "",
        "device": inline(record.device),
    }
    rows = [[name, value] for name, value in facts.items() if value]
    rows += [[inline(name), inline(setting_text(value))] for name, value in record.settings.items()]
    versions = ", ".join(f"{inline(name)} {inline(number)}" for name, number in record.versions.items())
    return ["## Training", table(["", ""], rows), f"Versions: {versions}." if versions else ""]


def _licence(card: Card) -> str:
    licence = card.licence
    if licence.identifier is None:
        return (
            f"Not stated. A tuned model is bound by the licence of {card.base_link}, and by those of its data: "
            "look them up before you use or pass on this one."
        )
    name = f" ({inline(licence.name)})" if licence.name else ""
    return f"{inline(licence.identifier)}{name}, {licence.source}."


# Markdown


def inline(text: str) -> str:
    """`text` for a line, a heading or a cell."""
    return SPECIAL.sub(r"\\\1", " ".join(CONTROL.sub(" ", text).split()))


def block(text: str, language: str = "text") -> str:
    """`text` in a fenced block, whose fence is longer than any run of backticks in it."""
    text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells are Markdown already. All columns but the first that hold numbers only are aligned right."""
    numbers = [bool(rows) and all(re.fullmatch(r"[\d.,%]*", row[i]) for row in rows) for i in range(len(head))]
    rules = ["---:" if number and i else "---" for i, number in enumerate(numbers)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rules, *rows])


def _link(text: str, path: str) -> str:
    return f"[{inline(text)}](https://huggingface.co/{path})"


# The picture


def curves(history: Iterable[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the training loss, and of every evaluation's, over the steps; None where fewer than two were logged.

    `history` is the trainer's `state.log_history`. The same history gives the same bytes.
    """
    by_name: dict[str, dict[float, float]] = {"training": {}}  # the last value of a step counts
    for entry in history:
        step = entry.get("step")
        for key, value in entry.items():
            if (name := loss_name(key)) and isinstance(step, int | float) and isinstance(value, int | float):
                by_name.setdefault(name, {})[step] = value
    lines = {name: sorted(points.items()) for name, points in by_name.items() if points}
    if max((len(points) for points in lines.values()), default=0) < 2:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        mark = "o" if len(points) <= MANY_POINTS else None
        label = name.replace("$", r"\$").lstrip("_")  # which matplotlib reads as mathematics, or as "no label"
        axes.plot(*zip(*points, strict=True), marker=mark, markersize=3, linewidth=1.5, label=label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
