"""The guide: its notebooks are what its sources make and show what their code showed, both languages run the same code,
and nothing hides an error."""

import ast
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import tunesmith
from docs.guide import build, words
from tunesmith.init.recipe_text import LEARNING_RATES
from tunesmith.practice.hub_server import hub_server
from tunesmith.practice.hub_state import LFS_SUFFIXES, Blob, Hub, Repo

SCRIPTS = build.chapters()
WITH_HUB = [script for script in SCRIPTS if script.stem != "07_many_processes"]
"""The chapters that take models and data from the hub as well: all but the one that only counts what processes do."""
NOTEBOOKS = [build.notebook_path(script, language) for script in SCRIPTS for language in build.LANGUAGES]
HIDING = {
    r"raises-exception": "a cell may fail unseen",
    r"%%capture|%%script": "a cell's output is hidden",
    r"\|\|\s*true": "a command may fail unseen",
    r"check\s*=\s*False": "a command may fail unseen",
    r"^\s*[!%]": "a magic, which is no Python",
    r"suppress\(": "errors are hidden",
    r"capture_output|DEVNULL|redirect_stderr": "what a command complains about is hidden",
    r"simplefilter|filterwarnings\(.ignore.\)|logging\.disable\(": "all warnings are hidden",
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
            if not _shows(node):
                found.append("except neither prints the error nor raises one")
    return found


def _shows(handler: ast.ExceptHandler) -> bool:
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    if any(isinstance(node, ast.Raise) for node in inside):
        return True
    printed = [node for node in inside if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
    names = {name.id for call in printed for name in ast.walk(call) if isinstance(name, ast.Name)}
    return handler.name is not None and handler.name in names


def test_there_are_chapters() -> None:
    assert [script.stem[:2] for script in SCRIPTS] == [f"{i + 1:02}" for i in range(len(SCRIPTS))]
    assert SCRIPTS


def test_notebooks_are_what_the_sources_make() -> None:
    assert build.differing() == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_both_languages_have_the_same_code_and_as_much_prose(script: Path) -> None:
    english, chinese = (_read(build.notebook_path(script, language)) for language in build.LANGUAGES)
    chinese = [cell for cell in chinese if cell["id"] != "setup-1"]  # which installs a font, for Chinese alone
    assert [cell["cell_type"] for cell in english] == [cell["cell_type"] for cell in chinese]
    assert [cell["id"] for cell in english] == [cell["id"] for cell in chinese]
    for one, other in zip(english, chinese, strict=True):
        if one["cell_type"] == "code":
            assert words.shape(one["source"]) == words.shape(other["source"]), other["source"]
        else:
            assert one["source"] != other["source"], "prose that is the same in both was not translated"


def test_every_word_that_a_learner_reads_in_code_is_translated_and_no_translation_is_left_over() -> None:
    table = words.read_table(build.GUIDE / "zh-TW" / "words.txt")
    codes = [text for script in SCRIPTS for kind, text in build.source_cells(script) if kind == "code"]
    codes.append((build.GUIDE / "setup.py").read_text(encoding="utf-8"))
    assert [text for code in codes for text in words.shown(code) if text not in table] == []
    assert table.keys() - {literal.text for code in codes for literal in words.translatable(code)} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_cell_hides_an_error(path: Path) -> None:
    cells = _read(path)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert _hidden(cell["source"]) == [], cell["source"]


def test_every_notebook_was_run() -> None:
    assert build.not_run() == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_notebook_shows_what_its_code_showed_in_small_pictures_and_without_complaints(path: Path) -> None:
    book = build.stored(path)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert build.complaints(book) == []
    assert build.paths_shown(book, [f"/{folder}/" for folder in ("tmp", "home", "root", "Users")]) == []
    pictures = [
        output.data["image/png"] for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert [len(base64.b64decode(picture)) for picture in pictures if len(picture) * 3 / 4 > 60_000] == []
    plots = sum("plt.show()" in cell.source for cell in code)
    assert len(pictures) == plots


@pytest.mark.parametrize("script", SCRIPTS[:5], ids=lambda script: script.stem)
def test_a_chapter_imports_only_what_is_public(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("tunesmith", "tests", "docs"):
            assert node.module == "tunesmith"
            assert {alias.name for alias in node.names} <= set(tunesmith.__all__)


@pytest.mark.parametrize(
    "page", ["docs/adapters.md", "examples/03_first_sft.py", "docs/guide/zh-TW/03_first_sft.md"], ids=lambda page: page
)
def test_the_rule_of_learning_rates_is_that_of_init(page: str) -> None:
    text = (build.REPO / page).read_text(encoding="utf-8")
    rows = re.findall(r"^(?:# )?\| [^|]+ \| (\de-\d) \| (\de-\d) \|$", text, re.MULTILINE)
    by_method = LEARNING_RATES["adapters"], LEARNING_RATES["all weights"]
    assert rows == list(zip(*by_method, strict=True))


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (OSError, Exception):\n    pass",
        "%%capture\nf()",
        "!ls missing",
        'run("ls missing || true", shell=True)',
        "with suppress(Exception):\n    f()",
        "with suppress(OSError):\n    f()",
        "try:\n    f()\nexcept OSError:\n    pass",
        "try:\n    f()\nexcept OSError as error:\n    print('it did not work')",
        "subprocess.run(command, check=True, capture_output=True)",
        "warnings.simplefilter('ignore')",
        "warnings.filterwarnings('ignore')",
    ],
)
def test_what_hides_an_error_is_found(code: str) -> None:
    assert _hidden(code)


def test_a_named_exception_may_be_shown() -> None:
    assert _hidden("try:\n    f()\nexcept TunesmithError as error:\n    print(error)") == []
    assert _hidden("try:\n    f()\nexcept TunesmithError as error:\n    print(f'refused: {error}')") == []


@pytest.mark.parametrize(
    ("language", "exercises", "learned"),
    [("en", "Try it yourself", "What you have learned"), ("zh-TW", "動手試試看", "本章學到")],
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_chapter_has_exercises_with_solutions_and_ends_with_what_was_learned(
    script: Path, language: str, exercises: str, learned: str
) -> None:
    cells = _read(build.notebook_path(script, language))
    (at,) = [i for i, cell in enumerate(cells) if re.search(rf"^## ({exercises})", cell["source"], re.MULTILINE)]
    posed = [text for cell in cells[at:] for text in re.findall(r"^(?:\*\*)?\d\. ?", cell["source"], re.MULTILINE)]
    assert len(posed) >= 3
    assert sum(cell["cell_type"] == "code" for cell in cells[at:]) >= len(posed)
    assert re.search(rf"^## {learned}", cells[-1]["source"], re.MULTILINE)


@pytest.mark.parametrize("script", WITH_HUB, ids=lambda script: script.stem)
def test_one_variable_switches_to_the_hub(script: Path) -> None:
    switches = re.findall(r"^HUB = .*$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(switches) == 1
    assert switches[0].startswith("HUB = False")


HUB_MODELS = ("facebook/opt-350m", "Qwen/Qwen2-0.5B", "EleutherAI/gpt-neo-125m")
HUB_DATA = ("stanfordnlp/imdb", "trl-lib/Capybara")


@pytest.mark.parametrize("name", [*HUB_MODELS, *HUB_DATA])
def test_some_chapter_takes_it_from_the_hub(name: str) -> None:
    assert any(f'"{name}"' in script.read_text(encoding="utf-8") for script in SCRIPTS)


# The builder

SMALL = """# %% [markdown]
# # Hello.

# %%
print(f"{6 * 7} of them")  # the answer

# %% tags=["claim"]
assert 6 * 7 == 42

# %% [markdown]
# Bye.
"""
WORDS = """f"{6 * 7} of them"
f"{6 * 7} 個"

# the answer
# 答案
"""
CHINESE = "# 你好。\n<!-- cell -->\n再見。"


def _chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chinese: str) -> Path:
    monkeypatch.setattr(build, "REPO", tmp_path)
    monkeypatch.setattr(build, "EXAMPLES", tmp_path / "examples")
    monkeypatch.setattr(build, "GUIDE", tmp_path / "guide")
    monkeypatch.setattr(build, "EXECUTED", tmp_path / "executed")
    script = tmp_path / "examples" / "01_small.py"
    script.parent.mkdir()
    script.write_text(SMALL, encoding="utf-8")
    prose = build.prose_path(script, "zh-TW")
    prose.parent.mkdir(parents=True)
    prose.write_text(chinese, encoding="utf-8")
    prose.with_name("words.txt").write_text(WORDS, encoding="utf-8")
    return script


def test_the_chinese_notebook_has_the_chinese_prose_around_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _chapter(tmp_path, monkeypatch, "# 你好。\n\n<!-- cell -->\n\n再見。\n")
    build.write()
    cells = _read(build.notebook_path(script, "zh-TW"))
    link = "[**在 Colab 開啟這一章**](https://colab.research.google.com/github/tunesmith/tunesmith/blob/main/docs/guide"
    assert [(cell["cell_type"], cell["source"]) for cell in cells] == [
        ("markdown", "# 你好。"),
        ("markdown", f"{link}/zh-TW/01_small.ipynb)"),
        ("code", 'print(f"{6 * 7} 個")  # 答案'),
        ("markdown", "再見。"),
    ]


def test_a_cell_put_in_between_leaves_the_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = _chapter(tmp_path, monkeypatch, "你好。")
    before = [cell.id for cell in build.notebook(script, "en").cells]
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace("# %%\nprint", "# %%\nx = 1\n\n# %%\nprint"), encoding="utf-8")
    after = [cell.id for cell in build.notebook(script, "en").cells]
    assert len(after) == 5
    assert [after[i] for i in (0, 1, 3, 4)] == before


@pytest.mark.parametrize(
    ("chinese", "said"), [("你好。", "has 1 cells .* has 2 markdown"), ("你好。\n<!-- cell -->\n", "cell 2 is empty")]
)
def test_prose_that_lacks_a_cell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chinese: str, said: str
) -> None:
    script = _chapter(tmp_path, monkeypatch, chinese)
    with pytest.raises(build.GuideError, match=said):
        build.notebook(script, "zh-TW")


def test_check_finds_a_changed_an_orphaned_and_a_notebook_that_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _chapter(tmp_path, monkeypatch, CHINESE)
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert capsys.readouterr().out.count("shows nothing yet") == 2
    english = tmp_path / "guide" / "en" / "01_small.ipynb"
    english.write_text(english.read_text(encoding="utf-8").replace("6 * 7", "6 * 8"), encoding="utf-8")
    english.with_name("02_gone.ipynb").write_text("{}", encoding="utf-8")
    assert build.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "01_small.ipynb is not what its sources make" in said
    assert "02_gone.ipynb has no script" in said


def test_what_a_notebook_showed_stays_until_its_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _chapter(tmp_path, monkeypatch, CHINESE)
    english = build.notebook_path(script, "en")
    assert build.main(["--store", "01"]) == 0
    assert build.main(["--check"]) == 0
    chinese = _read(build.notebook_path(script, "zh-TW"))
    assert [cell["outputs"][0]["text"] for cell in chinese if cell["cell_type"] == "code"] == [["42 個\n"]]
    assert "assert" not in english.read_text(encoding="utf-8")  # claims run, and are not shown

    script.write_text(SMALL.replace("Bye", "Farewell").replace("== 42", "> 0"), encoding="utf-8")
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert "42 of them" in english.read_text(encoding="utf-8")

    script.write_text(SMALL.replace("of them", "in all"), encoding="utf-8")
    assert build.main([]) == 0
    assert "42" not in json.dumps([cell.get("outputs") for cell in _read(english)])
    assert build.not_run() == ["en/01_small", "zh-TW/01_small"]
    capsys.readouterr()
    book = build.stored(english)
    book.metadata["tunesmith"] = {"executed": "0"}
    english.write_text(nbformat.writes(book), encoding="utf-8")
    assert build.main(["--check"]) == 1
    assert "en/01_small.ipynb shows what other code showed" in capsys.readouterr().out


def test_a_setup_that_changed_shows_nothing_and_leaves_what_the_chapter_showed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _chapter(tmp_path, monkeypatch, CHINESE)
    setup = build.GUIDE / "setup.py"
    setup.write_text("print(1)\n", encoding="utf-8")
    english = build.notebook_path(script, "en")

    def shown() -> list[list[str]]:
        return [[text for output in cell["outputs"] for text in output["text"]] for cell in _read(english)[2:4]]

    assert build.main(["--store", "en/01"]) == 0
    assert shown() == [["1\n"], ["42 of them\n"]]
    setup.write_text("print(2)\n", encoding="utf-8")
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert shown() == [[], ["42 of them\n"]]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("6 * 7 ==", "6 * 9 ==", "AssertionError"),
        ("print(f", "import warnings\nwarnings.warn('old')\nprint(f", "old"),
        ("print(f", "import os\nprint(os.getcwd())\nprint(f", "shows the folder"),
    ],
    ids=["a claim that does not hold", "a warning", "a folder of this machine"],
)
def test_nothing_is_kept_of_a_run_that_shows_what_it_should_not(
    old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _chapter(tmp_path, monkeypatch, CHINESE)
    script.write_text(SMALL.replace(old, new), encoding="utf-8")
    build.main([])
    before = build.notebook_path(script, "en").read_text(encoding="utf-8")
    assert build.main(["--store", "en/01"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert said in printed.err
    assert build.notebook_path(script, "en").read_text(encoding="utf-8") == before


def test_execute_says_where_all_take_too_long_and_fails_for_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _chapter(tmp_path, monkeypatch, CHINESE)
    monkeypatch.setattr(build, "_run", lambda book: (book, ""))
    build.main([])
    assert build.main(["--execute"]) == 0
    monkeypatch.setattr(build, "ALL_SECONDS", 0.0)
    assert build.main(["--execute", "en/01"]) == 0
    assert "all notebooks" not in capsys.readouterr().err  # a part of them may take what it takes
    assert build.main(["--execute"]) == 0
    assert "should take 0.0 s: make them shorter" in capsys.readouterr().err


# The setup


def _run_setup(monkeypatch: pytest.MonkeyPatch, missing: set[str]) -> list[list[str]]:
    """What the first cell asks of pip where the packages `missing` are missing."""
    asked: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torchao": "0.10.0", "pyarrow": "25.0.0"}[name])
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command[3:]))
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k not in ("numpy", "pandas")})
    exec((build.GUIDE / "setup.py").read_text(encoding="utf-8"), {})
    return asked


def test_the_setup_asks_nothing_of_pip_where_everything_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _run_setup(monkeypatch, set()) == []
    assert capsys.readouterr().out == (
        "No GPU: the processor does the work. In Colab you get one under Runtime, Change runtime type.\n"
    )


@pytest.mark.parametrize(("loaded", "restart"), [("25.0.0", False), ("18.1.0", True)])
def test_the_setup_removes_what_peft_refuses_and_says_so_where_the_session_runs_on_replaced_libraries(
    loaded: str, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyarrow.__version__", loaded)
    if restart:
        with pytest.raises(RuntimeError, match="restart the session"):
            _run_setup(monkeypatch, {"tunesmith"})
        return
    quietly = ["--quiet", "--disable-pip-version-check"]
    assert _run_setup(monkeypatch, {"tunesmith"}) == [
        ["install", *quietly, "tunesmith[quant] @ git+https://github.com/tunesmith/tunesmith"],
        ["uninstall", "--yes", *quietly, "torchao"],
    ]


# Words


def test_words_change_where_they_are_read_and_nowhere_else() -> None:
    code = 'axis.set(ylabel="loss")\nlog = {"loss": 1, "all of it": 2}  # the loss\nprint(f"{log[\'loss\']} of all")'
    table = {
        '"loss"': '"損失"',
        '"all of it"': '"全部"',
        "# the loss": "# 損失",
        "f\"{log['loss']} of all\"": "f\"全部的 {log['loss']}\"",
    }
    chinese = words.localized(code, table)
    assert chinese == (
        'axis.set(ylabel="損失")\nlog = {"loss": 1, "全部": 2}  # 損失\nprint(f"全部的 {log[\'loss\']}")'
    )
    assert words.shape(chinese) == words.shape(code)
    assert words.shown(code) == ['"loss"', "# the loss", "f\"{log['loss']} of all\""]
    assert words.shown('print("name", f"{x:.1f} MB", f"step {x}")') == ['f"step {x}"']


@pytest.mark.parametrize("other", ['print(f"{a} {c}")', 'print(f"{a}")', 'print(f"{a} {b}", 1)'])
def test_code_that_does_something_else_has_another_shape(other: str) -> None:
    assert words.shape('print(f"{b:9} of {a}")') == words.shape('print(f"{a} 裡有 {b}")')
    assert words.shape('print(f"{b} of {a}")') != words.shape(other)


def test_a_table_that_lost_a_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text('"a"\n"b"\n\n"c"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="expected a text and its translation, found 1 lines"):
        words.read_table(tmp_path / "words.txt")


# The scripts with HUB = True: small models of the same families under the same names, on a hub of the tests.
# `make guide` runs the same code with HUB = False, as notebooks.


def _tokenizer(name: str) -> Any:
    """The demo model's, with the special tokens of the one that is published as `name`."""
    from tokenizers.processors import TemplateProcessing

    from tunesmith.model.load import load_tokenizer

    tokenizer: Any = load_tokenizer("demo")
    tokenizer.eos_token = "<|endoftext|>"
    if name.startswith("Qwen"):  # its end token is not the one that ends a turn
        tokenizer.pad_token = "<|endoftext|>"
        return tokenizer
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.bos_token = "<|endoftext|>"
    if name.startswith("facebook"):
        tokenizer.pad_token = "<repo_name>"
        end = ("<|endoftext|>", tokenizer.eos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # a text begins with the end token
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[end]
        )
    return tokenizer


def _publish(hub: Hub, name: str, folder: Path) -> None:
    """A small random model, as the model of that name is published: OPT's weights are no safetensors."""
    import torch

    from tests.models import tiny

    tokenizer = _tokenizer(name)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    family = {"facebook": "opt", "Qwen": "qwen2", "EleutherAI": "gpt_neo"}[name.split("/")[0]]
    full = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False} if family == "qwen2" else {}
    model = tiny(family, vocab_size=len(tokenizer), max_position_embeddings=2048, **ids, **full)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if family == "opt":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    blobs = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        in_lfs = path.suffix in LFS_SUFFIXES
        blobs[path.name] = Blob(content, hashlib.sha256(content).hexdigest() if in_lfs else None)
    hub.repos[name] = Repo(private=False, branches={})
    hub.repos[name].commit("main", "the model", blobs)


def _write_data(folder: Path) -> dict[str, str]:
    """Folders with few rows that have the columns of the data sets on the hub; by the names there."""
    from datasets import Dataset

    dice, words = random.Random(0), ["a", "film", "of", "great", "charm", "and", "little", "sense"]

    def text(count: int) -> str:
        return " ".join(dice.choices(words, k=count))

    reviews = [{"text": text(dice.randint(20, 90)), "label": i % 2} for i in range(40)]
    turns = [("user", 30), ("assistant", 40), ("user", 10), ("assistant", 20)]
    talks = [
        {
            "source": "Airoboros",
            "messages": [{"content": text(count), "role": role} for role, count in turns],
            "num_turns": 2,
        }
        for _ in range(80)
    ]
    for name, rows in zip(HUB_DATA, (reviews, talks), strict=True):
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    return {f'"{name}"': repr(str(folder / name)) for name in HUB_DATA}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub_server(token="hf_only_for_this_test", owners=("your-name",)) as server:
        for name in HUB_MODELS:
            _publish(server, name, tmp_path_factory.mktemp("model"))
        yield server


@pytest.mark.documented
@pytest.mark.slow
@pytest.mark.parametrize("script", WITH_HUB, ids=lambda script: script.stem)
def test_script_runs_with_models_and_data_of_the_hub(script: Path, hub: Hub, tmp_path: Path) -> None:
    text = script.read_text(encoding="utf-8").replace("\nHUB = False", "\nHUB = True")
    # `make guide` draws the pages of these runs.
    text = f"from tunesmith.trainers import Published\n\nPublished.draw_page = None\n{text}"
    for name, local in _write_data(tmp_path / "data").items():
        text = text.replace(name, local)
    copy = tmp_path / script.name
    copy.write_text(text, encoding="utf-8")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
    environment |= {"TUNESMITH_HOME": str(tmp_path / "home")}
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, str(copy)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in HUB_MODELS:
        assert (f'"{name}"' in text) == any(f"/{name}/" in request for request in hub.requests), name
