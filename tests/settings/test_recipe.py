"""A recipe is checked as a whole before anything is loaded, and every mistake in it is named with its line."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from tunesmith.errors import TunesmithError
from tunesmith.settings.helps import HELPS
from tunesmith.settings.recipe import all_settings, parse_options, resolve

NEEDED = {"model": "demo", "data": "rows.jsonl", "output": "runs/x"}


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def with_needed(text: str) -> str:
    return f"model: demo\ndata: rows.jsonl\noutput: runs/x\n{text}"


def test_a_recipe_becomes_a_config_with_the_types_of_its_fields(tmp_path: Path) -> None:
    text = with_needed(
        "learning_rate: 2e-5\nmax_length: none\nsave_strategy: no\npacking: off\ncolumns: {text: body}\n"
    )
    recipe = resolve(written(tmp_path, text), {})
    assert (recipe.model, recipe.data, recipe.eval_data) == ("demo", ("rows.jsonl",), ())
    config = recipe.config
    assert (config.output_dir, config.learning_rate, config.max_length) == ("runs/x", 2e-5, None)
    assert (config.save_strategy, config.packing, config.columns) == ("no", False, {"text": "body"})


def test_an_option_overrides_the_recipe_also_under_its_other_name(tmp_path: Path) -> None:
    path = written(tmp_path, with_needed("max_steps: 3\nlearning_rate: 0.1\n"))
    recipe = resolve(path, {"output_dir": "runs/y", "max_steps": "5"})
    assert (recipe.config.output_dir, recipe.config.max_steps, recipe.config.learning_rate) == ("runs/y", 5, 0.1)


def test_without_a_recipe_the_options_are_all() -> None:
    assert resolve(None, NEEDED).config.output_dir == "runs/x"


def test_data_may_be_a_list(tmp_path: Path) -> None:
    recipe = resolve(written(tmp_path, "model: demo\noutput: x\ndata:\n  - a.jsonl\n  - b.csv\n"), {})
    assert recipe.data == ("a.jsonl", "b.csv")


ENDLESS = "model_init_kwargs:\n  a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
ENDLESS += "".join(f"  a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 9))
"""Lists of lists: 9 ** 9 numbers in ten lines."""
MERGED = "".join(f"x{i}: &x{i} {{<<: [{', '.join(9 * [f'*x{i - 1}' if i else '*x'])}]}}\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast\n", r"recipe.yaml, line 4: learning_rate is 'fast' \(text\), expected a number"),
        ("learningrate: 1\n", r"line 4: unknown setting 'learningrate'; did you mean 'learning_rate'\?"),
        ("max_seq_length: 8\n", r"line 4: unknown setting 'max_seq_length'; did you mean 'max_length'\?"),
        ("lr: 1\n", r"unknown setting 'lr'; did you mean 'learning_rate'\?"),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", r"recipe.yaml, line 6, column 1: 'seed' is given twice"),
        ("columns: {a: b, a: c}\n", "line 4, column 17: 'a' is given twice"),
        (ENDLESS, "with all that its aliases stand for, it has more than 1,000,000 values"),
        ("x: &x {a: 1}\n" + MERGED, "with all that its aliases stand for, it has more than 1,000,000 values"),
        ("model_init_kwargs: &a {b: *a}\n", "line 4, column 20: a value is part of itself"),
        ("seed: 1" + 500 * ":59" + "\n", "line 4, column 7: a number of more than 1,000 characters"),
        ("seed: 1 # " + 1_000_000 * "x", "is larger than 1 MB, which no recipe is"),
        ("data: [" + 50_000 * "a," + "]\n", "line 4, column 9.*: it has more than 50,000 values"),
        ("seed: !!bool maybe\n", "line 4, column 7: 'maybe' is no bool"),
        ("seed: !!int ''\n", "line 4, column 7: '' is no int"),
        ("seed: !!timestamp abc\n", "line 4, column 7: 'abc' is no timestamp"),
        ("run_name: 2024-99-99\n", "line 4, column 11: '2024-99-99' is no timestamp"),
        ("lora: !!map [1]\n", "line 4, column 7: expected a mapping node, but found sequence"),
        ("learning_rate: " + 400 * "1:" + "1.0\n", r"line 4, column 16: '(1:)+1\.\.\.' is no float"),
        ("seed: [1\n", "recipe.yaml, line 5, column 1: expected ',' or ']'"),
        ("\tseed: 1\n", r"line 4, column 1: found character '\\t'"),
        ("output_dir: y\n", "output and output_dir are the same setting; keep one"),
        ("1: x\n", "unknown setting '1'"),
        ("run_name: 2024-01-01\n", "expected text or null; put it in quotes"),
        ("seed: !!python/object/apply:os.system [exit]\n", "line 4, column 7: could not determine a constructor"),
        ("seed: \x00\n", "recipe.yaml is not YAML"),
        ("processes: 0\n", "line 4: processes is 0; write 1 or more"),
        ("max_restarts: -1\n", "line 4: max_restarts is -1; write 0 or more"),
        ("max_length: 1\n", "max_length is 1; at least 2 tokens are needed"),
        ("load_best_model_at_end: true\n", "requires the save and eval strategy to match"),
        ("eval_strategy: steps\n", "eval_strategy is steps, but there is no eval_data"),
        ("eval_split: test\n", "eval_split is given, but there is no eval_data"),
        ("parallelism_config: {}\n", "parallelism_config is {}"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        resolve(written(tmp_path, with_needed(text)), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("- a\n", r"holds \['a'\] \(a list\)"), ("just words\n", "holds 'just words'")],
)
def test_a_recipe_that_is_no_object_says_what_it_is(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        resolve(written(tmp_path, text), {})


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_a_missing_key_comes_with_an_example(missing: str) -> None:
    with pytest.raises(TunesmithError, match=f"no {missing}; write `{missing}: "):
        resolve(None, {name: value for name, value in NEEDED.items() if name != missing})


def test_a_missing_recipe_comes_with_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path, "")
    with pytest.raises(TunesmithError, match=r"no file .*recipes\.yaml; did you mean 'recipe\.yaml'\?"):
        resolve(str(tmp_path / "recipes.yaml"), {})


def test_data_in_the_recipes_place_is_pointed_to_its_option() -> None:
    with pytest.raises(TunesmithError, match=r"rows\.jsonl is not a recipe.*--data rows\.jsonl"):
        resolve("rows.jsonl", {})


def test_a_recipe_that_is_not_utf8_says_which_byte(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: d\xe9mo\n")
    with pytest.raises(TunesmithError, match="not UTF-8: byte 8"):
        resolve(str(path), {})


@pytest.mark.parametrize(
    ("given", "rate", "said"),
    [
        ({"lora": "true"}, 2e-4, True),
        ({"lora": "r=8", "learning_rate": "3e-4"}, 3e-4, False),
        ({"lora": "no"}, 2e-5, False),
    ],
)
def test_lora_brings_its_own_learning_rate_unless_one_is_given(given: dict[str, Any], rate: float, said: bool) -> None:
    recipe = resolve(None, NEEDED | given)
    assert recipe.config.learning_rate == rate
    assert ("learning_rate" in recipe.chosen) is said


def test_eval_data_is_evaluated_on_unless_told_otherwise() -> None:
    assert resolve(None, NEEDED | {"eval_data": "e.jsonl"}).config.eval_strategy == "epoch"
    assert resolve(None, NEEDED | {"eval_data": "e.jsonl", "eval_strategy": "no"}).config.eval_strategy == "no"


def test_gradient_checkpointing_is_known_under_the_name_everybody_uses(recwarn: pytest.WarningsRecorder) -> None:
    recipe = resolve(None, NEEDED | {"gradient_checkpointing": "true"})
    assert recipe.config.activation_checkpointing is True
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]


def test_a_saved_recipe_gives_the_same_run_and_no_secret(tmp_path: Path) -> None:
    given = NEEDED | {
        "lora": "{r: 8, target: [q_proj]}",
        "hub_token": "secret",
        "learning_rate": "1e-05",
        "max_steps": "7",
    }
    recipe = resolve(None, given)
    text = recipe.to_yaml()
    again = resolve(written(tmp_path, text), {})
    assert "secret" not in text
    assert (again.model, again.data, again.lora) == (recipe.model, recipe.data, {"r": 8, "target": ["q_proj"]})
    assert (again.config.learning_rate, again.config.max_steps) == (1e-5, 7)


def test_a_saved_recipe_keeps_what_was_chosen() -> None:
    assert yaml.safe_load(resolve(None, NEEDED | {"lora": True}).to_yaml())["learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("tokens", "path", "overrides"),
    [
        (["r.yaml"], "r.yaml", {}),
        (["--max-length", "5", "r.yaml"], "r.yaml", {"max_length": "5"}),
        (["--max_length=5"], None, {"max_length": "5"}),
        (["--max-steps", "-1"], None, {"max_steps": "-1"}),
        (["--packing", "r.yaml"], "r.yaml", {"packing": True}),
        (["--packing", "false"], None, {"packing": "false"}),
        (["--packing=no", "--bf16"], None, {"packing": "no", "bf16": True}),
        (["--no-packing", "--no_bf16"], None, {"packing": False, "bf16": False}),
        (["--lora", "--output", "x"], None, {"lora": True, "output": "x"}),
        (["--lora", "r.yaml"], "r.yaml", {"lora": True}),
        (["--lora", "r=8,alpha=16"], None, {"lora": "r=8,alpha=16"}),
        (["--resume-from-checkpoint"], None, {"resume_from_checkpoint": True}),
        (["--resume-from-checkpoint", "x/checkpoint-1"], None, {"resume_from_checkpoint": "x/checkpoint-1"}),
        (["--data", "a", "--data", "b"], None, {"data": ["a", "b"]}),
        (["--seed", "1", "--seed", "2"], None, {"seed": "2"}),
        (["--run-name="], None, {"run_name": ""}),
    ],
)
def test_options_are_read_with_their_fields_types(
    tokens: list[str], path: str | None, overrides: dict[str, Any]
) -> None:
    assert parse_options(tokens) == (path, overrides)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--max-length"], "--max-length needs a value: a whole number or null"),
        (["--max-length", "--packing"], "--max-length needs a value"),
        (["--lr", "1"], r"--lr: unknown setting 'lr'; did you mean 'learning_rate'\?"),
        (["--no-max-length"], "unknown setting 'no_max_length'"),
        (["a.yaml", "b.yaml"], "unexpected 'b.yaml'"),
        (["-x"], "unexpected '-x'"),
        (["--packing", "maybe"], None),
    ],
)
def test_a_wrong_option_is_refused(tokens: list[str], message: str | None) -> None:
    if message is None:  # the stray word becomes the recipe, which it is not
        path, _ = parse_options(tokens)
        with pytest.raises(TunesmithError, match="maybe is not a recipe"):
            resolve(path, {})
        return
    with pytest.raises(TunesmithError, match=message):
        parse_options(tokens)


def test_every_setting_has_a_line_of_help() -> None:
    helps = {name: setting.help for name, setting in all_settings().items()}
    assert not [name for name, text in helps.items() if not 10 < len(text) <= 180 or text[-1] != "." or "\n" in text]


def test_a_line_replaces_that_of_transformers_for_each_field_that_is_not_redefined() -> None:
    redefined = {"learning_rate", "logging_steps", "bf16"}
    assert set(HELPS) == {field.name for field in fields(TrainingArguments)} - redefined


def test_fsdp_is_turned_on_as_transformers_says() -> None:
    assert parse_options(["--fsdp", "recipe.yaml"]) == ("recipe.yaml", {"fsdp": True})
    assert all_settings()["fsdp"].kind == bool | str | None


def test_a_number_that_transformers_can_not_count_with_is_a_mistake_of_the_recipe() -> None:
    with pytest.raises(TunesmithError, match="save_steps is inf; write a finite number"):
        resolve(None, {"model": "demo", "data": "rows.jsonl", "output": "run", "save_steps": "inf"})


def test_what_is_kept_of_a_recipe_has_no_secrets_within_its_settings() -> None:
    given = {"model": "x", "data": "y", "model_init_kwargs": {"token": "anothersecret", "dtype": "float32"}}
    kept = yaml.safe_load(resolve(None, given | {"output": "z"}).to_yaml())
    assert kept["model_init_kwargs"] == {"dtype": "float32"}
