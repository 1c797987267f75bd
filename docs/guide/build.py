"""The guide's notebooks: made from its scripts and its Chinese words, run, and stored with what they showed.

A chapter is `examples/NN_name.py`, a script in jupytext's percent format with the English prose, and
`docs/guide/zh-TW/NN_name.md`, the same markdown cells in Chinese, separated by lines `<!-- cell -->`. From these two
come `docs/guide/en/NN_name.ipynb` and `docs/guide/zh-TW/NN_name.ipynb`. Their code is the same by construction, but for
its words, which `docs/guide/zh-TW/words.txt` translates (see `words.py`).

A notebook begins with the cells of `docs/guide/setup.py`, which a script does not need: they install what is missing
and look for a GPU. Cells of a script that are tagged `claim` assert what its prose says. They run with the notebook,
and stay out of it.

    python -m docs.guide.build                       # write the notebooks
    python -m docs.guide.build --check               # exit 1 where a notebook, or what it shows, is not of its sources
    python -m docs.guide.build --execute             # run the English ones; the executed copies are in build/guide/
    python -m docs.guide.build --execute --jobs 2    # two at a time, each with its part of the cores
    python -m docs.guide.build --execute 03 zh-TW/01   # some of them, in any language
    python -m docs.guide.build --store 03            # run them, and keep in docs/guide/ what they show
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
import nbformat
from nbclient import NotebookClient

from docs.guide.words import localized, read_table

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
GUIDE = REPO / "docs" / "guide"
EXECUTED = REPO / "build" / "guide"
LANGUAGES = ("en", "zh-TW")
CHAPTER = re.compile(r"\d\d_\w+\.py")
SEPARATOR = "<!-- cell -->"
CLAIM = "claim"
SETUP = "setup-"
"""How the ids of the cells begin that are not of the chapter."""
CELL_SECONDS = 1800
ALL_SECONDS = 12 * 60
"""What a run of every English notebook should take, with nothing else running."""
COLAB = "https://colab.research.google.com/github/tunesmith/tunesmith/blob/main/docs/guide"
OPEN = {"en": "Open this chapter in Colab", "zh-TW": "在 Colab 開啟這一章"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
STAMP = "tunesmith"
"""In a notebook's metadata: {"executed": the hash of the code that its outputs belong to}."""

Cell = tuple[str, str]
"""The kind, `markdown`, `code` or `claim`, and the text."""


class GuideError(ValueError):
    """A chapter whose sources do not fit each other; says which, and what to mend."""


def chapters() -> list[Path]:
    """The scripts of the chapters, in order. Other examples are no chapters: their names begin without a number."""
    return sorted(path for path in EXAMPLES.glob("*.py") if CHAPTER.fullmatch(path.name))


def notebook_path(script: Path, language: str) -> Path:
    return GUIDE / language / f"{script.stem}.ipynb"


def prose_path(script: Path, language: str) -> Path:
    return GUIDE / language / f"{script.stem}.md"


# Making


def notebook(script: Path, language: str, *, claims: bool = False) -> Any:
    """A chapter's notebook, not executed; with `claims`, the cells that only its run has, too.

    Raises GuideError where the prose of `language` lacks cells or has more.
    """
    cells = source_cells(script)
    prose = _prose(script, language, [text for kind, text in cells if kind == "markdown"])
    table = _table(language)
    made = [
        nbformat.v4.new_markdown_cell(
            f"[**{OPEN[language]}**]({COLAB}/{language}/{script.stem}.ipynb)", id="open-in-colab"
        )
    ]
    made += [nbformat.v4.new_code_cell(text, id=f"{SETUP}{i}") for i, text in enumerate(_setup(language))]
    for identity, (kind, text) in zip(_identities(cells), cells, strict=True):
        if kind == "markdown":
            made.append(nbformat.v4.new_markdown_cell(next(prose), id=identity))
        elif kind == "code":
            made.append(nbformat.v4.new_code_cell(localized(text, table), id=identity))
        elif claims:
            text = localized(text, table)  # it names what the code names
            made.append(nbformat.v4.new_code_cell(text, id=identity, metadata={"tags": [CLAIM]}))
    # The title stands first, as in any notebook.
    titles = (i for i, cell in enumerate(made) if cell.cell_type == "markdown" and cell.source.startswith("# "))
    at = next(titles, 0)
    made.insert(0, made.pop(at))
    book = nbformat.v4.new_notebook(cells=made, metadata=METADATA)
    nbformat.validate(book)
    return book


def source_cells(script: Path) -> list[Cell]:
    """The cells of a script."""
    book = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    return [
        (CLAIM if CLAIM in cell.metadata.get("tags", []) else cell.cell_type, cell.source.strip("\n"))
        for cell in book.cells
    ]


def _table(language: str) -> dict[str, str]:
    path = GUIDE / language / "words.txt"
    return read_table(path) if path.is_file() else {}


def _setup(language: str) -> list[str]:
    """The cells before those of the script: of every notebook, and of this language."""
    files = [file for file in (GUIDE / "setup.py", GUIDE / language / "setup.py") if file.is_file()]
    return [localized(file.read_text(encoding="utf-8").strip("\n"), _table(language)) for file in files]


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


def _identities(cells: list[Cell]) -> Iterator[str]:
    """An id for each cell from its own text, so that a cell put in between leaves the ids of all others as they are."""
    seen: dict[str, int] = {}
    for kind, text in cells:
        identity = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:12]
        seen[identity] = seen.get(identity, 0) + 1
        yield identity if seen[identity] == 1 else f"{identity}-{seen[identity]}"


# What is stored


def code_hash(book: Any) -> str:
    """Of the code of a notebook's chapter, in order: what its outputs depend on. They do not depend on the setup, which
    installs what is missing."""
    sources = [cell.source for cell in book.cells if cell.cell_type == "code" and not cell.id.startswith(SETUP)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def stored(path: Path) -> Any:
    """The notebook at `path`, or None."""
    return nbformat.read(path, as_version=4) if path.is_file() else None


def _text(book: Any) -> str:
    return f"{nbformat.writes(book).rstrip()}\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _with_outputs(book: Any, executed: Any) -> Any:
    """`book` with what its code showed in `executed`, where that ran the same code, and the hash that says so.

    A cell of the setup that was changed since shows nothing."""
    if executed is None or code_hash(book) != code_hash(executed):
        return book
    shown = [cell for cell in executed.cells if cell.cell_type == "code"]
    for number, (cell, run) in enumerate(zip((c for c in book.cells if c.cell_type == "code"), shown, strict=True)):
        cell.outputs = _joined(run.outputs) if cell.source == run.source else []
        cell.execution_count = number + 1
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number + 1
    book.metadata[STAMP] = {"executed": code_hash(book)}
    return book


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which what was printed in one go is one."""
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def write() -> list[Path]:
    """Write every notebook, with its outputs as long as its code is that which made them; returns those changed."""
    changed = []
    for path, book in _all():
        before = stored(path)
        ran = before is not None and STAMP in before.metadata
        text = _text(_with_outputs(book, before if ran else None))
        if before is None or path.read_text(encoding="utf-8") != text:
            _write(path, text)
            changed.append(path)
    return changed


def differing() -> list[str]:
    """What is wrong with the notebooks as they lie there, one line each; empty where nothing is."""
    wrong, known = [], set()
    for path, book in _all():
        known.add(path)
        name, before = path.relative_to(REPO), stored(path)
        if before is None:
            wrong.append(f"{name} is missing")
        elif [(cell.id, cell.source) for cell in before.cells] != [(cell.id, cell.source) for cell in book.cells]:
            wrong.append(f"{name} is not what its sources make")
        elif before.metadata.get(STAMP, {}).get("executed", code_hash(before)) != code_hash(before):
            wrong.append(f"{name} shows what other code showed: --store {path.parent.name}/{path.stem}")
    left = {path for language in LANGUAGES for path in (GUIDE / language).glob("*.ipynb")} - known
    return wrong + [f"{path.relative_to(REPO)} has no script in examples/" for path in sorted(left)]


def not_run() -> list[str]:
    """The names (`en/03_first_sft`) of the notebooks that show nothing, because their code has changed since."""
    paths = [notebook_path(script, language) for script in chapters() for language in LANGUAGES]
    books = {path: stored(path) for path in paths}
    return [f"{path.parent.name}/{path.stem}" for path, book in books.items() if book and STAMP not in book.metadata]


def _all() -> Iterator[tuple[Path, Any]]:
    for script in chapters():
        for language in LANGUAGES:
            yield notebook_path(script, language), notebook(script, language)


# Running


def execute(wanted: list[str], *, store: bool = False, jobs: int = 1) -> list[str]:
    """Run the notebooks whose name (`en/03_first_sft`) contains one of `wanted`, or all English ones (the others have
    the same code but for words), `jobs` at a time; says seconds of each. With `store`, docs/guide/ gets what they show.

    Returns the names of those in which a cell failed or wrote to stderr (a reader would take a warning for his own
    mistake); says where all of them took longer than ALL_SECONDS. The executed copies, failed ones included, are in
    build/guide/.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a notebook that has a hub of its own says otherwise, for itself
    os.environ.setdefault("MPLCONFIGDIR", str(EXECUTED / "matplotlib"))
    if jobs > 1:  # threads that wait for each other's cores take longer than one thread alone
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    names = [(script, language) for script in chapters() for language in LANGUAGES]
    names = [pair for pair in names if any(part in _name(*pair) for part in wanted or ["en/"])]
    started = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        passed = list(pool.map(lambda pair: _execute(*pair, store=store), names))
    total = time.perf_counter() - started
    print(f"{total:6.1f} s  together")
    if not wanted and total > ALL_SECONDS:
        # No failure: beside other programs the same notebooks take longer.
        print(f"all notebooks took {total:.0f} s, and should take {ALL_SECONDS} s: make them shorter", file=sys.stderr)
    return [_name(*pair) for pair, fine in zip(names, passed, strict=True) if not fine]


def _name(script: Path, language: str) -> str:
    return f"{language}/{script.stem}"


def _execute(script: Path, language: str, *, store: bool) -> bool:
    """Run one notebook; whether nothing was wrong in it."""
    name, started = _name(script, language), time.perf_counter()
    executed, error = _run(notebook(script, language, claims=True))
    print(f"{time.perf_counter() - started:6.1f} s  {name}{'  FAILED' if error else ''}", flush=True)
    copy = EXECUTED / f"{name}.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(executed, copy)
    if error:
        print(error, file=sys.stderr, flush=True)
    elif store:
        executed.cells = [cell for cell in executed.cells if CLAIM not in cell.metadata.get("tags", [])]
        _write(notebook_path(script, language), _text(_with_outputs(notebook(script, language), executed)))
    return not error


def _run(book: Any) -> tuple[Any, str]:
    """Run a notebook top to bottom in an empty folder, as somebody does who has it and no checkout; returns it, and
    what went wrong in it or should not show, or nothing."""
    with tempfile.TemporaryDirectory(prefix="guide-") as folder:
        client = NotebookClient(
            book,
            allow_errors=True,  # so that one run tells of all claims that fail
            on_cell_error=_tell,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # else each kernel warns of TCP, which is on loopback
            resources={"metadata": {"path": folder}},
        )
        client.execute()
        return book, "\n".join([*complaints(book), *paths_shown(book, [folder, str(REPO), str(Path.home())])])


def _tell(cell: Any, cell_index: int, execute_reply: Any) -> None:
    """Say at once what failed: the rest of a notebook may take minutes."""
    content = execute_reply["content"]
    print(f"cell {cell_index}: {content['ename']}: {content['evalue']}\n{cell.source}", file=sys.stderr, flush=True)


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


def paths_shown(book: Any, folders: list[str]) -> list[str]:
    """Where the cells of an executed notebook show one of `folders`, which are of this machine alone."""
    return [
        f"cell {number} shows the folder {folder}: {cell.source.splitlines()[0]} ..."
        for number, cell in enumerate(book.cells)
        for folder in folders
        if folder in json.dumps(cell.get("outputs", []))
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Make, check or run the notebooks of the guide.")
    parser.add_argument("--check", action="store_true", help="exit 1 where a notebook differs from its sources")
    parser.add_argument("--execute", action="store_true", help="run the notebooks")
    parser.add_argument("--store", action="store_true", help="run them, and keep in docs/guide/ what they show")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time, each with its part of the cores")
    parser.add_argument("wanted", nargs="*", help="of those that run: parts of names, such as en/03; none, all of en")
    options = parser.parse_args(arguments)
    try:
        if options.execute or options.store:
            return 1 if execute(options.wanted, store=options.store, jobs=options.jobs) else 0
        if options.check:
            wrong = differing()
            print(
                "\n".join([*wrong, "Run: python -m docs.guide.build"] if wrong else ["The notebooks are up to date."])
            )
            for name in not_run():
                print(f"{name} shows nothing yet. Run: python -m docs.guide.build --store {name}")
            return 1 if wrong else 0
        for path in write():
            print(f"wrote {path.relative_to(REPO)}")
    except GuideError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
