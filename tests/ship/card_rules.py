"""What the hub checks in the header of a model card, for machines that can't ask it.

After the documentation of the hub: https://huggingface.co/docs/hub/model-cards
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

HEADER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
"""The hub's own expression, as `huggingface_hub.repocard` has it."""
LICENCES = {
    *("apache-2.0", "mit", "openrail", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("gemma", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "odbl", "unlicense", "wtfpl", "zlib"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "unknown", "other"),
}
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LIBRARIES = {"transformers", "peft"}
KNOWN = {
    *("language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "tags", "datasets"),
    *("metrics", "base_model", "base_model_relation", "new_version", "model-index", "widget", "inference"),
}


def header_of(card: str) -> dict[str, Any]:
    """The YAML of a card. Raises ValueError where there is none."""
    found = HEADER.search(card)
    values = yaml.safe_load(found[2]) if found else None
    if not isinstance(values, dict):
        raise ValueError("empty or missing yaml metadata in repo card")
    return values


def faults(card: str) -> list[str]:
    """What the hub would refuse in the header of `card`; nothing when it is valid."""
    try:
        return list(_faults(header_of(card)))
    except (ValueError, yaml.YAMLError) as error:
        return [str(error)]


def _faults(header: dict[str, Any]) -> Iterator[str]:
    yield from (f'"{name}" is not allowed' for name in header.keys() - KNOWN)
    choices = {"license": LICENCES, "base_model_relation": RELATIONS, "library_name": LIBRARIES}
    for name, allowed in choices.items():
        if name in header and header[name] not in allowed:
            yield f'"{name}" must be one of {sorted(allowed)}'
    if header.get("pipeline_tag") not in ("text-generation", "text-classification"):
        yield '"pipeline_tag" must be text-generation, or text-classification of reward models'
    if "base_model_relation" in header and "base_model" not in header:
        yield '"base_model_relation" needs "base_model"'
    for name in ("base_model", "datasets"):
        listed = header.get(name, [])
        for value in listed if isinstance(listed, list) else [listed]:
            if not isinstance(value, str) or not REPO.fullmatch(value):
                yield f'"{name}" {value!r} with no repo id'
    for tag in header.get("tags", []):
        if not isinstance(tag, str) or not 0 < len(tag) <= 100:
            yield f'"tags" must be strings, found {tag!r}'
    for i, entry in enumerate(header.get("model-index", [])):
        yield from (f'"model-index[{i}]{fault}' for fault in _index_faults(entry))
    for i, example in enumerate(header.get("widget", [])):
        yield from (f'"widget[{i}]{fault}' for fault in _widget_faults(example))


def _index_faults(entry: Any) -> Iterator[str]:
    if not isinstance(entry.get("name"), str):
        yield '.name" is required'
    for i, result in enumerate(entry["results"]):
        for name in ("task", "dataset"):
            if not isinstance(result.get(name, {}).get("type"), str):
                yield f'.results[{i}].{name}.type" is required'
        if not isinstance(result["dataset"].get("name"), str):
            yield f'.results[{i}].dataset.name" is required'
        if not result.get("metrics"):
            yield f'.results[{i}].metrics" is required'
        for metric in result.get("metrics", []):
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
                yield f'.results[{i}].metrics" need a type and a number, found {metric}'


def _widget_faults(example: Any) -> Iterator[str]:
    if not isinstance(example, dict) or not ({"text", "messages"} & example.keys()):
        yield '" needs text or messages'
        return
    for message in example.get("messages", []):
        if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
            yield f'.messages" must have role and content, found {message}'
    if "output" in example and not isinstance(example["output"].get("text"), str):
        yield '.output.text" must be a string'
