"""The advice follows from the facts: goal, supervision, length, memory, steps; and the text says why."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import yaml

from tunesmith.errors import TunesmithError
from tunesmith.init.advice import (
    Facts,
    Fit,
    ModelFacts,
    Wanted,
    check_goal,
    fit,
    guess_goal,
    pack_length,
    schedule,
    step_rows,
    train_on,
    wanted_length,
)
from tunesmith.init.facts import Lengths, RowFacts
from tunesmith.init.recipe_text import Line, Section, heading, sections, source_name, values, write

CHAT = RowFacts(rows=400, format="messages", kind="conversation", roles=("user", "assistant"), answers=3)
PAIRS = RowFacts(rows=400, format="instruction", kind="conversation", separate=True, answers=1)
PREFERRED = RowFacts(rows=400, format="pairs", kind="preference", separate=True, answers=1)
JUDGED = replace(PREFERRED, format="judged", kind="judged", good=100)
TEXT = RowFacts(rows=400, format="text", kind="text")
LABELS = replace(PAIRS, labels=(("billing", 200), ("bug", 150), ("other", 50)))
MODEL = ModelFacts(name="demo", parameters=135_000_000, context=2048, note="small")
EVEN = Lengths(sizes=tuple(range(101, 501)), rows=400, supervised=0.5)
TAILED = Lengths(sizes=(*(100,) * 390, *(612,) * 8, 900, 5000), rows=400, supervised=0.5)


def facts(**changed: Any) -> Facts:
    wanted = Wanted(data=("my rows.jsonl",), output="runs/x", goal=changed.pop("goal", "chat"))
    fitted = Fit(method="lora", length=512, rows=4, checkpointing=False)
    known: dict[str, Any] = {"rows": CHAT, "lengths": EVEN, "model": MODEL, "device": "cpu with 8.0 GB", "fit": fitted}
    return Facts(**{"wanted": wanted} | known | changed)


def settings(given: Facts) -> dict[str, Any]:
    return values(sections(given))


@pytest.mark.parametrize(
    ("rows", "goal"),
    [
        (CHAT, "chat"),
        (replace(CHAT, answers=1), "instruct"),
        (PAIRS, "instruct"),
        (LABELS, "classify"),
        (replace(LABELS, labels=(("a long answer of more than six words", 400),)), "instruct"),
        (replace(LABELS, rows=8), "instruct"),
        (replace(CHAT, json_answers=0.95), "json"),
        (replace(CHAT, tools=1, json_answers=1.0), "tools"),
        (TEXT, "continue"),
        (PREFERRED, "dpo"),
        (JUDGED, "kto"),
    ],
)
def test_the_goal_is_guessed_from_the_rows(rows: RowFacts, goal: str) -> None:
    assert guess_goal(rows)[0] == goal


def test_a_goal_that_the_rows_can_not_serve_is_refused() -> None:
    with pytest.raises(TunesmithError, match=r"the rows are plain text.*--goal continue"):
        check_goal("chat", TEXT)
    with pytest.raises(TunesmithError, match=r"none of these rows has any; write --goal chat"):
        check_goal("tools", CHAT)
    check_goal("continue", CHAT)
    with pytest.raises(TunesmithError, match=r"needs rows with 'chosen' and 'rejected'; write --goal chat"):
        check_goal("dpo", CHAT)
    with pytest.raises(TunesmithError, match=r"write --goal dpo.*--columns label=is_good"):
        check_goal("kto", PREFERRED)


def test_preferences_get_the_settings_of_their_trainer() -> None:
    pairs = settings(facts(goal="dpo", rows=PREFERRED))
    expected = {"trainer": "dpo", "loss_type": "sigmoid", "beta": 0.1, "learning_rate": "1e-4", "num_train_epochs": 2}
    assert expected.items() <= pairs.items()
    assert not {"train_on", "packing", "overlong"} & pairs.keys()
    judged = settings(facts(goal="kto", rows=JUDGED))
    assert {"trainer": "kto", "loss_type": "kto", "desirable_weight": 3.0}.items() <= judged.items()
    one = Fit(method="lora", length=512, rows=1, checkpointing=True)
    assert settings(facts(goal="kto", rows=replace(JUDGED, good=200), fit=one))["loss_type"] == "apo_zero_unpaired"
    large = replace(MODEL, parameters=8_000_000_000)
    assert settings(facts(goal="dpo", rows=PREFERRED, model=large))["learning_rate"] == "1e-5"


def test_what_is_supervised_follows_format_and_goal() -> None:
    assert train_on("chat", CHAT)[0] == "assistant"
    assert train_on("json", CHAT)[0] == "last_assistant"
    assert train_on("classify", LABELS)[0] == "completion"
    assert train_on("continue", CHAT)[0] == "all"
    assert train_on("continue", replace(TEXT, kind="tokens"))[0] is None


def test_the_length_takes_all_rows_but_a_few_far_longer_ones() -> None:
    assert wanted_length("chat", CHAT, EVEN, MODEL) == 512
    assert wanted_length("chat", CHAT, TAILED, MODEL) == 640  # not 5,000
    assert wanted_length("json", CHAT, Lengths(sizes=(*(100,) * 99, 400), rows=100, supervised=1), MODEL) == 448
    assert wanted_length("chat", CHAT, EVEN, replace(MODEL, context=256)) == 256


def planner(room: dict[str, int]) -> Any:
    """A machine where a token takes a byte, and half of that with checkpointing."""
    return lambda method, checkpointing: lambda rows, length: rows * length <= room[method] * (1 + checkpointing)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        ({"lora": 10_000}, Fit(method="lora", length=512, rows=16, checkpointing=False)),
        ({"lora": 3_000}, Fit(method="lora", length=512, rows=4, checkpointing=False)),
        ({"lora": 300}, Fit(method="lora", length=512, rows=1, checkpointing=True)),
        ({"lora": 0, "4bit": 600}, Fit(method="4bit", length=512, rows=1, checkpointing=False)),
        ({"lora": 0, "4bit": 200}, Fit(method="4bit", length=384, rows=1, checkpointing=True)),
        ({"lora": 0, "4bit": 0}, Fit(method="4bit", length=64, rows=1, checkpointing=True, fits=False)),
    ],
)
def test_memory_decides_rows_checkpointing_method_and_at_last_the_length(room: dict[str, int], expected: Fit) -> None:
    assert fit(planner(room), list(room), 512, 16) == expected  # type: ignore[arg-type]


def test_small_data_have_several_epochs_in_small_steps() -> None:
    assert [step_rows(rows) for rows in (100, 1_000, 10_000, 50_000, 10**6)] == [4, 8, 16, 32, 64]
    plan = schedule(facts())
    assert (plan.train_rows, plan.held_out, plan.epochs) == (380, 0.05, 3)
    assert (plan.micro, plan.accumulation, plan.steps) == (4, 1, 3 * 95)
    tight = schedule(facts(fit=Fit(method="lora", length=512, rows=1, checkpointing=True)))
    assert (tight.micro, tight.accumulation, tight.steps) == (1, 4, 3 * 95)
    few = schedule(facts(rows=replace(CHAT, rows=20)))
    assert (few.held_out, few.train_rows, few.epochs) == (0.0, 20, 5)
    many = schedule(facts(rows=replace(CHAT, rows=100_000)))
    assert (many.held_out, many.epochs) == (0.005, 1)


def test_short_rows_share_packs_with_as_many_rows_to_a_step() -> None:
    rows, lengths = replace(CHAT, rows=5_000), Lengths(sizes=(64,) * 5_000, rows=5_000, supervised=0.5)
    assert pack_length("chat", rows, lengths, MODEL) == 1024
    assert pack_length("classify", rows, lengths, MODEL) is None
    assert pack_length("chat", CHAT, lengths, MODEL) is None
    packed = facts(rows=rows, lengths=lengths, fit=Fit(method="lora", length=1024, rows=8, checkpointing=False))
    plan = schedule(packed)
    assert plan.packing
    assert plan.micro * plan.accumulation == 1  # 16 rows of 64 tokens
    assert plan.steps == plan.epochs * 297
    assert settings(packed)["packing"] is True


def test_long_texts_are_split_and_packed() -> None:
    given = facts(goal="continue", rows=TEXT, lengths=TAILED)
    found = settings(given)
    assert (found["train_on"], found["packing"], found["overlong"]) == ("all", True, "split")
    assert found["lora"]["r"] == 32


@pytest.mark.parametrize(
    ("goal", "rows", "setting"),
    [
        ("chat", CHAT, ("overlong", "truncate")),
        ("json", CHAT, ("overlong", "drop")),
        ("classify", LABELS, ("truncate_prompt", True)),
        ("classify", CHAT, ("overlong", "drop")),
    ],
)
def test_what_is_too_long_ends_as_the_goal_can_bear(goal: str, rows: RowFacts, setting: tuple[str, Any]) -> None:
    found = settings(facts(goal=goal, rows=rows, lengths=TAILED, fit=replace(facts().fit, length=640)))
    assert found[setting[0]] == setting[1]


def test_the_learning_rate_follows_method_and_size() -> None:
    large, full = replace(MODEL, parameters=7_000_000_000), replace(facts().fit, method="full")
    assert [settings(given)["learning_rate"] for given in (facts(), facts(model=large))] == ["1e-3", "2e-4"]
    found = settings(facts(fit=full, model=large))
    assert found["learning_rate"] == "2e-5"
    assert "lora" not in found
    assert settings(facts(fit=replace(full, method="4bit")))["quantize"] == "4bit"


def test_the_text_is_the_settings_with_their_reasons() -> None:
    given = facts(lengths=TAILED, fit=replace(facts().fit, length=640))
    text = write(heading(given, "recipe.yaml"), sections(given))
    assert "max_length: 640  # 99% of your rows have 612 tokens or fewer; 2 are longer" in text
    read = yaml.safe_load(text)
    assert read == settings(given)
    assert read["data"] == {"my_rows": {"path": "my rows.jsonl", "held_out": 0.05}}
    assert all(len(line) <= 110 for line in text.splitlines())
    lines = text.splitlines()
    for above, line in pairwise(lines):
        assert not line or line.startswith("#") or "  # " in line or above.startswith("# ")


def test_commands_of_the_heading_stay_whole() -> None:
    recipe = f"'my  {'long ' * 30}recipe.yaml'"
    text = write(heading(facts(), recipe), [])
    for command in ("check", "inspect", "train"):
        assert f"\n#   tunesmith {command} {recipe}\n" in text


@pytest.mark.parametrize("path", ["train.jsonl", "a/eval.csv", "é.json", "owner/My-Data:en", "數據.jsonl", "...json"])
def test_sources_have_names_that_mean_no_split(path: str) -> None:
    name = source_name(path)
    assert name not in ("train", "eval")
    assert name.isidentifier()


def test_odd_names_stay_yaml() -> None:
    line = Line(key="data", value="a: #b, [c]", why="x\n\x07y")
    assert yaml.safe_load(write(["a\nb"], [Section(title="t", lines=(line,))])) == {"data": "a: #b, [c]"}
