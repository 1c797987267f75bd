"""A template alone is tried with conversations of every kind; a page of the docs has the table of the styles."""

import json
from pathlib import Path

import pytest

from tests.data.styles import TEMPLATES
from tunesmith.data.survey import KINDS, Survey, surveyed, tokenizer_for

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
BEGIN, FINISH = "<!-- styles -->", "<!-- end -->"

STYLES = {
    "chatml": "ChatML",
    "llama2": "Llama 2",
    "llama3": "Llama 3",
    "llama31": "Llama 3.1",
    "gemma": "Gemma",
    "gemma4": "Gemma 4",
    "mistral": "Mistral, system in the last question",
    "mistral_ids": "Mistral, ids of calls",
    "phi3": "Phi 3",
    "qwen3": "Qwen 3",
    "qwen35": "Qwen 3.5",
    "drops_think": "QwQ, DeepSeek R1 distills",
    "deepseek31": "DeepSeek V3.1",
    "harmony": "gpt-oss",
    "glm": "GLM 4",
    "glm47": "GLM 4.7",
    "minimax": "MiniMax M2",
    "nemotron3": "Nemotron 3",
    "kimi": "Kimi K2 Thinking",
    "apriel": "Apriel",
    "command_a": "Command A",
    "command_r7b": "Command R7B",
    "granite": "Granite",
    "smollm3": "SmolLM3",
    "hermes": "Hermes",
    "llava": "LLaVA",
    "parts": "Idefics",
    "generation": "marked, as TRL does",
    "generation_thinks": "marked, with thinking",
}
"""The templates of this folder and the families whose style they have."""


REASONS = {
    "does not show tool calls": "no calls",
    "one call at a time": "one call at a time",
    "beside its calls": "text beside calls is lost",
    "must alternate": "roles must alternate",
    "begins with it": "no answer may come first",
}
"""What the table says for a reason."""


def survey_of(name: str) -> Survey:
    return surveyed(name, tokenizer_for((TEMPLATES / f"{name}.jinja").read_text()))


@pytest.fixture(scope="module")
def surveys() -> dict[str, Survey]:
    return {name: survey_of(name) for name in STYLES}


def test_the_page_has_the_table_of_the_styles(surveys: dict[str, Survey]) -> None:
    columns = ("style of", *KINDS, "why refused", "switch")
    rows = [columns, ["---"] * len(columns)]
    for name, title in STYLES.items():
        survey = surveys[name]
        reasons = (next(REASONS[part] for part in REASONS if part in reason) for reason in survey.refusals())
        switches = ", ".join(f"`{key}`" for found in survey.switches for key in found)
        cells = (survey.cell(kind) for kind in KINDS)
        rows.append((title, *cells, ", ".join(dict.fromkeys(reasons)), switches))
    lines = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)
    table = "\n".join(lines)
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(FINISH)[0].strip()
    assert written == table, f"put this between {BEGIN} and {FINISH}:\n{table}"


def test_every_style_trains_where_an_expert_would(surveys: dict[str, Survey]) -> None:
    for name, survey in surveys.items():
        for kind in ("plain", "system", "multi-turn", "reasoning", "mixed", "parts"):
            assert survey.counts(kind)["refused"] == 0, (name, kind)
    assert surveys["llama31"].refusals() == {
        "the chat template refuses the conversation: one call at a time!": ["two calls"],
        "the template does not show what the assistant says beside its calls, .... Take it out of the row, give it a "
        "message of its own, or set `chat_template_path` to a template that shows it": ["text beside a call"],
    }


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("command_a", "<|END_OF_TURN_TOKEN|>"),
        ("command_r7b", "<|END_OF_TURN_TOKEN|>"),
        ("gemma4", "<turn|>"),
        ("minimax", "[e~["),
        ("llama31", "<|eot_id|>"),
        ("mistral_ids", "</s>"),
        ("glm47", "<|user|>"),
    ],
)
def test_a_template_alone_gets_the_end_token_of_its_turns(name: str, end: str) -> None:
    tokenizer = tokenizer_for((TEMPLATES / f"{name}.jinja").read_text())
    assert tokenizer.eos_token == end
    assert tokenizer.decode(tokenizer.encode("台北 <|x|>", add_special_tokens=False)) == "台北 <|x|>"
    assert len(tokenizer.encode(end, add_special_tokens=False)) == 1


def test_a_survey_is_json(surveys: dict[str, Survey]) -> None:
    value = json.loads(json.dumps(surveys["qwen35"].as_json()))
    assert (value["end"], value["switches"]) == ("<|im_end|>", [{"enable_thinking": False}])
    assert value["kinds"]["mixed"] == {"each": 2}
    assert value["refusals"] == {}
