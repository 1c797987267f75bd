"""The imports of src/tunesmith go down the layers only, and what reads and shows rows stays free of torch."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src"

# From the ground up. A place may import from itself and from those before it.
LAYERS = (
    *("base", "settings", "terminal", "data", "runs", "model", "objectives", "train", "ship", "report"),
    *("trainers", "evaluate", "plan", "doctor", "init", "demo", "serve", "practice", "board", "cli", "integrations"),
)
# The modules directly in src/tunesmith, and the place each belongs to.
BASE = ("errors", "types", "text", "home", "secrets")
TOP_LEVEL = dict.fromkeys(BASE, "base") | {"trainers": "trainers", "__main__": "cli"}
HEIGHT = {place: height for height, place in enumerate(LAYERS)}

# Importing one of these (a folder stands for all its modules) must load none of HEAVY.
TORCH_FREE = (
    *("errors", "types", "text", "home", "secrets", "terminal", "report", "init", "doctor", "cli"),
    *("settings.coerce", "settings.helps", "settings.recipe", "demo.orders", "evaluate", "practice"),
    *("data.read", "data.formats", "data.chat", "data.sandbox", "data.pack", "data.mixture", "data.cache"),
    "data.preflight",
)
HEAVY = ("accelerate", "bitsandbytes", "peft", "torch", "transformers")

# The package root itself: its names are public, and inside the package only the version is taken from it.
ROOT = "tunesmith"


@dataclass(frozen=True, kw_only=True)
class Import:
    """`module` is the full dotted name that `importer` imports; `eager` when it happens as `importer` is imported."""

    importer: str
    module: str
    line: int
    eager: bool

    def __str__(self) -> str:
        return f"{path_of(self.importer).relative_to(REPO)}:{self.line} imports {self.module}"


def module_name(path: Path) -> str:
    """`src/tunesmith/data/read.py` -> `tunesmith.data.read`; a package's `__init__.py` has the package's name."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((SRC / ROOT).rglob("*.py"))}


def path_of(module: str) -> Path:
    return MODULES[module]


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def import_statements(node: ast.AST, eager: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below `node`, and whether it runs as the module is imported: no function's, none for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, eager
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                yield from import_statements(ast.Module([statement], []), eager=False)
            for statement in child.orelse:
                yield from import_statements(ast.Module([statement], []), eager)
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_statements(child, eager and not in_function)


def imported_names(statement: ast.Import | ast.ImportFrom, importer: str) -> list[str]:
    """The full names a statement imports. `from tunesmith.data import read` names the module `tunesmith.data.read`;
    `from tunesmith import __version__` stays `tunesmith.__version__`, for it is no module."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        package = importer if path_of(importer).name == "__init__.py" else importer.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - statement.level + 1]
        base = ".".join([*above, *([base] if base else [])])
    full = [f"{base}.{alias.name}" for alias in statement.names]
    return [name if name in MODULES or base == ROOT else base for name in full]


@cache
def imports_of(importer: str) -> tuple[Import, ...]:
    path = path_of(importer)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return tuple(
        Import(importer=importer, module=name, line=statement.lineno, eager=eager)
        for statement, eager in import_statements(tree)
        for name in dict.fromkeys(imported_names(statement, importer))
    )


def all_imports() -> Iterator[Import]:
    for module in MODULES:
        yield from imports_of(module)


def is_ours(module: str) -> bool:
    return module == ROOT or module.startswith(f"{ROOT}.")


def place_of(module: str) -> str | None:
    """`tunesmith.data.read` -> `data`, `tunesmith.errors` -> `base`, and None for what no layer holds."""
    name = module.split(".")[1]
    return TOP_LEVEL.get(name, name if name in HEIGHT and name != "base" else None)


def may_import(importer: str, imported: str) -> bool:
    return importer == imported or HEIGHT[imported] < HEIGHT[importer]


def is_torch_free(module: str) -> bool:
    """Whether `module` is one that must not load torch: listed itself, or in a folder that is listed."""
    return any(f"{module}.".startswith(f"{ROOT}.{name}.") for name in TORCH_FREE)


def with_parents(module: str) -> list[str]:
    """Importing `a.b.c` runs `a` and `a.b` first."""
    parts = module.split(".")
    return [".".join(parts[:size]) for size in range(1, len(parts) + 1)]


def way_to_heavy(module: str) -> list[Import] | None:
    """The chain of eager imports by which importing `module` loads one of HEAVY, or None when there is none."""
    ways: dict[str, list[Import]] = {name: [] for name in with_parents(module)}
    queue = list(ways)
    while queue:
        current = queue.pop(0)
        for found in imports_of(current) if current in MODULES else ():
            if not found.eager:
                continue
            way = [*ways[current], found]
            if found.module.split(".")[0] in HEAVY:
                return way
            new = [name for name in with_parents(found.module) if name in MODULES and name not in ways]
            ways.update(dict.fromkeys(new, way))
            queue.extend(new)
    return None


def test_every_module_belongs_to_a_layer() -> None:
    homeless = [str(path_of(name).relative_to(REPO)) for name in MODULES if name != ROOT and place_of(name) is None]
    assert not homeless, f"these are in no layer; move them, or give them a place in LAYERS or TOP_LEVEL: {homeless}"


def test_imports_go_down_the_layers_only() -> None:
    wrong = []
    for found in all_imports():
        if found.importer == ROOT or not is_ours(found.module) or found.module.startswith(f"{ROOT}.__"):
            continue
        if found.module == ROOT or (place_of(found.module) is None and found.module not in MODULES):
            wrong.append(f"{found}: take it from the module that defines it, not from the package root")
            continue
        importer, imported = place_of(found.importer), place_of(found.module)
        if importer and imported and not may_import(importer, imported):
            below = [place for place in HEIGHT if may_import(importer, place)]
            wrong.append(f"{found}: `{importer}` may import from {', '.join(below)} only")
    assert not wrong, "\n".join(["imports against the layers:", *wrong])


@pytest.mark.parametrize("module", [name for name in MODULES if is_torch_free(name)])
def test_no_chain_of_module_level_imports_leads_to_torch(module: str) -> None:
    way = way_to_heavy(module)
    assert way is None, "\n  ".join([f"importing {module} must load none of {', '.join(HEAVY)}, but:", *map(str, way)])


def test_importing_the_torch_free_modules_leaves_torch_unloaded() -> None:
    """The same in a real interpreter, so that what a library loads on its own is seen too."""
    modules = [name for name in MODULES if is_torch_free(name)]
    program = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    if loaded:
        sys.exit(f"importing {{module}} loads {{', '.join(loaded)}}")
"""
    child = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_every_library_that_the_source_imports_is_a_declared_dependency() -> None:
    """Not one that happens to be there because another library needs it."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in ("quant", "ray", "rewards", "serve"):
        wanted += project["optional-dependencies"][extra]
    declared = {normal(re.split(r"[>\[]", requirement)[0]) for requirement in wanted}
    distributions = packages_distributions()
    missing = []
    for found in all_imports():
        library = found.module.split(".")[0]
        if is_ours(found.module) or library in sys.stdlib_module_names or library == "__future__":
            continue
        if not {normal(name) for name in distributions.get(library, [library])} & declared:
            missing.append(f"{found}, which pyproject.toml does not list")
    assert not missing, "\n".join(["undeclared libraries:", *missing])


def normal(name: str) -> str:
    """A distribution's name as the packaging standard compares it."""
    return name.strip().lower().replace("_", "-")
