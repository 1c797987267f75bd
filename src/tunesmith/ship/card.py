"""The model card: a page that says what the model is, what it learned from, and how to load it."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tunesmith.runs.record import Origin, RunRecord, SourceCount, Text
from tunesmith.ship.card_page import Page, page
from tunesmith.ship.curves import curves
from tunesmith.ship.licence import Licence, licence_of
from tunesmith.ship.markdown import shortened

CARD = "README.md"
PICTURE = "curves.png"
DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
WIDGET_LENGTH = 600
"""Characters of an example; the hub shows them in a small field."""
EVALUATED = re.compile(r"eval_(?:(?P<name>.+)_)?(?P<metric>loss|mean_token_accuracy)")


@dataclass(frozen=True, kw_only=True, slots=True)
class CardOptions:
    """What the run itself doesn't know. `repo` is OWNER/NAME on the hub; `base_model` the hub's name of the base model
    where the run names a folder, or None; `licence` an identifier of the hub's; `samples` says whether prompts and
    answers may be shown."""

    repo: str
    base_model: str | None = None
    licence: str | None = None
    samples: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """What the files of a run's folder say by themselves."""

    adapter: dict[str, Any] | None
    has_tokenizer: bool
    has_template: bool

    @classmethod
    def read(cls, folder: Path) -> "ModelFolder":
        adapter, settings = _json(folder / "adapter_config.json"), _json(folder / "tokenizer_config.json")
        return cls(
            adapter=adapter,
            has_tokenizer=settings is not None,
            has_template=(folder / "chat_template.jinja").is_file() or bool((settings or {}).get("chat_template")),
        )


def model_card(folder: Path, record: RunRecord | None, options: CardOptions) -> dict[str, bytes]:
    """The card of the run in `folder`, and the picture in it, by their names in the repository.

    Without a `record` the card says what the files do. The same run gives the same bytes. Raises TunesmithError for a
    licence that is no identifier.
    """
    model = ModelFolder.read(folder)
    base = base_origin(model, record)
    licence = licence_of(base, (model.adapter or {}).get("base_model_name_or_path"), options.licence)
    base_id = options.base_model or hub_name(base)
    picture = curves(record.history) if record else None
    header = _header(model, record, options, base_id, licence)
    text = page(
        Page(
            repo=options.repo,
            base=base,
            base_id=base_id,
            is_adapter=model.adapter is not None,
            tokenizer=options.repo if model.has_tokenizer else base_id or options.repo,
            is_chat=model.has_template or _asked_by_messages(record),
            licence=licence,
            picture=PICTURE if picture else None,
            results=results(record),
            record=record,
            samples=record.samples if record and options.samples else (),
        )
    )
    card = f"---\n{header.to_yaml()}\n---\n\n{text}"
    return {CARD: card.encode()} | ({PICTURE: picture} if picture else {})


def base_origin(model: ModelFolder, record: RunRecord | None) -> Origin:
    """Where the base model is from, after the adapters themselves, or else the record."""
    named = (model.adapter or {}).get("base_model_name_or_path")
    if isinstance(named, str) and named:
        return Origin.of_model(named)
    return record.base_model if record else Origin(kind="memory", name="an unnamed base model")


def hub_name(base: Origin) -> str | None:
    """The base model's name on the hub, None where only this machine has it."""
    return {"hub": base.name, "demo": DEMO_BASE}.get(base.kind)


def results(record: RunRecord | None) -> list[tuple[SourceCount | str, str, float]]:
    """The last evaluation: the set that was evaluated, or its name where it wasn't counted, the metric ("loss",
    "perplexity" or "accuracy", of tokens) and its value."""
    found: list[tuple[SourceCount | str, str, float]] = []
    if record is None:
        return found
    counted = {count.split: count for count in record.data if count.split != "train"}
    for key, value in record.metrics.items():
        parts = EVALUATED.fullmatch(key)
        if parts is None or value is None:
            continue
        name = parts["name"] or "eval"
        dataset = counted.get(name, name)
        if parts["metric"] == "loss":
            found += [(dataset, "loss", value)] + ([(dataset, "perplexity", math.exp(value))] if value < 50 else [])
        else:
            found.append((dataset, "accuracy", value))
    return found


def _header(
    model: ModelFolder, record: RunRecord | None, options: CardOptions, base_id: str | None, licence: Licence
) -> ModelCardData:
    kind = str((model.adapter or {}).get("peft_type", "")).lower()
    evaluated = _eval_results(record)
    chat = ["conversational"] if model.has_template else []
    data = ModelCardData(
        library_name="peft" if model.adapter is not None else "transformers",
        pipeline_tag="text-generation",
        base_model=base_id,
        license=licence.identifier,
        license_name=licence.name,
        license_link=licence.link,
        tags=["tunesmith", "sft", *([kind] if kind else []), *chat],
        datasets=_datasets(record) or None,
        eval_results=evaluated or None,
        model_name=options.repo.split("/")[-1] if evaluated else None,
    )
    if base_id is not None:
        data["base_model_relation"] = "finetune" if model.adapter is None else "adapter"
    widget = _widget(record) if options.samples else []
    if widget:
        data["widget"] = widget
    return data


def _datasets(record: RunRecord | None) -> list[str]:
    """The hub's names of what was trained on; a file here has none."""
    used = [count.origin for count in record.data if count.split == "train"] if record else []
    return list(dict.fromkeys(origin.name.partition(":")[0] for origin in used if origin.kind == "hub"))


def _eval_results(record: RunRecord | None) -> list[EvalResult]:
    names = {"loss": "Loss", "perplexity": "Perplexity", "accuracy": "Accuracy of tokens"}
    found = []
    for dataset, metric, value in results(record):
        name = dataset if isinstance(dataset, str) else dataset.source
        on_hub = not isinstance(dataset, str) and dataset.origin.kind == "hub"
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset.origin.name.partition(":")[0] if on_hub else _slug(name),  # type: ignore[union-attr]
                dataset_name=name,
                metric_type=metric,
                metric_name=names[metric],
                metric_value=round(value, 6),
            )
        )
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "eval"


def _widget(record: RunRecord | None) -> list[dict[str, Any]]:
    """The first of the samples that is short enough, as the hub's page offers it to visitors."""
    for sample in record.samples if record else ():
        asked = sample.prompt.prompt
        if len(_spoken(asked)) > WIDGET_LENGTH:
            continue
        output = {"text": shortened(sample.after, WIDGET_LENGTH)}
        if isinstance(asked, str):
            return [{"text": asked, "output": output}]
        if all(isinstance(message.get("content"), str) for message in asked):
            messages = [{"role": str(message.get("role")), "content": message["content"]} for message in asked]
            return [{"messages": messages, "output": output}]
    return []


def _spoken(asked: Text) -> str:
    return asked if isinstance(asked, str) else " ".join(str(message.get("content")) for message in asked)


def _asked_by_messages(record: RunRecord | None) -> bool:
    """For adapters that were saved without their tokenizer: whether the base model's has a chat template."""
    asked = [sample.prompt for sample in record.samples] + list(record.prompts) if record else []
    return any(not isinstance(prompt.prompt, str) for prompt in asked)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
