"""Every snippet of the pages does what the page says: Python and commands run, recipes and rows parse."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments
from typer.testing import CliRunner

from tests import shell_lines
from tests.conftest import REPO
from tests.transcript import stable
from tests.trl_fields import ADDED, CHANGED, VERSION
from tunesmith.cli.main import app
from tunesmith.data.formats import FormatOptions, detect, parse
from tunesmith.demo import orders
from tunesmith.settings.config import SFTConfig
from tunesmith.settings.recipe import resolve

DOCS = REPO / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHINESE = sorted(page.name for page in DOCS.glob("*.zh-TW.md"))
ELSEWHERE = ("first-session.md", "README.zh-TW.md", *CHINESE)
"""Pages with a test of their own: a transcript, and those whose snippets are those of another page."""
PAGES = sorted(
    str(page.relative_to(REPO))
    for folder in (REPO, DOCS, REPO / "recipes")
    for page in folder.glob("*.md")
    if page.name not in ELSEWHERE
)
WAITS = ("serve",)
"""Commands that end when somebody ends them."""


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name, and folders of the names on the hub, which come first."""
    chat = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(8)
    ]
    questions = [{"question": f"What is {n} + 1?", "answer": f" {n + 1}"} for n in range(8)]
    test = [{"prompt": row["question"], "completion": row["answer"]} for row in questions[:2]]
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes, indeed", "No")]
    pairs = [{"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": answers[1]} for row in chat]
    judged = [{"messages": row["messages"][:1] + answers[n % 2], "label": n % 2 == 1} for n, row in enumerate(chat)]
    capybara = [{"source": "test", "num_turns": 1, **row} for row in chat]
    files: dict[str, list[dict[str, Any]]] = {"chat": chat, "rows": chat, "questions": questions, "test": test}
    files |= {"pairs": pairs, "judged": judged}
    for name, rows in (files | {"trl-lib/Capybara/train": capybara}).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines, encoding="utf-8")
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2-0.5B").symlink_to(tiny_model)
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _snippets(page: str) -> list[tuple[str, str]]:
    text = (REPO / page).read_text(encoding="utf-8")
    found = FENCE.findall(text)
    assert 2 * len(found) == len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)), f"{page}: a fence of another form"
    return found


def _python(text: str, name: str) -> None:
    exec(compile(text, name, "exec"), {"__name__": name})


def _console(text: str, name: str) -> None:
    for line in text.splitlines():
        if line.startswith("$ "):
            command, *arguments = shlex.split(line[2:], comments=True)
            if command != "tunesmith" or arguments[0] in WAITS:
                shell_lines.check(line[2:])
                continue
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{name}: {line}\n{result.output}"


def _shell(text: str, name: str) -> None:
    for line in filter(None, text.splitlines()):
        shell_lines.check(line)


def _demo(text: str, name: str) -> None:
    """What `make demo` prints is what is shown, in the same order; here of a few e-mails."""
    few, fewer = orders.training_rows()[:18], orders.held_out_rows()[:2]  # 9 steps, of which the last is logged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "training_rows", lambda seed: few)
        patch.setattr(orders, "held_out_rows", lambda seed: fewer)
        result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, f"{name}: {result.output}"
    shown, printed = (
        [re.sub(r"\d[\d,.]*\d|\d", "#", line) for line in stable(lines)]
        for lines in (re.sub(r"^\.\.\.\n", "", text, flags=re.MULTILINE), result.output)
    )
    rest = iter(printed)
    assert [line for line in shown if line not in rest] == [], f"{name}: {result.output}"


def _yaml(text: str, name: str) -> None:
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    resolve("recipe.yaml", {})


def _json(text: str, name: str) -> None:
    for line in text.splitlines():
        row, options = json.loads(line), FormatOptions()
        parse(row, detect(row, options), options)


RUN: dict[str, Callable[[str, str], None]] = {
    "python": _python,
    "console": _console,
    "sh": _shell,
    "text": _demo,
    "yaml": _yaml,
    "json": _json,
}


@pytest.mark.documented
@pytest.mark.timeout(900)  # the page of commands trains, merges and exports
@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_of_the_page_works_in_the_order_of_the_page(page: str, folder: Path) -> None:
    for number, (kind, text) in enumerate(_snippets(page), start=1):
        RUN[kind](text, f"{page}, snippet {number}")


def test_the_page_about_trl_has_every_field_of_both_and_each_default_that_differs() -> None:
    assert f"TRL {VERSION.rpartition('.')[0]} adds" in (DOCS / "trl.md").read_text(encoding="utf-8")
    first, differing, second, *_ = (_named(table) for table in _tables("trl.md"))
    ours = {field.name: field.default for field in fields(SFTConfig)}
    assert first == list(ADDED)
    added = ours.keys() - {field.name for field in fields(TrainingArguments)}
    assert second == [name for name in ours if name in added - ADDED.keys()]
    theirs = ADDED | CHANGED
    # Of `bf16` both have None, of which each makes another thing.
    assert set(differing) == {name for name in theirs if theirs[name] != ours[name]} | {"bf16"}


def _tables(page: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)


def _named(table: str) -> list[str]:
    """What the first column of a table has in code."""
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_the_page_about_the_architecture_names_files_and_functions_that_are_there() -> None:
    page, source = (DOCS / "architecture.md").read_text(encoding="utf-8"), REPO / "src" / "tunesmith"
    files = set(re.findall(r"(?<![\w/])[a-z]+/\w+\.py", page))
    assert len(files) > 20
    assert [name for name in files if not ((source / name).is_file() or (REPO / name).is_file())] == []
    for file, rest in re.findall(r"([a-z]+/\w+\.py) +(.*)", page.partition("## A step")[2].partition("## A second")[0]):
        for name in re.findall(r"[A-Z]\w*\.\w+|[a-z]+_\w+|[A-Z][a-z]+[A-Z]\w+", rest):
            own = name.rpartition(".")[2]
            assert re.search(rf"(?:def|class) {own}\b", (source / file).read_text(encoding="utf-8")), f"{file}: {name}"


def test_both_languages_of_the_readme_have_the_same_sections_commands_and_figures() -> None:
    english, chinese = ((REPO / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-TW.md"))
    for text in (english, chinese):
        assert text.startswith("# tunesmith\n")
    assert len(re.findall("^## ", english, re.MULTILINE)) == len(re.findall("^## ", chinese, re.MULTILINE))
    assert FENCE.findall(english) == FENCE.findall(chinese)
    measured = [_figures(text) for text in (english, chinese)]
    assert measured[0] == measured[1]


def _figures(readme: str) -> list[list[str]]:
    """The numbers of the table of speeds."""
    rows = re.findall(r"^\| (?:LoRA|full|完整微調).*$", readme, re.MULTILINE)
    return [re.findall(r"[\d,.]*\d", row) for row in rows]


@pytest.mark.parametrize("name", CHINESE)
def test_a_page_in_chinese_has_the_code_headings_and_tables_of_the_english_one(name: str) -> None:
    english, chinese = ((DOCS / page).read_text(encoding="utf-8") for page in (name.replace(".zh-TW", ""), name))
    assert CODE.findall(english) == CODE.findall(chinese)
    prose = [CODE.sub("", text) for text in (english, chinese)]
    levels, rows = ([re.findall(form, text, re.MULTILINE) for text in prose] for form in (r"^#+(?= )", r"^\|(?=.)"))
    assert levels[0] == levels[1]
    assert rows[0] == rows[1]
    messages, styles = ([re.findall(form, text, re.DOTALL) for text in prose] for form in (r"\n### (`.+?`)\n", STYLES))
    assert messages[0] == messages[1]
    assert styles[0] == styles[1]
    links = [sorted(re.findall(r"\]\(([^)#]+)", text)) for text in prose]
    assert links[0] == sorted(link.replace(".zh-TW.md", ".md").replace("/zh-TW/", "/en/") for link in links[1])


STYLES = "<!-- styles -->.*<!-- end -->"
CODE = re.compile(r"^```\w*\n.*?^```$|(?:^ {4}[^\n]*\n)+", re.MULTILINE | re.DOTALL)
"""Blocks of code, fenced or indented."""


def test_both_languages_of_the_site_list_the_same_pages_and_all_notebooks_of_their_own() -> None:
    site = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))
    plugin = next(item["i18n"] for item in site["plugins"] if "i18n" in item)
    english, chinese = _leaves(site["nav"]), _leaves(plugin["languages"][1]["nav"])
    assert chinese == [page.replace("guide/en/", "guide/zh-TW/") for page in english]
    notebooks = [str(path.relative_to(DOCS)) for path in sorted((DOCS / "guide" / "en").glob("*.ipynb"))]
    assert [page for page in english if page.endswith(".ipynb")] == notebooks


def _leaves(entries: list[dict[str, Any]]) -> list[str]:
    """The pages of a navigation, in its order."""
    items = [item for entry in entries for item in entry.values()]
    return [page for item in items for page in (_leaves(item) if isinstance(item, list) else [item])]


def test_the_messages_on_the_page_about_troubleshooting_are_those_of_tunesmith() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`\n\n(From )?", page, re.MULTILINE)
    ours = [message for message, elsewhere in quoted if not elsewhere]
    assert len(ours) >= 30
    texts = "\n".join(text for file in (REPO / "src").rglob("*.py") for text in _texts(file))
    missing = [message for message in ours if not re.search(".*".join(map(re.escape, message.split("..."))), texts)]
    assert missing == []


def _texts(file: Path) -> Iterator[str]:
    """The strings of a module, each on one line. A field of an f-string is a blank."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        pieces = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if any(isinstance(piece, str) for piece in pieces):
            yield "".join(piece if isinstance(piece, str) else " " for piece in pieces).replace("\n", " ")
