"""The guide: its notebooks are what its sources make, both languages run the same code, and nothing hides an error."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.guide import build

SCRIPTS = build.chapters()
NOTEBOOKS = [build.notebook_path(script, language) for script in SCRIPTS for language in build.LANGUAGES]
HIDING = {
    r"raises-exception": "a cell may fail unseen",
    r"%%capture|%%script": "a cell's output is hidden",
    r"\|\|\s*true": "a command may fail unseen",
    r"check\s*=\s*False": "a command may fail unseen",
    r"^\s*[!%]": "a magic, which is no Python",
    r"suppress\(\s*(Base)?Exception": "every error is hidden",
}


def _read(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def _hidden(code: str) -> list[str]:
    """What in `code` could keep an error from being seen."""
    found = [why for pattern, why in HIDING.items() if re.search(pattern, code, re.MULTILINE)]
    for node in ast.walk(ast.parse(code) if "a magic, which is no Python" not in found else ast.Module([], [])):
        if isinstance(node, ast.ExceptHandler):
            kinds = [] if node.type is None else [ast.unparse(node.type)]
            if not kinds or {"Exception", "BaseException"} & set(re.findall(r"\w+", kinds[0])):
                found.append("except catches every error")
    return found


def test_there_are_chapters() -> None:
    assert [script.stem[:2] for script in SCRIPTS] == [f"{i + 1:02}" for i in range(len(SCRIPTS))]
    assert SCRIPTS


def test_notebooks_are_what_the_sources_make() -> None:
    assert build.differing() == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_both_languages_have_the_same_code_and_as_much_prose(script: Path) -> None:
    english, chinese = (_read(build.notebook_path(script, language)) for language in build.LANGUAGES)
    assert [cell["cell_type"] for cell in english] == [cell["cell_type"] for cell in chinese]
    assert [cell["id"] for cell in english] == [cell["id"] for cell in chinese]
    for one, other in zip(english, chinese, strict=True):
        same = one["source"] == other["source"]
        # Prose that is the same in both was not translated.
        assert same == (one["cell_type"] == "code"), other["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_cell_hides_an_error_or_keeps_an_output(path: Path) -> None:
    cells = _read(path)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert _hidden(cell["source"]) == [], cell["source"]


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (OSError, Exception):\n    pass",
        "%%capture\nf()",
        "!ls missing",
        'run("ls missing || true", shell=True)',
        "with suppress(Exception):\n    f()",
    ],
)
def test_what_hides_an_error_is_found(code: str) -> None:
    assert _hidden(code)


def test_a_named_exception_may_be_shown() -> None:
    assert _hidden("try:\n    f()\nexcept TunesmithError as error:\n    print(error)") == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_one_variable_switches_to_the_hub(script: Path) -> None:
    switches = re.findall(r"^HUB = .*$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(switches) == 1
    assert switches[0].startswith("HUB = False")


# The builder


def _chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chinese: str) -> Path:
    monkeypatch.setattr(build, "REPO", tmp_path)
    monkeypatch.setattr(build, "EXAMPLES", tmp_path / "examples")
    monkeypatch.setattr(build, "GUIDE", tmp_path / "guide")
    monkeypatch.setattr(build, "EXECUTED", tmp_path / "executed")
    script = tmp_path / "examples" / "01_small.py"
    script.parent.mkdir()
    script.write_text("# %% [markdown]\n# Hello.\n\n# %%\nprint(6 * 7)\n\n# %% [markdown]\n# Bye.\n", encoding="utf-8")
    prose = build.prose_path(script, "zh-TW")
    prose.parent.mkdir(parents=True)
    prose.write_text(chinese, encoding="utf-8")
    return script


def test_the_chinese_notebook_has_the_chinese_prose_around_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _chapter(tmp_path, monkeypatch, "你好。\n\n<!-- cell -->\n\n再見。\n")
    build.write()
    cells = _read(build.notebook_path(script, "zh-TW"))
    assert [(cell["cell_type"], cell["source"]) for cell in cells] == [
        ("markdown", "你好。"),
        ("code", "print(6 * 7)"),
        ("markdown", "再見。"),
    ]


def test_a_cell_put_in_between_leaves_the_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = _chapter(tmp_path, monkeypatch, "你好。")
    before = [cell["id"] for cell in json.loads(build.notebook(script, "en"))["cells"]]
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace("# %%\nprint", "# %%\nx = 1\n\n# %%\nprint"), encoding="utf-8")
    after = [cell["id"] for cell in json.loads(build.notebook(script, "en"))["cells"]]
    assert len(after) == 4
    assert [after[i] for i in (0, 2, 3)] == before


@pytest.mark.parametrize(
    ("chinese", "said"), [("你好。", "has 1 cells .* has 2 markdown"), ("你好。\n<!-- cell -->\n", "cell 2 is empty")]
)
def test_prose_that_lacks_a_cell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chinese: str, said: str
) -> None:
    script = _chapter(tmp_path, monkeypatch, chinese)
    with pytest.raises(build.GuideError, match=said):
        build.notebook(script, "zh-TW")


def test_check_finds_a_changed_and_an_orphaned_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _chapter(tmp_path, monkeypatch, "你好。\n<!-- cell -->\n再見。")
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    english = build.notebook_path(script, "en")
    english.write_text(english.read_text(encoding="utf-8").replace("6 * 7", "6 * 8"), encoding="utf-8")
    english.with_name("02_gone.ipynb").write_text("{}", encoding="utf-8")
    capsys.readouterr()
    assert build.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "01_small.ipynb is not what its sources make" in said
    assert "02_gone.ipynb has no script" in said


def test_execute_runs_the_cells_and_fails_on_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _chapter(tmp_path, monkeypatch, "你好。\n<!-- cell -->\n再見。")
    build.main([])
    assert build.main(["--execute", "en/01"]) == 0
    assert "42" in (tmp_path / "executed" / "en" / "01_small.ipynb").read_text(encoding="utf-8")
    script.write_text(script.read_text(encoding="utf-8").replace("6 * 7", "1 / 0"), encoding="utf-8")
    build.main([])
    capsys.readouterr()
    assert build.main(["--execute", "en/01"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "ZeroDivisionError" in printed.err


# The scripts, for real


@pytest.mark.documented
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs(script: Path, tmp_path: Path) -> None:
    # In the checkout, as the README says: chapters find their files from there, and write into runs/.
    environment = os.environ | {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=build.REPO, env=environment, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout
