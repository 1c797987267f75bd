"""The guide: its notebooks are what its sources make, both languages run the same code, and nothing hides an error."""

import ast
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.guide import build
from tunesmith.practice.hub_server import hub_server
from tunesmith.practice.hub_state import LFS_SUFFIXES, Blob, Hub, Repo

SCRIPTS = build.chapters()
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
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


def test_execute_fails_where_a_cell_writes_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _chapter(tmp_path, monkeypatch, "你好。\n<!-- cell -->\n再見。")
    script.write_text(
        script.read_text(encoding="utf-8").replace("print(6", "import warnings\nwarnings.warn('old')\nprint(6"),
        encoding="utf-8",
    )
    build.main([])
    capsys.readouterr()
    assert build.main(["--execute", "en/01"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "cell 1 wrote to stderr" in printed.err
    assert "old" in printed.err


def test_execute_says_where_all_take_too_long_and_fails_for_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _chapter(tmp_path, monkeypatch, "你好。\n<!-- cell -->\n再見。")
    monkeypatch.setattr(build, "_run", lambda source, target: "")
    build.main([])
    assert build.main(["--execute"]) == 0
    monkeypatch.setattr(build, "ALL_SECONDS", 0.0)
    assert build.main(["--execute", "en/01"]) == 0
    assert "all notebooks" not in capsys.readouterr().err  # a part of them may take what it takes
    assert build.main(["--execute"]) == 0
    assert "should take 0.0 s: make them shorter" in capsys.readouterr().err


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


# The scripts with HUB = True: small models of the same families under the same names, on a hub of the tests


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
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs_with_models_and_data_of_the_hub(script: Path, hub: Hub, tmp_path: Path) -> None:
    text = script.read_text(encoding="utf-8").replace("\nHUB = False", "\nHUB = True")
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
