"""The schema of recipes takes the recipes that run, and marks what the commands refuse."""

from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import REPO
from tunesmith.settings.schema import recipe_schema

RECIPES = sorted((REPO / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_runs_fits(validator: Any, recipe: Any) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert [error.message for error in validator.iter_errors(values)] == []


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("max_lenght: 5", None),
        ("max_length: many", "max_length"),
        ("learning_rate: fast", "learning_rate"),
        ("quantize: 3bit", "quantize"),
        ("packing: 7", "packing"),
        ("trainer: dop", "trainer"),
        ("per_device_train_batch_size: 1.5", "per_device_train_batch_size"),
    ],
)
def test_what_the_commands_refuse_is_marked(validator: Any, line: str, key: str | None) -> None:
    (error,) = validator.iter_errors(yaml.safe_load(line))
    assert (error.path[0] if error.path else None) == key


def test_help_and_default_of_a_setting_are_shown() -> None:
    shown = recipe_schema()["properties"]["max_length"]
    assert shown["default"] == 1024
    assert "tokens" in shown["description"]
    assert "beta" in recipe_schema()["properties"]  # of a trainer other than the first
