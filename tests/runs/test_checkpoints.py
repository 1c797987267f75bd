"""A checkpoint folder is whole or not there, says what is wrong with it, and needs no pickle."""

import ctypes
import json
import os
import random
import re
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from tests.forked import finished, start
from tunesmith.errors import TunesmithError
from tunesmith.runs import folder as disk
from tunesmith.runs.checkpoints import (
    FORMAT,
    MANIFEST,
    PARTIALS,
    Identity,
    Manifest,
    begin,
    checked,
    checkpoints,
    finish,
    newest_whole,
    remove_partials,
    rotate,
    verify,
)
from tunesmith.runs.folder import check_space, estimated_size, twice
from tunesmith.runs.states import packed, random_states, read_state, restore_random_states
from tunesmith.train.identity import content_digest
from tunesmith.train.keeper import Writer

IDENTITY = Identity(data={"content": "a"}, settings={"seed": 1}, model={"name": "m"})
CPU = torch.device("cpu")


def manifest(step: int) -> Manifest:
    common: dict[str, Any] = {"precision": "fp32", "onednn": False, "environment": {}, "versions": {}, "files": {}}
    return Manifest(step=step, identity=IDENTITY, **common)


def written(run: Path, step: int) -> Path:
    folder = begin(run, step)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "more").mkdir()
    (folder / "more" / "file").write_text("x")
    return finish(folder, manifest(step))


# States


def test_a_state_comes_back_with_its_types_tensors_and_shared_memory(tmp_path: Path) -> None:
    shared = torch.arange(4, dtype=torch.uint8)
    row = torch.arange(10.0)
    part, other = row[2:5], row[4:7]
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "qmap": shared},
            1: {"qmap": shared, "part": part.t(), "other": other},
        },
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1], "fused": None, "worst": float("inf")}],
        "$odd": OrderedDict(a=np.float64(0.5), b=torch.zeros(0, dtype=torch.bfloat16)),
    }
    packed(state, "optimizer").write(tmp_path, "optimizer")
    found = read_state(tmp_path, "optimizer")
    groups = [{**state["param_groups"][0]}]  # type: ignore[index]
    assert found["param_groups"] == groups
    assert found["$odd"]["a"] == 0.5
    assert found["$odd"]["b"].dtype == torch.bfloat16
    assert torch.equal(found["state"][1]["part"], part)
    assert torch.equal(found["state"][1]["other"], other)
    assert found["state"][0]["step"].shape == ()
    assert found["state"][0]["qmap"] is found["state"][1]["qmap"]
    assert (tmp_path / "optimizer.safetensors").stat().st_size < 700, "a part is written without its neighbours"
    assert read_state(tmp_path, "nothing") is None


def test_a_state_that_was_read_does_not_follow_its_file(tmp_path: Path) -> None:
    packed({"values": torch.arange(1000)}, "optimizer").write(tmp_path, "optimizer")
    found = read_state(tmp_path, "optimizer")["values"]
    file = tmp_path / "optimizer.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(found, torch.arange(1000))


def test_what_only_pickle_could_write_is_named() -> None:
    with pytest.raises(TunesmithError, match=r"can't hold scheduler\.lambdas\.0, a function"):
        packed({"lambdas": [lambda step: step]}, "scheduler")


def test_a_copied_state_does_not_follow_the_training() -> None:
    weight = torch.zeros(2)
    kept = packed([weight], "x").copied()
    weight += 1
    assert kept.tensors["x.0"].tolist() == [0, 0]


def test_random_numbers_go_on_where_they_were() -> None:
    random.gauss(0, 1), np.random.normal()  # which leave a second number behind
    states = {name: torch.stack([state, state])[1] for name, state in random_states(CPU, all_devices=True).items()}

    def numbers() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), float(torch.rand(()))]

    expected = numbers()
    numbers()
    restore_random_states(states, CPU)
    assert numbers() == expected


# Folders


def test_what_is_written_verifies_and_is_described(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 3)
    assert folder == tmp_path / "run" / "checkpoint-3"
    found = verify(folder)
    assert found.identity == IDENTITY
    assert found.files.keys() == {"trainer_state.json", "model.safetensors", "more/file"}
    assert found.size == 2 + 21 + 1
    assert json.loads((folder / MANIFEST).read_text())["fingerprints"].keys() == {"data", "settings", "model"}
    assert not list((tmp_path / "run").glob(PARTIALS))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not tell which file a number is of")
def test_all_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    before: set[str] = set()

    def rename(self: Path, target: Path) -> Any:
        before.update(flushed)
        return renamed(self, target)

    renamed = Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(Path, "rename", rename)
    folder = begin(tmp_path, 3)
    (folder / "more").mkdir()
    for name in ("model.safetensors", "more/file"):
        (folder / name).write_text("x")
    finish(folder, manifest(3))
    names = ("", "model.safetensors", "more", "more/file", MANIFEST)
    assert {str(folder / name).rstrip("/") for name in names} <= before
    assert flushed[-1] == str(tmp_path)  # the new name itself


def test_a_second_try_does_not_describe_the_manifest_of_the_first(tmp_path: Path) -> None:
    folder = begin(tmp_path, 3)
    (folder / "trainer_state.json").write_text("{}")
    (folder / MANIFEST).write_text("half of")
    assert verify(finish(folder, manifest(3))).files.keys() == {"trainer_state.json"}


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (written(tmp_path, 3) / "model.safetensors").write_text("damaged")
    verify(written(tmp_path, 3))
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"w"), r"model.safetensors has 1 bytes, .* with 28"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"WEIGHTS" * 4), "model.safetensors has other"),
        (lambda folder: (folder / "more" / "file").unlink(), "lacks more/file"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json can't be read"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "manifest.json can't be read"),
        (lambda folder: (folder / MANIFEST).write_text(f'{{"format": {FORMAT + 1}}}'), "written by a newer version"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1}'), "manifest.json can't be read"),
    ],
)
def test_damage_is_named_and_the_newest_whole_one_is_taken(tmp_path: Path, damage: Any, reason: str) -> None:
    written(tmp_path, 3)
    damage(written(tmp_path, 4))
    with pytest.raises(TunesmithError, match=reason):
        checked(tmp_path / "checkpoint-4")
    begin(tmp_path, 5)
    chosen = newest_whole(tmp_path)
    assert chosen.folder.name == "checkpoint-3"
    assert chosen.manifest is not None
    assert chosen.manifest.step == 3
    assert "partial" in chosen.skipped[0]
    assert re.search(reason, chosen.skipped[1])


def test_without_a_whole_one_all_that_was_passed_over_is_listed(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match=r"there is no checkpoint in .* leave it out to start anew"):
        newest_whole(tmp_path)
    (written(tmp_path, 4) / "model.safetensors").unlink()
    with pytest.raises(TunesmithError, match=r"to go on from\n  .*checkpoint-4 lacks model.safetensors"):
        newest_whole(tmp_path)


def test_partial_folders_go_but_for_one_that_lacked_only_its_renaming(tmp_path: Path) -> None:
    written(tmp_path, 3)
    (begin(tmp_path, 4) / "model.safetensors").write_text("half")
    aside = tmp_path / ".checkpoint-5.partial-x"
    aside.mkdir()
    written(tmp_path, 5).rename(aside / "checkpoint-5")
    remove_partials(tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5"]
    assert not list(tmp_path.glob(PARTIALS))
    verify(tmp_path / "checkpoint-5")


def test_a_partial_folder_that_can_not_be_tidied_up_keeps_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / ".checkpoint-5.partial-x"
    aside.mkdir()
    written(tmp_path, 5).rename(aside / "checkpoint-5")

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        remove_partials(tmp_path)
    verify(aside / "checkpoint-5")
    remove_partials(tmp_path)
    verify(tmp_path / "checkpoint-5")


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    file = written(tmp_path, 3) / MANIFEST
    content = file.read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(content)), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(TunesmithError, match=MANIFEST):
            verify(file.parent)


def test_old_ones_go_only_when_the_new_one_verifies(tmp_path: Path) -> None:
    folders = [written(tmp_path, step) for step in (2, 9, 10)]
    (folders[2] / "model.safetensors").write_text("damaged")
    with pytest.raises(TunesmithError, match="checkpoint-10"):
        rotate(folders[2], 1, None)
    assert checkpoints(tmp_path) == folders
    written(tmp_path, 10)
    rotate(folders[2], None, None)
    rotate(folders[2], 2, str(folders[0]))
    assert checkpoints(tmp_path) == [folders[0], folders[2]]
    rotate(folders[2], 1, None)
    assert checkpoints(tmp_path) == [folders[2]]


def test_pickles_of_other_tools_are_refused_unless_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_text("{}")
    with pytest.raises(TunesmithError, match=r"optimizer\.pt, rng_state\.pth are pickles, .* allow_pickle: true"):
        checked(folder)
    assert checked(folder, allow_pickle=True).manifest is None
    assert newest_whole(tmp_path, allow_pickle=True).folder == folder


def test_weights_that_only_a_pickle_holds_are_refused_in_a_whole_checkpoint_too(tmp_path: Path) -> None:
    folder = begin(tmp_path, 2)
    for name in ("trainer_state.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    folder = finish(folder, manifest(2))
    with pytest.raises(TunesmithError, match=r"pytorch_model\.bin are pickles"):
        checked(folder)
    assert checked(folder, allow_pickle=True).manifest is not None


def test_differences_say_what_was_and_what_is() -> None:
    now = Identity(data={"content": "b"}, settings={"seed": 2, "new": 1}, model={"name": "m"})
    assert IDENTITY.differences(now) == ["data, content: a -> b", "seed: 1 -> 2"]
    assert IDENTITY.differences(IDENTITY) == []


def test_the_digest_of_data_is_of_its_content_alone() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 2], "weights": None, "note": "a"},
        {"input_ids": [3], "weights": [0.5], "note": "b"},
    ]
    whole = Dataset.from_list(rows)
    parts = concatenate_datasets([whole.select([0]), whole.select([1])])
    assert content_digest(parts) == content_digest(whole)
    others = [
        [rows[0] | {"input_ids": [1, 4]}, rows[1]],
        [rows[0] | {"input_ids": [1]}, rows[1] | {"input_ids": [2, 3]}],
        [rows[0], rows[1] | {"weights": [0.25]}],
        [rows[0], rows[1] | {"note": "c"}],
        rows[:1],
    ]
    digests = [content_digest(Dataset.from_list(other, features=whole.features)) for other in others]
    digests += [content_digest(whole.select([1, 0])), content_digest(whole)]
    assert len(set(digests)) == len(digests)


# The disk


def test_too_little_space_is_said_with_how_much_to_free(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(TunesmithError, match=r"takes about 1,000,000,000.0 GB, and .* are free there. Free .* GB"):
        check_space(tmp_path / "not" / "there", 10**18)


def test_the_size_of_a_checkpoint_follows_the_optimizer() -> None:
    model = torch.nn.Linear(1000, 1000)
    model.bias.requires_grad = False
    weights, trained = 4 * 1_001_000 + disk.MORE, 4_000_000
    sizes = {name: estimated_size(model, None, name, only_model=False) for name in ("adamw_torch", "sgd", "adamw_8bit")}
    assert sizes == {
        "adamw_torch": weights + 2 * trained,
        "sgd": weights + trained,
        "adamw_8bit": weights + trained // 2,
    }
    optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    assert estimated_size(model, optimizer, "sgd", only_model=False) == weights + trained
    assert estimated_size(model, optimizer, "sgd", only_model=True) == weights


def on_a_small_disk(folder: Path, report: Path) -> None:
    """In a process that sees a disk of 1 MB at `folder`: writes a checkpoint that fits, then one that doesn't."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(0x00020000)
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "x", str(folder)]).returncode
    ):
        report.write_text(json.dumps("no disks can be made here"))
        return
    written(folder, 1)

    def second() -> None:
        made = begin(folder, 2)
        try:
            packed({"weight": torch.zeros(400_000)}, "optimizer").write(made, "optimizer")
        except BaseException:
            disk_is_tidied(made)
            raise

    try:
        twice(second, folder, 1_600_000)
    except TunesmithError as error:
        verify(folder / "checkpoint-1")
        report.write_text(json.dumps([str(error), sorted(item.name for item in folder.iterdir())]))


def disk_is_tidied(made: Path) -> None:
    from tunesmith.runs.checkpoints import discard

    discard(made)


def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_says_how_much_to_free(tmp_path: Path) -> None:
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root can make a small disk")
    disk_folder, report = tmp_path / "disk", tmp_path / "report.json"
    disk_folder.mkdir()
    assert finished(start(on_a_small_disk, disk_folder, report)) == 0
    answer = json.loads(report.read_text())
    if isinstance(answer, str):
        pytest.skip(answer)
    message, left = answer
    assert left == ["checkpoint-1"]
    assert "is full: the checkpoint takes about 2 MB" in message
    assert "The checkpoints from before are whole; free 17 MB or more there" in message


def test_other_failures_are_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSE", 0)
    tries: list[int] = []

    def write() -> str:
        tries.append(1)
        if len(tries) == 1:
            (tmp_path / "file").write_text("")
            begin(tmp_path / "file", 1)  # a folder in a file
        return "written"

    assert twice(write, tmp_path, 1) == "written"
    with pytest.raises(TunesmithError, match=r"no checkpoint can be written to .*go on with --resume-from-checkpoint"):
        twice(lambda: begin(tmp_path / "file", 1), tmp_path, 1)

    def mistake() -> None:
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="of ours"):
        twice(mistake, tmp_path, 1)


def test_the_writer_does_one_thing_at_a_time_and_raises_what_went_wrong() -> None:
    writer, done = Writer(), []

    def fail() -> None:
        raise TunesmithError("no space")

    for number in range(3):
        writer.start(lambda number=number: done.append(number))  # type: ignore[misc]
    writer.wait()
    assert done == [0, 1, 2]
    writer.start(fail)
    with pytest.raises(TunesmithError, match="no space"):
        writer.wait()
    writer.wait()
