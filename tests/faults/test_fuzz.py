"""Whatever is given as rows, files, recipes or chat templates: a result, or a TunesmithError, and never anything else.

Quick by default, and the same each time. `TUNESMITH_FAULTS=long` tries some thousand inputs, other ones each time, and
writes how many of each kind to `build/fuzz.json`.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.faults.inputs import ATOMS, COLUMNS, ROWS, VALID, VALUES, mutated, templates, texts
from tunesmith import SFTConfig, TunesmithError
from tunesmith.data.formats import FormatOptions
from tunesmith.data.preflight import examine
from tunesmith.data.prepare import Preparation, prepare
from tunesmith.data.read import read_rows, with_places
from tunesmith.data.tokenize import EncodeOptions
from tunesmith.settings.coerce import members_of
from tunesmith.settings.recipe import all_settings, resolve
from tunesmith.types import IGNORE_INDEX

LONG = os.environ.get("TUNESMITH_FAULTS") == "long"
BUILD = Path(__file__).resolve().parents[2] / "build"
TRIED: Counter[str] = Counter()
"""Inputs by kind, and what became of them."""

# What must hold


def tried(kind: str, step: Callable[[], Any]) -> Any:
    """What `step` returns, None where it raises TunesmithError with a message; counts it."""
    result, said = None, "taken"
    try:
        result = step()
    except TunesmithError as error:
        said = str(error).strip()
    assert said
    TRIED[f"{kind}: {'taken' if said == 'taken' else 'refused'}"] += 1
    return result


def fuzz(quick: int, long: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=long if LONG else quick,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    if LONG:
        BUILD.mkdir(exist_ok=True)
        found = {"inputs": TRIED.total(), "by kind": dict(sorted(TRIED.items()))}
        (BUILD / "fuzz.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


OPTIONS = st.builds(
    EncodeOptions,
    train_on=st.sampled_from([None, None, "all", "completion", "assistant", "last_assistant"]),
    max_length=st.sampled_from([None, 2, 5, 1024]),
    overlong=st.sampled_from(["truncate", "drop", "split", "error"]),
    truncate_prompt=st.booleans(),
    skip_bad=st.booleans(),
)


def examples_of(source: Any, tokenizer: Any, options: EncodeOptions) -> Any:
    """`source` prepared as training would. Raises AssertionError where labels are not what they must be."""
    preparation = Preparation(tokenizer=tokenizer, encode=options, formats=FormatOptions(skip_bad=options.skip_bad))
    dataset, prepared = prepare(with_places(source), preparation)
    assert len(dataset) == prepared.counts.examples > 0
    assert examine(dataset, prepared.counts, None).longest <= (options.max_length or 10**9)
    for row in dataset:
        assert len(row["input_ids"]) == len(row["labels"])
        assert any(label != IGNORE_INDEX for label in row["labels"][1:])
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (IGNORE_INDEX, token)
        assert all(weight >= 0 for weight in row.get("weights") or ())
    return dataset


# Rows and files


@fuzz(80, 1200)
@given(rows=ROWS, options=OPTIONS)
def test_rows(rows: list[Any], options: EncodeOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    tried("rows", lambda: examples_of(rows, tokenizer, options))


def _bytes_of(rows: list[Any], suffix: str) -> bytes:
    """Rows as a file of this kind has them, as far as it can."""
    if suffix == ".csv":
        out = io.StringIO()
        csv.writer(out).writerows([list(rows[0]), *(map(str, row.values()) for row in rows)])
        return out.getvalue().encode("utf-8", "surrogatepass")
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([{"text": repr(row)} for row in rows]), sink)
        return sink.getvalue()
    lines = "\n".join(json.dumps(row, default=str) for row in rows)
    return (f"[{lines}]" if suffix == ".json" else lines).encode()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's suffix and its bytes: any, or those of rows that were damaged."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]))
    if draw(st.integers(0, 3)) == 0:
        return suffix, draw(st.binary(max_size=60))
    content = _bytes_of(
        draw(
            st.lists(
                st.sampled_from(VALID)
                | mutated(st.sampled_from(VALID), COLUMNS).filter(lambda row: isinstance(row, dict) and row),
                min_size=1,
                max_size=3,
            )
        ),
        draw(st.just(suffix) | st.sampled_from([".jsonl", ".json", ".csv"])),
    )
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        piece = draw(
            st.sampled_from([b"", b"\0", b"\xff", b'"', b"\n", b"{", b"[", b",", b"\xef\xbb\xbf", b"NaN", b"\x1f\x8b"])
        )
        content = content[:at] + piece + content[at + draw(st.integers(0, 5)) :]
    return suffix, draw(
        st.sampled_from([content, content, content[: len(content) // 2], content.decode("latin-1").encode("utf-16")])
    )


@fuzz(80, 1500)
@given(file=files(), options=OPTIONS)
def test_files(
    file: tuple[str, bytes],
    options: EncodeOptions,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rows{file[0]}"
    path.write_bytes(file[1])
    tried(f"file{file[0]}", lambda: examples_of(read_rows(str(path)), tokenizer, options))


# Recipes

SETTINGS = sorted(all_settings().keys())
RECIPES: list[dict[str, Any]] = [
    {"model": "demo", "data": "rows.jsonl", "output": "runs/a", "lora": True, "learning_rate": "2e-5"},
    {
        "model": "demo",
        "data": ["a.jsonl", "b.csv"],
        "output": "runs/a",
        "lora": {"r": 8},
        "packing": True,
        "max_length": 64,
    },
    {
        "model": "demo",
        "data": {"a": {"path": "a.jsonl", "weight": 2, "held_out": 0.1, "columns": {"text": "t"}}, "b": "b.jsonl"},
        "output": "runs/a",
        "warmup_ratio": 0.1,
        "columns": {"prompt": "question"},
        "on_bad_row": "skip",
    },
]


def recipe_of(text: bytes, folder: Path, **given: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    recipe = resolve(str(path), given | {"use_cpu": True, "precision": "fp32"})
    assert yaml.safe_load(recipe.to_yaml())["model"] == recipe.model
    return recipe


@fuzz(40, 1000)
@given(
    text=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text("[]{}:,-&*!|>'\"%@#\n a1~?<", max_size=40).map(str.encode)
)
def test_recipes_of_any_text(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, given_too = tmp_path_factory.getbasetemp(), {"model": "demo", "data": "a.jsonl", "output_dir": "runs/a"}
    tried("recipe of any text", lambda: recipe_of(text, folder, **given_too))


@fuzz(40, 800)
@given(recipe=mutated(st.sampled_from(RECIPES), st.sampled_from(SETTINGS) | texts()))
def test_recipes_that_were_changed(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = yaml.dump(recipe).encode("utf-8", "surrogatepass")
    tried("recipe that was changed", lambda: recipe_of(text, tmp_path_factory.getbasetemp()))


ODD = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1e9",
        "nan",
        "inf",
        "no",
        "null",
        "{}",
        "[]",
        "{a: 1}",
        "[1, 2]",
        "x",
        "true",
        "1.5",
        "é",
        "{",
        "0x1",
    ]
)


def _value_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a setting of this type may have, at its edges; the checks behind the type are to see them."""
    found: list[st.SearchStrategy[Any]] = [ODD]
    for member in members_of(kind):
        origin = get_origin(member) or member
        if origin is Literal:
            found.append(st.sampled_from(get_args(member)))
        elif isinstance(origin, type) and issubclass(origin, Enum):
            found.append(st.sampled_from([item.value for item in origin]))
        elif origin in EDGES:
            found.append(EDGES[origin])
    return st.one_of(found)


EDGES: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.sampled_from([0, 1, 2, -1, 64, 2**31, 2**63, 10**400]),
    float: st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0, 1e-300, 1e300, float("nan"), float("inf")]),
    dict: st.dictionaries(st.sampled_from(["a", "prompt", "mode", "skip_prepare_dataset", ""]), ATOMS, max_size=2),
    list: st.lists(ATOMS, max_size=2),
    str: texts(),
}
# What these ask for is outside of this process.
ELSEWHERE = {"deepspeed", "fsdp", "fsdp_config", "output", "push_to_hub", "parallelism_config"}


@st.composite
def changed_settings(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted({*SETTINGS} - ELSEWHERE)), min_size=1, max_size=2, unique=True))
    return {name: draw(_value_of(all_settings()[name].kind) | VALUES) for name in names}


@fuzz(60, 2500)
@given(changes=changed_settings())
def test_settings_of_odd_values(changes: dict[str, Any]) -> None:
    base = {"model": "demo", "data": "rows.jsonl", "output_dir": "runs/a", "use_cpu": True, "precision": "fp32"}
    tried("settings", lambda: resolve(None, base | changes).to_yaml())


# Chat templates


@fuzz(40, 1000)
@given(template=templates(), options=OPTIONS)
def test_chat_templates(
    template: str, options: EncodeOptions, tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        tried("chat template", lambda: examples_of([VALID[0], VALID[1]], tokenizer, options))
    finally:
        tokenizer.chat_template = before


def test_every_field_is_tried() -> None:
    assert {item.name for item in fields(SFTConfig) if item.init} <= {*SETTINGS}
