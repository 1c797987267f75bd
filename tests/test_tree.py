"""No file of the tree names a place that only its author's machine has."""

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Put together from pieces, so that this file passes its own test.
AUTHORS_FOLDERS = "|".join(["work", "root"])
REGISTRY_HOSTS = "|".join(
    rf"{name}\.{end}" for name, end in [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org")]
)
FORBIDDEN = {
    # Only at the start of a path: a folder of that name below another is nobody's in particular.
    "an absolute path of the author's machine": re.compile(rf"(?<![\w.~-])/(?:{AUTHORS_FOLDERS})/"),
    "the host of a package registry": re.compile(rf"\b(?:{REGISTRY_HOSTS})\b"),
}


def files_of_the_tree() -> list[Path]:
    """What git tracks and what it would add, as far as it is there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := REPO / name).is_file()]


def forbidden_lines(text: str) -> list[str]:
    return [
        f"{number} has {what}: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if pattern.search(line)
    ]


def test_no_file_names_an_absolute_path_or_a_registry_host() -> None:
    found = [
        f"{path.relative_to(REPO)}:{line}"
        for path in files_of_the_tree()
        for line in forbidden_lines(path.read_bytes().decode("utf-8", errors="ignore"))
    ]
    assert not found, "\n".join(["words of one machine in the tree:", *found])


@pytest.mark.parametrize(
    "line",
    [
        "open('" + "/wo" + "rk/data.jsonl')",
        "cache = " + "/ro" + "ot/.cache",
        "file://" + "/wo" + "rk/x",
        "https://py" + "pi.org/simple",
        "https://files.python" + "hosted.org/packages",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert forbidden_lines(line)


@pytest.mark.parametrize(
    "line", [f"out/{'work'}/model", f"../{'root'}/", "`work/` and `root`", "a working/rooted tree"]
)
def test_the_search_passes_relative_paths(line: str) -> None:
    assert not forbidden_lines(line)
