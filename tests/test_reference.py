"""The pages of settings and commands say what the fields and the parser say, and leave none out."""

import re
import shlex

import pytest
from typer.main import get_command

from docs import reference
from tunesmith.cli.main import app
from tunesmith.settings.config import UNSUPPORTED
from tunesmith.settings.recipe import all_settings, every_setting

PARSERS = get_command(app).commands  # type: ignore[attr-defined]
PAGE = reference.COMMANDS.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([a-z]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
AGAIN = "run: python docs/reference.py"


def test_the_page_of_settings_is_what_the_fields_say() -> None:
    assert reference.SETTINGS.read_text(encoding="utf-8") == reference.settings_page(), AGAIN


def test_the_page_of_settings_has_each_of_them_once() -> None:
    """Those of preferences and policies, of which some have another meaning or default than for texts, have parts of
    their own."""
    texts, others = reference.settings_page().split("## Pairs of answers")
    others, last = others.split("## Refused")
    named, refused = re.findall(r"^- `(\w+)`", texts, re.MULTILINE), re.findall(r"^- `(\w+)`:", last, re.MULTILINE)
    assert sorted(named + refused) == sorted(all_settings())
    own = {*re.findall(r"^- `(\w+)`", others, re.MULTILINE)}
    again = {"loss_type", "learning_rate", "max_length", "shuffle_dataset", "remove_unused_columns", "overlong"}
    assert sorted(own - again) == sorted(every_setting().keys() - all_settings().keys())


@pytest.mark.parametrize("names", ["packing no_such_setting", "packing packing"])
def test_a_setting_with_no_place_or_two_is_named(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = reference.Group(title="Odd", text="", names=names)
    monkeypatch.setattr(reference, "GROUPS", (odd,))
    with pytest.raises(ValueError, match="|".join(set(all_settings()) - set(UNSUPPORTED))):
        reference.settings_page()


def test_the_page_of_commands_has_the_commands_that_there_are() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert headings[0] == "What all have in common"
    assert sorted(headings[1:]) == sorted(PARSERS)


def test_the_page_of_commands_has_the_options_of_the_parser() -> None:
    assert reference.with_options(PAGE) == PAGE, AGAIN


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_has_its_options_and_an_example_that_the_parser_takes(command: str) -> None:
    section, parser = SECTIONS[command], PARSERS[command]
    own = {name for item in parser.params for name in item.opts if name.startswith("--")}
    for option in own - reference.OF_EVERY_COMMAND:
        assert f"| `{option}" in section, option
    examples = re.findall(rf"^(?:\$ )?tunesmith {command} (.*)$|^(?:\$ )?tunesmith {command}$", section, re.MULTILINE)
    assert examples
    for example in examples:
        with parser.make_context(command, shlex.split(example)) as context:
            assert set(context.params) >= {item.name for item in parser.params if item.required}


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_says_what_it_writes_and_prints_as_json(command: str) -> None:
    assert "\nWrites " in SECTIONS[command]
    assert "`--json`" in SECTIONS[command]
