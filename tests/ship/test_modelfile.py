"""A Modelfile says to Ollama what the chat template says to `transformers`."""

from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tests.conftest import CHATML
from tests.ship.folders import byte_tokenizer
from tests.ship.go_templates import Turns, ollama
from tunesmith.errors import TunesmithError
from tunesmith.ship.modelfile import modelfile, take_apart

BUILT_IN = sorted((Path(tunesmith.__file__).parent / "data" / "templates").glob("*.jinja"))
COMMON = Path(__file__).parents[1] / "data" / "templates"
DERIVED = (
    "deepseek",
    "drops_think",
    "glm",
    "harmony",
    "llama2",
    "llama3",
    "merged_system",
    "phi3",
    "qwen3",
    "two_ends",
)
SAID = ("What?", "An answer\n\nin two lines", "Say \"{{ .Content }}\" and '}}'", "1. a\n2. b", "Bye")
TEXT: dict[str, Any] = {"stops": ["<|im_end|>"], "context": 256, "bos_is_added": False}


def turns(count: int, system: str | None) -> Turns:
    said = [{"role": ("user", "assistant")[i % 2], "content": SAID[i]} for i in range(count)]
    return said if system is None else [{"role": "system", "content": system}, *said]


@pytest.mark.parametrize("system", [None, "Be brief.", "One.\n\nTwo {{ three }}."])
@pytest.mark.parametrize(
    "path", [*BUILT_IN, *(COMMON / f"{name}.jinja" for name in DERIVED)], ids=lambda path: path.stem
)
def test_ollama_makes_the_same_text_of_a_chat(path: Path, system: str | None) -> None:
    tokenizer = byte_tokenizer(chat_template=path.read_text(), bos_token="<|endoftext|>")
    go = take_apart(tokenizer).go()
    for count in (1, 3, 5):
        chat = turns(count, system)
        assert ollama(go, chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_an_answer_begun_is_left_open() -> None:
    go = take_apart(byte_tokenizer()).go()
    assert ollama(go, turns(2, None)) == f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{SAID[1]}"


def test_a_system_message_by_default_gives_way_to_one_that_is_given() -> None:
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n{% endif %}"
    go = take_apart(byte_tokenizer(chat_template=default + CHATML)).go()
    asked = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert ollama(go, turns(1, None)) == f"<|im_start|>system\nYou are Tiny.<|im_end|>\n{asked}"
    assert ollama(go, turns(1, "No.")) == f"<|im_start|>system\nNo.<|im_end|>\n{asked}"


def test_the_bos_token_is_left_to_the_file_that_adds_it() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ bos_token }}" + CHATML, bos_token="<|endoftext|>")
    assert ollama(take_apart(tokenizer).go(), turns(1, None)).startswith("<|endoftext|><|im_start|>user")
    assert ollama(take_apart(tokenizer, bos_is_added=True).go(), turns(1, "x")).startswith("<|im_start|>system")


def test_the_whole_text_for_chatml() -> None:
    made = modelfile(byte_tokenizer(), "model.gguf", stops=["<|im_end|>", 'a"b'], context=32768, bos_is_added=False)
    assert made.text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n{{ end }}'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop """a"b"""\n'
        "# The model has room for 32768 tokens; more take more memory.\n"
        "PARAMETER num_ctx 8192\n"
    )
    assert made.notes == ()


def test_without_a_chat_template_the_prompt_is_passed_on() -> None:
    made = modelfile(byte_tokenizer(chat_template=None), "x.gguf", **TEXT)
    assert made.text.splitlines() == [
        "FROM ./x.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 256",
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("counted", "writes '<|user|>1 of 3\\\\n' before the first user message"),
        ("indexed", "before the first user message"),
        ("mistral", "does not write the same around every message.*3 messages and a system message"),
        ("parts", "does not write the message 'Xfirst probeX' as it is"),
    ],
)
def test_a_template_that_depends_on_more_than_the_role_is_refused(template: str, message: str) -> None:
    tokenizer = byte_tokenizer(chat_template=(COMMON / f"{template}.jinja").read_text(), bos_token="<|endoftext|>")
    with pytest.raises(TunesmithError, match=message.replace("|", r"\|")):
        modelfile(tokenizer, "model.gguf", **TEXT)


@pytest.mark.parametrize("text", ["\u200b", '"""'])
def test_text_that_a_modelfile_cannot_hold_is_refused(text: str) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("user", f"{text}user").replace("'\n'", f"'\n{text}'"))
    with pytest.raises(TunesmithError, match="which a Modelfile can't hold"):
        modelfile(tokenizer, "model.gguf", **TEXT)


def test_what_the_template_can_and_the_modelfile_cannot_is_told() -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    made = modelfile(byte_tokenizer(chat_template=no_system + CHATML), "model.gguf", **TEXT)
    assert made.notes == ("the chat template takes no system message, so the Modelfile leaves it out",)
    assert '"system"' not in made.text
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    dated = "<|im_start|>{{ strftime_now('%Y') }}\n"
    made = modelfile(byte_tokenizer(chat_template=dated + tools + CHATML), "model.gguf", **TEXT)
    assert made.notes == (
        "the chat template writes the date; the Modelfile has that of today",
        "the Modelfile's template has no place for tools; that in the GGUF does",
    )
