"""Any file of a checkpoint may be flipped, cut or gone: that is found, named, and the checkpoint before is taken."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.figures import FIGURES, LONG
from tests.train.children import trainer_of
from tests.train.runs import largest_difference, weights_of
from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import STATE, checkpoints, verify

STEPS = 4
SEEDS = range(4) if LONG else range(1)


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def empty(file: Path, draw: random.Random) -> None:
    file.write_bytes(b"")


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


DAMAGES = (flip, cut, empty, delete)


@pytest.mark.parametrize("mode", ["full", "sources"] if LONG else ["sources"])
@pytest.mark.timeout(600)
def test_every_damage_to_every_file_is_named_and_passed_over(
    mode: str, tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(mode, tmp_path, tiny_model, max_steps=STEPS)
    trainer.train()
    expected = weights_of(trainer)
    before, last = checkpoints(tmp_path / "run")
    shutil.copytree(last, tmp_path / "good")
    names = sorted(path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file())
    assert {STATE, "manifest.json", "optimizer.safetensors", "random.safetensors", "progress.json"} <= {*names}
    for name in names:
        for damage in DAMAGES:
            for seed in SEEDS if damage in (flip, cut) else range(1):
                damage(last / name, random.Random(f"{name} {seed}"))
                named = rf"{last.name}.*{name}"
                with pytest.raises(TunesmithError, match=named):
                    trainer.train(resume_from_checkpoint=str(last))
                chosen = trainer.keeper._chosen(tmp_path / "run", True)
                assert chosen.folder == before
                assert len(chosen.skipped) == 1
                assert name in chosen.skipped[0]
                assert chosen.skipped[0] in caplog.text
                FIGURES["damaged files found out and named"] += 1
                if (LONG and damage is cut and seed == 0) or (name, damage) == (STATE, cut):
                    trainer.train(resume_from_checkpoint=True)
                    assert largest_difference(weights_of(trainer), expected) == 0.0
                    verify(last)  # written anew
                    FIGURES["resumed from the checkpoint before"] += 1
                shutil.rmtree(last)
                shutil.copytree(tmp_path / "good", last)
                caplog.clear()
