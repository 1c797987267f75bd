"""Which files a source means: a file, a pattern such as `data/*.jsonl`, or a folder, by split.

Folders are those that people have: data files, with the split in a file's or a folder's name; what
`Dataset.save_to_disk` wrote; and a copy of a data set of the hub, whose README.md may name the files of each split.
"""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tunesmith.errors import TunesmithError, nearest
from tunesmith.settings.coerce import FiniteLoader

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
PACKED = (".gz", ".bz2", ".xz", ".zst")
WILD = frozenset("*?[")
NOT_DATA = frozenset(
    ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt")
)
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What file names call a split, as on the hub."""
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-\w+)?")
NO_SCRIPTS = (
    "Data sets with a loading script run code of others, and are not supported; take the data set's Parquet files, "
    "or save its rows as .jsonl"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The files of a source by split. Where no name tells a split, all are under ""."""

    splits: Mapping[str, tuple[Path, ...]]

    def chosen(self, source: str, split: str | None, default: str) -> tuple[Path, ...]:
        """The files of `split`, of `default` where none is asked for. Raises TunesmithError that lists the splits."""
        if set(self.splits) == {""}:
            if split is not None:
                raise TunesmithError(f"split is {split!r}, but {source} has no splits; drop it")
            return self.splits[""]
        wanted = split or default
        if wanted not in self.splits:
            raise TunesmithError(no_such_split(source, wanted, self.splits))
        return self.splits[wanted]


def no_such_split(source: str, split: str, splits: Sequence[str] | Mapping[str, Any]) -> str:
    """That `source` lacks a split, and what to write instead."""
    listed, example = ", ".join(map(repr, splits)), next(iter(splits))
    return (
        f"{source} has no split {split!r}{nearest(split, splits)}; it has {listed}. "
        f"Choose one: `split: {example}`, of eval_data `eval_split: {example}`"
    )


def suffix_of(path: Path) -> str:
    """What a file's name says about its content: its suffix in lower case, without that of its compression."""
    name = Path(path.stem) if path.suffix.lower() in PACKED else path
    return name.suffix.lower()


def is_file_name(source: str) -> bool:
    """Whether `source` means files, there or not, rather than a name on the hub."""
    path = Path(source).expanduser()
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source)
    in_a_folder = "/" in source and path.parent.is_dir()
    known = suffix_of(path) in SUFFIXES
    if not hub_name or path.exists() or known or path.suffix.lower() in PACKED:
        return True
    return source[0] in ".~" or in_a_folder or _configured(source) is not None


def find(source: str) -> Found:
    """The files that `source` means.

    Raises TunesmithError when there is none, for folders whose files belong to no one split, and for what a README
    names outside of its folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, source, None)
    if path.is_file():
        return Found(splits={"": (path,)})
    if path.exists():
        raise TunesmithError(f"{source} is neither a file nor a folder; save what it gives in a file")
    if WILD & {*source}:
        files = tuple(Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file())
        if not files:
            raise TunesmithError(f"no file matches {source}")
        return Found(splits={"": files})
    if (configured := _configured(source)) is not None:
        folder, name = configured
        return _in_folder(folder, source, name)
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    where = "" if path.parent.is_dir() else f": there is no folder {path.parent}"
    raise TunesmithError(f"no file {source}{where}{nearest(path.name, siblings)}")


def _configured(source: str) -> tuple[Path, str] | None:
    """The folder and the configuration of `FOLDER:CONFIGURATION`."""
    folder, colon, name = source.rpartition(":")
    path = Path(folder).expanduser()
    return (path, name) if colon and folder and path.is_dir() else None


def _in_folder(folder: Path, source: str, configuration: str | None) -> Found:
    if (dictionary := _json(folder / "dataset_dict.json")) is not None:
        names = dictionary.get("splits") if isinstance(dictionary, dict) else None
        if not isinstance(names, list) or not names:
            raise TunesmithError(f"{source} is damaged: dataset_dict.json names no splits")
        return Found(splits={str(name): _saved(folder / Path(str(name)).name) for name in names})
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Found(splits={"": _saved(folder)})
    if (chosen := _named_in_readme(folder, source, configuration)) is not None:
        return chosen
    if configuration is not None:
        raise TunesmithError(f"{folder} has no configurations, which its README.md would name; write {folder}")
    return _by_names(folder, source)


def _by_names(folder: Path, source: str) -> Found:
    """The data files in a folder and below, by the splits that their names tell."""
    files = list(_data_files(folder))
    if not files:
        scripts = sorted(item.name for item in folder.glob("*.py"))
        if scripts:
            raise TunesmithError(f"{source} needs the code in {scripts[0]} to be read. {NO_SCRIPTS}")
        raise TunesmithError(f"{source} is a folder that holds no {', '.join(SUFFIXES)} file")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if len(splits) == 1 and not _known_split(next(iter(splits))):
        splits = {"": files}  # shards of one data set, under its name
    if len(splits) > 1 and "" in splits:
        other, named = splits[""][0], next(files[0] for name, files in splits.items() if name)
        raise TunesmithError(
            f"{source} holds {other.relative_to(folder)}, whose name tells no split, beside "
            f"{named.relative_to(folder)}; name the files that you mean, such as {source.rstrip('/')}/*{named.suffix}"
        )
    return Found(splits={name: tuple(files) for name, files in splits.items()})


def _json(file: Path) -> Any:
    """What a small file of `datasets` holds; None without one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TunesmithError(f"{file} can't be read: {error}") from error


def _saved(folder: Path) -> tuple[Path, ...]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in their order."""
    state = _json(folder / "state.json")
    try:
        files = tuple(folder / Path(item["filename"]).name for item in state["_data_files"])
    except (TypeError, KeyError) as error:
        raise TunesmithError(f"{folder} is damaged: state.json of `save_to_disk` names no data files") from error
    if not files:
        raise TunesmithError(f"{folder} has no rows")
    return files


def _data_files(folder: Path) -> Iterator[Path]:
    """The data files in a folder and below, in the order of their names. Texts count where there is nothing else."""
    files = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if suffix_of(file) in SUFFIXES and file.name not in NOT_DATA and not hidden and file.is_file():
            files.append(file)
    texts_only = all(suffix_of(file) == ".txt" for file in files)
    return (file for file in files if texts_only or suffix_of(file) != ".txt")


def _split_of(file: Path) -> str:
    """The split that a file's name tells, or the nearest folder's; "" for none."""
    for part in reversed(file.parts):
        if (shard := SHARD.match(part)) is not None:
            return shard["split"]
        if split := _known_split(part):
            return split
    return ""


def _known_split(name: str) -> str:
    words = re.findall(r"[a-z]+", name.lower())
    return next((split for split, names in SPLIT_WORDS.items() if any(word in names for word in words)), "")


# The README of a data set on the hub


def _named_in_readme(folder: Path, source: str, wanted: str | None) -> Found | None:
    """The files that README.md names; None where it names none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---[^\n]*\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.load(header[1], FiniteLoader) if header else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TunesmithError(f"{readme}: what stands between the lines of --- is not YAML: {error}") from error
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs) or not configs:
        return None
    named = {str(config.get("config_name", "default")): config for config in configs}
    if wanted is None:
        standard = [name for name, config in named.items() if config.get("default") is True or name == "default"]
        wanted = standard[0] if standard else next(iter(named)) if len(named) == 1 else None
    if wanted not in named:
        problem = "several configurations" if wanted is None else f"no configuration {wanted!r}"
        raise TunesmithError(f"{source} has {problem}; write one of {', '.join(f'{folder}:{name}' for name in named)}")
    config = named[wanted]
    below = "/".join(PurePosixPath(str(config.get("data_dir") or "")).parts)
    _check_inside(below, readme)
    if config.get("data_files") is None:
        return _by_names(folder / below, source)
    splits = {}
    for split, patterns in _patterns(config["data_files"], readme).items():
        files: dict[Path, None] = {}
        for pattern in patterns:
            _check_inside(pattern, readme)
            matching = sorted(glob.glob(pattern, root_dir=folder / below, recursive=True))
            files |= dict.fromkeys(file for name in matching if (file := folder / below / name).is_file())
        if not files:
            raise TunesmithError(f"{source}: README.md names {', '.join(patterns)}, and there is no such file")
        splits[split] = tuple(files)
    return Found(splits=splits)


def _patterns(data_files: Any, readme: Path) -> dict[str, list[str]]:
    """The patterns of each split: of a text or a list of texts, all are of "train", as on the hub."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, str) or (data_files and all(isinstance(item, str) for item in data_files)):
        data_files = [{"split": "train", "path": data_files}]
    patterns: dict[str, list[str]] = {}
    try:
        for item in data_files:
            paths = [item["path"]] if isinstance(item["path"], str) else list(item["path"])
            patterns.setdefault(str(item["split"]), []).extend(map(str, paths))
    except (TypeError, KeyError) as error:
        raise TunesmithError(f"{readme}: data_files of a configuration are not of `split` and `path`") from error
    return patterns


def _check_inside(pattern: str, readme: Path) -> None:
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts or "://" in pattern or Path(pattern).is_absolute():
        raise TunesmithError(f"{readme} names {pattern}, which is outside of its folder; name the files yourself")
