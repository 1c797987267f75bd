"""Prepared data on disk: written once in shards, read back memory-mapped, found again by content.

A prepared data set is a folder of Arrow files and a `manifest.json`. Its name is a digest of everything that went in:
the rows, the tokenizer, the template, every option that matters, and the code that prepares them. A folder is
written under another name and renamed when it is complete, so that half a data set is never read.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.home import home

MANIFEST = "manifest.json"
SHARD = ".arrow"
KEEP_DAYS = 30
"""Prepared data that was not read for so long is removed when new data is written."""


def fingerprint(*parts: Any) -> str:
    """A digest of JSON-like values, dataclasses, bytes and files, in order: equal for equal content only.

    Raises TypeError for anything else: an object whose content can't be told must not look unchanged.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, bytes):
            content = part
        elif isinstance(part, Path):
            with part.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").digest()
        else:
            text = json.dumps(part, sort_keys=True, ensure_ascii=False, default=_jsonable)
            content = text.encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no fingerprint")


class Store:
    """Prepared data sets under one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home() / "prepared"

    def find(self, key: str) -> tuple[Any, dict[str, Any]] | None:
        """The data set of `key`, memory-mapped, and the notes on it; None unless it is there, and whole."""
        folder = self.folder / key
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if any((folder / name).stat().st_size != size for name, size in manifest["files"].items()):
                return None
            (folder / MANIFEST).touch()
            return open_shards([folder / name for name in manifest["files"] if name.endswith(SHARD)]), manifest["notes"]
        except (OSError, ValueError, KeyError):
            return None

    def attachment(self, key: str, name: str) -> Path | None:
        """The file `name` that was kept with the data set of `key`; None when there is none."""
        file = self.folder / key / name
        return file if file.is_file() else None

    def write(
        self,
        key: str | None,
        tables: Iterable[Any],
        notes: Callable[[Any], dict[str, Any]],
        attachment: Path | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Write `tables` (Arrow, one schema) as the data set of `key`; returns what `find` will.

        `notes` is given the data set when all tables are written, and returns what to keep with it; so is a copy of the
        file `attachment`, if there is one by then. Without a key the files live as long as this process, and can't
        be found.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_old()
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=self.folder, ignore_cleanup_errors=True) as name:
                partial = Path(name)
                shards = write_shards(partial, tables)
                written = notes(open_shards(shards))
                if key is None:
                    return open_shards(_kept_until_exit(shards)), written
                files = [*shards]
                if attachment is not None and attachment.exists():
                    files.append(Path(shutil.copy(attachment, partial)))
                manifest = {"files": {file.name: file.stat().st_size for file in files}, "notes": written}
                (partial / MANIFEST).write_text(json.dumps(manifest))
                return self._put(partial, key)
        except OSError as error:
            raise TunesmithError(
                f"prepared data can't be written to {self.folder}: {error.strerror}. "
                "Set TUNESMITH_HOME to a folder that you can write"
            ) from error

    def _put(self, partial: Path, key: str) -> tuple[Any, dict[str, Any]]:
        """Give a complete folder its name, and return what it holds; that of another process if it was faster."""
        folder = self.folder / key
        if folder.exists() and self.find(key) is None:  # damaged
            shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        stored = self.find(key)
        assert stored is not None
        return stored

    def _remove_old(self) -> None:
        oldest = time.time() - KEEP_DAYS * 86400
        for folder in self.folder.iterdir():
            mark = folder / MANIFEST
            touched = mark if mark.exists() else folder
            if folder.is_dir() and touched.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


_TEMPORARY: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that go when the process ends."""


def _kept_until_exit(files: list[Path]) -> list[Path]:
    folder = tempfile.TemporaryDirectory(prefix="tunesmith-", ignore_cleanup_errors=True)
    _TEMPORARY.append(folder)
    return [Path(shutil.move(file, folder.name)) for file in files]


def write_shards(folder: Path, tables: Iterable[Any], rows_per_shard: int = 100_000) -> list[Path]:
    """`tables` as Arrow streams of about `rows_per_shard` rows; holds one table in memory at a time."""
    import pyarrow as pa

    files: list[Path] = []
    writer, rows = None, 0
    try:
        for table in tables:
            if writer is None or rows >= rows_per_shard:
                if writer is not None:
                    writer.close()
                files.append(folder / f"data-{len(files):05d}{SHARD}")
                writer, rows = pa.ipc.new_stream(str(files[-1]), table.schema), 0
            writer.write_table(table)
            rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    return files


def open_shards(files: list[Path]) -> Any:
    """The shards as one `datasets.Dataset`, memory-mapped."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(file)) for file in files]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
