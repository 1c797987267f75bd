"""Nobody runs the benchmarks every day, so what they take from tunesmith and from each other is looked for here."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


def imported(script: Path) -> Iterator[tuple[str, str]]:
    """The module and the name of each `from tunesmith... import name` and `from another_benchmark import name`, and of
    each `another_benchmark.name` after its import, wherever in the script."""
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    siblings = {path.stem for path in SCRIPTS}
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & siblings
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module in siblings:
                yield from ((f"benchmarks.{node.module}", alias.name) for alias in node.names)
            elif node.module.split(".")[0] == "tunesmith":
                yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in whole:
            yield f"benchmarks.{node.value.id}", node.attr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    missing = [f"{module}.{name}" for module, name in imported(script) if not _is_there(module, name)]
    assert not missing


def _is_there(module: str, name: str) -> bool:
    found = import_module(module)
    if hasattr(found, name):
        return True
    try:
        import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    script = tmp_path / "some.py"
    lines = "from train import gone", "from tunesmith import SFTConfig", "import roofline", "roofline.lost(1)"
    script.write_text("\n".join(lines))
    assert [name for module, name in imported(script) if not _is_there(module, name)] == ["gone", "lost"]
