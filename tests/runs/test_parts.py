"""Tensors that several processes write are read as one file's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.errors import TunesmithError
from tunesmith.runs.parts import files_of, named_by, write_index, write_part, writers
from tunesmith.runs.states import packed, read_state


def test_neighbours_have_one_writer_and_each_writes_near_the_same() -> None:
    assert writers({"a": 4, "b": 4, "c": 4, "d": 4}, 2) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert writers({"large": 10, "small": 1}, 4) == {"large": 1, "small": 3}
    assert writers({}, 2) == {}


def test_a_state_in_parts_is_read_whole_or_by_slices(tmp_path: Path) -> None:
    state = {"first": torch.tensor([1.0, 2.0]), "then": [torch.tensor([3.0]), torch.tensor([4.0])], "step": 5}
    whole = packed(state, "it")
    whole.write_structure(tmp_path, "it")
    for rank in (0, 1):
        files = write_part(whole.tensors, tmp_path, "it", rank=rank, processes=2, whole=lambda tensor: tensor)
    write_index(files, tmp_path, "it", 16)
    one, two = "it-00001-of-00002.safetensors", "it-00002-of-00002.safetensors"
    assert [file.name for file in files_of(tmp_path, "it")] == [one, two]
    assert json.loads((tmp_path / "it.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 16},
        "weight_map": {"it.first": one, "it.then.0": two, "it.then.1": two},
    }
    read = read_state(tmp_path, "it")
    assert (read["first"].tolist(), [value.item() for value in read["then"]], read["step"]) == (
        [1.0, 2.0],
        [3.0, 4.0],
        5,
    )
    last = read_state(tmp_path, "it", lambda name, piece: piece[-1:])
    assert last["first"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "is no index of a model's weights"),
        ({"weight_map": None}, "is no index of a model's weights"),
        ({"weight_map": {"a": 5}}, "is no index of a model's weights"),
        ({"weight_map": {"a": "../../m/model.safetensors"}}, "names ../../m/model.safetensors, which is not in"),
        ({"weight_map": {"a": "/m/model.safetensors"}}, "names /m/model.safetensors, which is not in its folder"),
    ],
)
def test_an_index_names_files_of_its_folder(index: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(TunesmithError, match=message):
        named_by(path)
