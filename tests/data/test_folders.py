"""Folders and patterns: which files they mean, by split."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from tunesmith.data.prepare import identity
from tunesmith.data.read import read_rows
from tunesmith.errors import TunesmithError


def write(folder: Path, **files: str) -> Path:
    """Files with a row each that says which it is; `__` in a name stands for a folder."""
    for name, suffix in files.items():
        file = folder / (name.replace("__", "/") + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) + "\n")
    return folder


def texts(source: str | Path, split: str | None = None, **options: Any) -> list[str]:
    return [row["text"] for _, row in read_rows(str(source), split, **options)]


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, b=".jsonl", a=".json", c__d=".csv", e=".md", LICENSE=".txt", config=".json", **{".hidden": ".json"})
    rows = read_rows(str(tmp_path))
    assert [(place, row["text"]) for place, row in rows] == [
        (f"{tmp_path}/a.json, line 1", "a"),
        (f"{tmp_path}/b.jsonl, line 1", "b"),
        (f"{tmp_path}/c/d.csv, line 1", "c__d"),
    ]
    assert texts(f"{tmp_path}/") == texts(tmp_path, default_split="test") == ["a", "b", "c__d"]
    with pytest.raises(TunesmithError, match=r"split is 'test', but .* has no splits; drop it"):
        texts(tmp_path, "test")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train", "test"], {"train": ["train"], "test": ["test"]}),
        (["my-train_1", "my-train_2", "dev"], {"train": ["my-train_1", "my-train_2"], "validation": ["dev"]}),
        (["training__a", "eval__a"], {"train": ["training__a"], "test": ["eval__a"]}),
        (
            ["data__train_sft-00000-of-00002", "data__train_sft-00001-of-00002", "data__test-00000-of-00001"],
            {
                "train_sft": ["data__train_sft-00000-of-00002", "data__train_sft-00001-of-00002"],
                "test": ["data__test-00000-of-00001"],
            },
        ),
        (["latest", "contest"], {None: ["contest", "latest"]}),
        (["c4-00000-of-00002", "c4-00001-of-00002"], {None: ["c4-00000-of-00002", "c4-00001-of-00002"]}),
    ],
)
def test_splits_are_told_by_the_names_of_files_and_folders(
    tmp_path: Path, files: list[str], splits: dict[str | None, list[str]]
) -> None:
    write(tmp_path / "train-data", **dict.fromkeys(files, ".jsonl"))
    assert {split: texts(tmp_path / "train-data", split) for split in splits} == splits


def test_a_missing_split_comes_with_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, train=".jsonl", validation=".jsonl")
    assert texts(tmp_path) == ["train"]
    with pytest.raises(TunesmithError) as caught:
        texts(tmp_path, default_split="test")
    assert str(caught.value) == (
        f"{tmp_path} has no split 'test'; it has 'train', 'validation'. "
        "Choose one: `split: train`, of eval_data `eval_split: train`"
    )
    write(tmp_path, more=".jsonl")
    with pytest.raises(TunesmithError, match=r"holds more\.jsonl, whose name tells no split, beside train\.jsonl"):
        texts(tmp_path)


def test_a_pattern_means_all_files_that_match_it(tmp_path: Path) -> None:
    write(tmp_path, train_1=".jsonl", train_2=".jsonl", test=".jsonl", sub__train_3=".jsonl")
    assert texts(f"{tmp_path}/train_*.jsonl") == ["train_1", "train_2"]
    assert texts(f"{tmp_path}/**/train_[23].jsonl") == ["sub__train_3", "train_2"]
    with pytest.raises(TunesmithError, match=r"no file matches .*/nothing\*"):
        texts(f"{tmp_path}/nothing*")
    (tmp_path / "odd[1].jsonl").write_text('{"text": "odd"}')
    assert texts(tmp_path / "odd[1].jsonl") == ["odd"]


def test_what_save_to_disk_wrote_is_read_with_its_splits(tmp_path: Path) -> None:
    train, test = Dataset.from_dict({"text": ["a", "b", "c"]}), Dataset.from_dict({"text": ["d"]})
    train.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(tmp_path / "one") == texts(tmp_path / "one", default_split="test") == ["a", "b", "c"]
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert [texts(tmp_path / "both", split) for split in (None, "test")] == [["a", "b", "c"], ["d"]]
    with pytest.raises(TunesmithError, match="has no split 'eval'; it has 'train', 'test'"):
        texts(tmp_path / "both", "eval")


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/a*.jsonl
  - split: held
    path: [parts/b.jsonl, c.jsonl]
- config_name: small
  data_dir: ./few
- config_name: all
  data_dir: .
- config_name: plain
  data_files: c.jsonl
---
# Rows
"""


def test_a_copy_of_a_data_set_of_the_hub_is_read_as_its_readme_says(tmp_path: Path) -> None:
    folder = write(tmp_path, parts__a1=".jsonl", parts__a2=".jsonl", parts__b=".jsonl", c=".jsonl", few__x=".json")
    (folder / "README.md").write_text(README)
    assert texts(folder) == ["parts__a1", "parts__a2"]
    assert texts(folder, "held") == ["parts__b", "c"]
    assert texts(f"{folder}:small") == ["few__x"]
    assert texts(f"{folder}:plain") == ["c"]
    assert texts(f"{folder}:all") == ["c", "few__x", "parts__a1", "parts__a2", "parts__b"]
    with pytest.raises(TunesmithError, match=r"has no configuration 'large'; write one of .*:default, .*:small, "):
        texts(f"{folder}:large")
    for path in ("../outside.jsonl", "/etc/hosts", "https://example.org/a.jsonl", "hf://x/y.jsonl"):
        (folder / "README.md").write_text(README.replace("parts/a*.jsonl", path))
        with pytest.raises(TunesmithError, match=r"README\.md names .*, which is outside of its folder"):
            texts(folder)
    (folder / "README.md").write_text(README.replace("parts/a*.jsonl", "z.jsonl"))
    with pytest.raises(TunesmithError, match=r"README\.md names z\.jsonl, and there is no such file"):
        texts(folder)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path, notes=".md", requirements=".txt")
    with pytest.raises(TunesmithError, match=r"is a folder that holds no \.jsonl, \.ndjson, .* file"):
        texts(tmp_path)


def test_a_folder_is_known_by_the_content_and_the_names_of_its_files(tmp_path: Path) -> None:
    folder = write(tmp_path, train=".jsonl", test=".jsonl")
    first = identity(read_rows(str(folder)))
    assert first not in (None, identity(read_rows(str(folder), "test")))
    (folder / "test.jsonl").write_text('{"text": "other"}')
    assert identity(read_rows(str(folder))) == first
    (folder / "train.jsonl").rename(folder / "train2.jsonl")
    assert identity(read_rows(str(folder))) != first
