"""Every private name of other libraries that the source uses is listed, is there, and is missed by name."""

import ast
import re
from pathlib import Path

import pytest
import transformers

from tunesmith.errors import TunesmithError
from tunesmith.train import hooks
from tunesmith.train.hooks import ATTRIBUTES, HOOKS, OPTIONAL, Name
from tunesmith.train.trainer import BaseTrainer

SOURCE = Path(hooks.__file__).parents[1]
NOT_PRIVATE = {"_tag_names", "_replace", "_exit"}
"""What `transformers` asks trainers to set, and documented functions of named tuples and of `os`."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def of_ourselves(trees: list[ast.Module]) -> set[str]:
    """Private names that our own code defines: functions, classes, fields, and attributes that objects set on
    themselves."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def used_of_others() -> dict[str, str]:
    """Private names that the source takes from other libraries, each with a place."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    own = of_ourselves(list(trees.values())) - {item.name for item in (*HOOKS, *ATTRIBUTES)}
    uses: dict[str, str] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("tunesmith"):
                inside = any(private(part) for part in (node.module or "").split("."))
                names = [alias.name for alias in node.names if inside or private(alias.name)]
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
            ):
                asked = node.args[1] if len(node.args) > 1 else None
                if isinstance(asked, ast.Constant) and private(str(asked.value)):
                    names = [str(asked.value)]
            uses |= {name: f"{path.relative_to(SOURCE)}:{node.lineno}" for name in names}  # type: ignore[attr-defined]
    return uses


def test_every_private_name_that_the_source_uses_is_listed_with_its_reason() -> None:
    listed = {item.name for item in (*HOOKS, *ATTRIBUTES)} | OPTIONAL.keys() | NOT_PRIVATE
    missing = {name: place for name, place in used_of_others().items() if name not in listed}
    assert not missing, f"list these in train/hooks.py: {missing}"


def test_everything_that_is_listed_is_used() -> None:
    """A name that nothing uses any more would keep a new version of a library out for nothing."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path.name != "hooks.py")
    words = set(re.findall(r"\w+", text))
    unused = [name for name in (*(item.name for item in (*HOOKS, *ATTRIBUTES)), *OPTIONAL) if name not in words]
    assert unused == ["add_hook_to_module"]  # which sets the name that is used


def test_every_hook_that_the_trainer_overrides_is_checked() -> None:
    theirs = set(dir(transformers.Trainer))
    overridden = {
        name
        for kind in BaseTrainer.__mro__
        if kind.__module__.startswith("tunesmith")
        for name in vars(kind)
        if name in theirs and not name.startswith("__")
    }
    listed = {item.name for item in (*HOOKS, *ATTRIBUTES)}
    assert overridden <= listed | NOT_PRIVATE, f"list these in train/hooks.py: {overridden - listed}"


def test_the_installed_versions_have_all_of_it() -> None:
    hooks.check(training=False)


def test_what_only_a_plan_or_a_view_needs_stops_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Name(owner="rich.live.Live", name="_gone", why="the view", training=False)
    monkeypatch.setattr(hooks, "ATTRIBUTES", (*ATTRIBUTES, gone))
    hooks.check()
    with pytest.raises(TunesmithError, match=r"rich.live.Live has no _gone \(the view\)"):
        hooks.check(training=False)


@pytest.mark.parametrize("name", ["_get_grad_norm", "_get_num_items_in_batch", "training_step"])
def test_a_hook_that_is_gone_stops_the_import_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(TunesmithError, match=rf"does not fit transformers .*\n.*transformers.Trainer has no {name} \("):
        hooks.check()


def test_a_parameter_that_is_gone_stops_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def _get_grad_norm(self: object, module: object) -> None: ...

    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", _get_grad_norm)
    with pytest.raises(
        TunesmithError, match=r"transformers.Trainer._get_grad_norm takes no model, grad_norm \(the guard"
    ):
        hooks.check()


def test_an_attribute_that_instances_get_counts_as_there() -> None:
    assert Name(owner="transformers.Trainer", name="_tr_loss", why="").problem() == ""
    assert (
        Name(owner="transformers.Trainer", name="_nothing", why="").problem() == "transformers.Trainer has no _nothing"
    )
    assert Name(owner="transformers.nowhere", name="x", why="").problem() == "there is no transformers.nowhere"
