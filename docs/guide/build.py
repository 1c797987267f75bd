"""The guide's notebooks, made from its scripts and its Chinese prose; and run, to see that they work.

A chapter is `examples/NN_name.py`, a script in jupytext's percent format with the English prose, and
`docs/guide/zh-TW/NN_name.md`, the same markdown cells in Chinese, separated by lines `<!-- cell -->`. From these two
come `docs/guide/en/NN_name.ipynb` and `docs/guide/zh-TW/NN_name.ipynb`, whose code cells are the same by construction.

    python docs/guide/build.py              # write the notebooks
    python docs/guide/build.py --check      # exit 1 where a notebook is not what would be written
    python docs/guide/build.py --execute    # run them; the executed copies are in build/guide/
    python docs/guide/build.py --execute 03 en/01    # some of them
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
GUIDE = REPO / "docs" / "guide"
EXECUTED = REPO / "build" / "guide"
LANGUAGES = ("en", "zh-TW")
CHAPTER = re.compile(r"\d\d_\w+\.py")
SEPARATOR = "<!-- cell -->"
CELL_SECONDS = 600
ALL_SECONDS = 12 * 60
"""What a run of every notebook should take, with nothing else running."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class GuideError(ValueError):
    """A chapter whose two sources do not fit each other; says which, and what to mend."""


def chapters() -> list[Path]:
    """The scripts of the chapters, in order. Other examples are no chapters: their names begin without a number."""
    return sorted(path for path in EXAMPLES.glob("*.py") if CHAPTER.fullmatch(path.name))


def notebook_path(script: Path, language: str) -> Path:
    return GUIDE / language / f"{script.stem}.ipynb"


def prose_path(script: Path, language: str) -> Path:
    return GUIDE / language / f"{script.stem}.md"


def notebook(script: Path, language: str) -> str:
    """The text of a chapter's notebook. Raises GuideError where the prose of `language` lacks cells or has more."""
    cells = source_cells(script)
    prose = _prose(script, language, [text for kind, text in cells if kind == "markdown"])
    made = []
    for identity, (kind, text) in zip(_identities(cells), cells, strict=True):
        source = next(prose) if kind == "markdown" else text
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        made.append(new(source, id=identity))
    book = nbformat.v4.new_notebook(cells=made, metadata=METADATA)
    nbformat.validate(book)
    return f"{nbformat.writes(book).rstrip()}\n"


def source_cells(script: Path) -> list[tuple[str, str]]:
    """The kind ("markdown", "code") and the text of each cell of a script."""
    book = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    return [(cell.cell_type, cell.source.strip("\n")) for cell in book.cells]


def _prose(script: Path, language: str, english: list[str]) -> Iterator[str]:
    if language == "en":
        return iter(english)
    path = prose_path(script, language)
    if not path.is_file():
        raise GuideError(f"{path.relative_to(REPO)} is missing: the prose of {script.name} in {language}")
    cells = [cell.strip() for cell in path.read_text(encoding="utf-8").split(SEPARATOR)]
    if len(cells) != len(english):
        raise GuideError(
            f"{path.relative_to(REPO)} has {len(cells)} cells between its lines {SEPARATOR}, and {script.name} has "
            f"{len(english)} markdown cells; write as many, in the same order"
        )
    if "" in cells:
        raise GuideError(f"{path.relative_to(REPO)}: cell {cells.index('') + 1} is empty")
    return iter(cells)


def _identities(cells: list[tuple[str, str]]) -> Iterator[str]:
    """An id for each cell from its own text, so that a cell put in between leaves the ids of all others as they are."""
    seen: dict[str, int] = {}
    for kind, text in cells:
        identity = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:12]
        seen[identity] = seen.get(identity, 0) + 1
        yield identity if seen[identity] == 1 else f"{identity}-{seen[identity]}"


def write() -> list[Path]:
    """Write every notebook; returns those that have changed."""
    changed = []
    for path, text in _all():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


def differing() -> list[str]:
    """What is wrong with the notebooks as they lie there, one line each; empty where nothing is."""
    wrong, known = [], set()
    for path, text in _all():
        known.add(path)
        if not path.is_file():
            wrong.append(f"{path.relative_to(REPO)} is missing")
        elif path.read_text(encoding="utf-8") != text:
            wrong.append(f"{path.relative_to(REPO)} is not what its sources make")
    left = {path for language in LANGUAGES for path in (GUIDE / language).glob("*.ipynb")} - known
    return wrong + [f"{path.relative_to(REPO)} has no script in examples/" for path in sorted(left)]


def _all() -> Iterator[tuple[Path, str]]:
    for script in chapters():
        for language in LANGUAGES:
            yield notebook_path(script, language), notebook(script, language)


# Running


def execute(wanted: list[str]) -> list[str]:
    """Run the notebooks whose name (`en/03_first_sft`) contains one of `wanted`, or all; says seconds of each.

    Returns the names of those in which a cell failed or wrote to stderr (a reader would take a warning for his own
    mistake); says where all of them took longer than ALL_SECONDS. The executed copies, failed ones included, are in
    build/guide/.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a notebook that has a hub of its own says otherwise, for itself
    os.environ.setdefault("MPLCONFIGDIR", str(EXECUTED / "matplotlib"))
    failed, total = [], 0.0
    for script in chapters():
        for language in LANGUAGES:
            name = f"{language}/{script.stem}"
            if wanted and not any(part in name for part in wanted):
                continue
            started = time.perf_counter()
            error = _run(notebook_path(script, language), EXECUTED / f"{name}.ipynb")
            seconds = time.perf_counter() - started
            total += seconds
            print(f"{seconds:6.1f} s  {name}{'  FAILED' if error else ''}", flush=True)
            if error:
                print(error, file=sys.stderr, flush=True)
                failed.append(name)
    print(f"{total:6.1f} s  together")
    if not wanted and total > ALL_SECONDS:
        # No failure: beside other programs the same notebooks take longer.
        print(f"all notebooks took {total:.0f} s, and should take {ALL_SECONDS} s: make them shorter", file=sys.stderr)
    return failed


def _run(source: Path, target: Path) -> str:
    """Run a notebook top to bottom, from the checkout's root as the scripts are; the error of its first cell that
    fails, or else what its cells wrote to stderr, or nothing."""
    book: Any = nbformat.read(source, as_version=4)
    client = NotebookClient(
        book,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(REPO)}},
    )
    error = ""
    try:
        client.execute()
    except CellExecutionError as failure:
        error = str(failure)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, target)
    return error or "\n".join(complaints(book))


def complaints(book: Any) -> list[str]:
    """What the cells of an executed notebook show besides their results: errors, and what went to stderr."""
    found = []
    for number, cell in enumerate(book.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {number}: {output.ename}: {output.evalue}")
            elif output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} wrote to stderr: {output.text.strip()}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Make, check or run the notebooks of the guide.")
    parser.add_argument("--check", action="store_true", help="exit 1 where a notebook differs from its sources")
    parser.add_argument("--execute", action="store_true", help="run the notebooks as they are")
    parser.add_argument("wanted", nargs="*", help="with --execute: parts of names, such as en/03; none, all")
    options = parser.parse_args(arguments)
    try:
        if options.execute:
            return 1 if execute(options.wanted) else 0
        if options.check:
            wrong = differing()
            print(
                "\n".join([*wrong, "Run: python docs/guide/build.py"] if wrong else ["The notebooks are up to date."])
            )
            return 1 if wrong else 0
        for path in write():
            print(f"wrote {path.relative_to(REPO)}")
    except GuideError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
