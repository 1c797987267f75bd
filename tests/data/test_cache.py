"""Prepared data is found again by content only, whole, and never half."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tunesmith.data.cache import MANIFEST, Store, fingerprint
from tunesmith.errors import TunesmithError


def nothing(dataset: object) -> dict[str, Any]:
    return {}


def tables(*parts: list[list[int]]) -> list[pa.Table]:
    return [pa.table({"input_ids": pa.array(part, pa.list_(pa.int32()))}) for part in parts]


def test_what_was_written_is_found_memory_mapped_with_its_notes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("k") is None
    written, _ = store.write("k", tables([[1, 2]], [[3]]), lambda dataset: {"rows": len(dataset)})
    found, notes = store.find("k") or pytest.fail("not found")
    assert found["input_ids"][:] == written["input_ids"][:] == [[1, 2], [3]]
    assert notes == {"rows": 2}
    assert [Path(file["filename"]).parent for file in found.cache_files] == [tmp_path / "k"]


def test_notes_are_taken_when_all_tables_are_written(tmp_path: Path) -> None:
    seen = []

    def stream() -> Iterator[pa.Table]:
        for table in tables([[1]], [[2]]):
            seen.append(table)
            yield table

    Store(tmp_path).write("k", stream(), lambda dataset: {"tables": len(seen)})
    assert (Store(tmp_path).find("k") or pytest.fail("not found"))[1] == {"tables": 2}


@pytest.mark.parametrize("damage", ["cut", "gone", "no manifest", "broken manifest"])
def test_a_damaged_data_set_is_not_used_and_can_be_written_again(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("k", tables([[1, 2, 3]]), nothing)
    shard = next((tmp_path / "k").glob("*.arrow"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "gone":
        shard.unlink()
    elif damage == "no manifest":
        (tmp_path / "k" / MANIFEST).unlink()
    else:
        (tmp_path / "k" / MANIFEST).write_text("{")
    assert store.find("k") is None
    store.write("k", tables([[4]]), nothing)
    assert (store.find("k") or pytest.fail("not found"))[0]["input_ids"][:] == [[4]]


def test_of_two_processes_that_write_the_same_the_slower_one_takes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        Store(tmp_path).write("k", tables([[1]]), nothing)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    written, _ = Store(tmp_path).write("k", tables([[1]]), nothing)
    assert written["input_ids"][:] == [[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[pa.Table]:
        yield tables([[1]])[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).write("k", broken(), nothing)
    assert list(tmp_path.iterdir()) == []


def test_without_a_key_nobody_finds_it_but_it_can_be_read(tmp_path: Path) -> None:
    written, _ = Store(tmp_path).write(None, tables([[7]]), nothing)
    assert written["input_ids"][:] == [[7]]
    assert list(tmp_path.iterdir()) == []


def test_shards_are_split_and_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.cache.write_shards.__defaults__", (2,))
    rows = [[i] for i in range(7)]
    Store(tmp_path).write("k", tables(*[[row] for row in rows]), nothing)
    assert len(list((tmp_path / "k").glob("*.arrow"))) == 4
    assert (Store(tmp_path).find("k") or pytest.fail("not found"))[0]["input_ids"][:] == rows


def test_data_unread_for_a_month_goes_when_new_data_comes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("old", "read"):
        store.write(key, tables([[1]]), nothing)
        os.utime(tmp_path / key / MANIFEST, (0, 0))
    store.find("read")
    store.write("new", tables([[1]]), nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "read"]
    assert json.loads((tmp_path / "new" / MANIFEST).read_text())["notes"] == {}
    assert time.time() - (tmp_path / "read" / MANIFEST).stat().st_mtime < 60


def test_a_folder_that_can_not_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TunesmithError, match="TUNESMITH_HOME"):
        Store(tmp_path / "file" / "prepared").write("k", tables([[1]]), nothing)


def test_fingerprints_tell_content_apart(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text("a")
    same = [fingerprint({"a": 1, "b": [2.0]}, "x", file), fingerprint({"b": [2.0], "a": 1}, "x", file)]
    file.write_text("b")
    other = [
        fingerprint({"a": 1, "b": [2.0]}, "x", file),
        fingerprint({"a": "1", "b": [2.0]}, "x"),
        fingerprint({"a": 1, "b": [2]}, "x"),
        fingerprint(["x"]),
        fingerprint("x"),
        fingerprint("", "x"),
        fingerprint("x", ""),
        fingerprint(b"x"),
        fingerprint(None),
        fingerprint("None"),
    ]
    assert same[0] == same[1]
    assert len({same[0], *other}) == len(other) + 1


@pytest.mark.parametrize("value", [print, object(), {"f": len}, [object()]])
def test_what_has_no_content_has_no_fingerprint(value: object) -> None:
    with pytest.raises(TypeError, match="no fingerprint"):
        fingerprint(value)
