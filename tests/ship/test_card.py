"""The card is valid for the hub, says what the record says, and shows answers as they are, whatever is in them."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.models import tiny
from tests.ship.card_rules import faults, header_of
from tests.ship.runs import QUESTION, record
from tunesmith.errors import TunesmithError
from tunesmith.runs.record import Method, Origin, Prompt, RunRecord, Sample
from tunesmith.ship import licence as licences
from tunesmith.ship.card import curves, model_card

REPO = "org/mine"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """What of a run's folder a card looks at."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Path:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def without_curves(**changes: Any) -> RunRecord:
    """A record whose card has no picture, which takes longer to draw than all the rest to write."""
    return record(history=(), **changes)


def card_of(folder: Path, run: RunRecord | None, **options: Any) -> str:
    card = model_card(folder, run, REPO, **options)["README.md"].decode()
    assert not faults(card)
    assert ModelCard(card).data.to_dict() == header_of(card)  # as the hub's own library reads it
    return card


def test_the_header_says_what_the_hub_sorts_by(adapters: Path) -> None:
    header = header_of(card_of(adapters, without_curves()))
    index = header.pop("model-index")
    assert header == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["tunesmith", "sft", "lora", "conversational"],
        "datasets": ["org/chat-rows"],
        "widget": [{"messages": QUESTION, "output": {"text": "Four."}}],
    }
    [result] = index[0]["results"]
    assert index[0]["name"] == "mine"
    assert result["dataset"] == {"name": "math", "type": "math"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("loss", 0.5),
        ("perplexity", 1.648721),
        ("accuracy", 0.75),
    ]


def test_the_page_says_what_the_record_says(adapters: Path) -> None:
    card = card_of(adapters, record())
    for line in (
        "Adapters for [org/base](https://huggingface.co/org/base), by supervised fine-tuning with tunesmith.",
        "| math | perplexity | 1.6487 |",
        r"| train | chat | [org/chat\-rows:default](https://huggingface.co/datasets/org/chat-rows) | 90 | 9,000 |",
        "| train | math | math.jsonl | 90 | 9,000 | 4,000 | 3 |",
        r"| method | LoRA adapters, rank 4, alpha 8, on k\_proj, q\_proj |",
        "| trained parameters | 1,000 of 100,000 (1.00%) |",
        "| duration | 1 h 2 min |",
        r"| learning\_rate | 0.0002 |",
        "Versions: tunesmith 0.1.0, torch 2.13.0.",
        "![The loss over the steps of training.](curves.png)",
        "```text\nFive.\n```",
    ):
        assert line in card, line
    assert "/home/somebody" not in card


def test_a_full_model_and_a_merged_one_are_called_so(full: Path) -> None:
    whole = card_of(full, without_curves(method=Method()))
    header = header_of(whole)
    assert (header["library_name"], header["base_model_relation"]) == ("transformers", "finetune")
    assert "with all of its weights tuned" in whole
    assert "generator = pipeline(" in whole
    assert "with adapters merged into its weights" in card_of(full, without_curves())


def test_the_demo_models_name_on_the_hub_and_its_licence_are_known(adapters: Path) -> None:
    settings = '{"base_model_name_or_path": "/home/me/.cache/tunesmith/demo-b179c9523d0e-v1", "peft_type": "LORA"}'
    (adapters / "adapter_config.json").write_text(settings)
    card = card_of(adapters, without_curves(base_model=Origin.of_model("demo")))
    header = header_of(card)
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header["license"] == "apache-2.0"
    assert "4-bit (Q4_1) form" in card
    assert "/home/me" not in card


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_the_code_on_a_reward_models_card_scores_an_answer(
    adapted: bool, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = tiny("llama", len(tokenizer), auto=AutoModelForSequenceClassification, num_labels=1)
    if adapted:
        tiny("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"]))
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    method = Method(kind="lora", rank=8) if adapted else Method()
    run = without_curves(trainer="reward", method=method, metrics={"eval_math_accuracy": 0.75}, samples=())
    card = card_of(folder, run)
    header = header_of(card)
    assert header["pipeline_tag"] == "text-classification"
    assert header["tags"][:2] == ["tunesmith", "reward"]
    assert "by reward modelling on pairs of answers with tunesmith. It is a sequence classifier" in card
    assert "| math | accuracy of pairs | 0.7500 |" in card
    assert "All are over the pairs of the set, whose answers are scored as whole texts." in card
    code = card.split("```python\n")[1].split("```")[0].replace(REPO, str(folder))
    exec(code, {})
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
    assert float(capsys.readouterr().out) == pytest.approx(float(model.eval()(**inputs).logits), abs=1e-6)


def test_a_base_model_that_nobody_else_has_is_not_linked(full: Path) -> None:
    card = card_of(full, without_curves(base_model=Origin.of_model("/home/me/own-base"), method=Method()))
    assert "base_model" not in header_of(card)
    assert r"own\-base with all of its weights tuned" in card
    assert "/home/me" not in card


def test_without_a_record_the_card_says_what_the_files_say(adapters: Path, full: Path) -> None:
    card = card_of(adapters, None)
    assert header_of(card)["base_model"] == "org/base"
    assert [line for line in card.splitlines() if line.startswith("#")] == ["# mine", "## Use", "## Licence"]
    assert model_card(adapters, None, REPO).keys() == {"README.md"}
    assert "an unnamed base model" in card_of(full, None)


def test_without_samples_no_prompt_is_in_the_card(adapters: Path) -> None:
    card = card_of(adapters, without_curves(), samples=False)
    assert "two plus two" not in card
    assert "Four." not in card
    assert "widget" not in header_of(card)


HOSTILE = [
    "````\n# A heading of the answer\n<script>alert(1)</script>\n```text\n![](http://x/y.png)",
    "---\nlicense: other\n---\n",
    "~~~\n</details>\n| a | b |\n<!--",
    "bell \x07 and \u202eturned\u2028line\r\nend",
    "`" * 40,
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_prompt_or_an_answer_can_change_the_page(text: str, adapters: Path) -> None:
    sample = Sample(prompt=Prompt(prompt=text, expected=text), before=text, after=text)
    calm = Sample(prompt=Prompt(prompt="x", expected="x"), before="x", after="x")
    card = card_of(adapters, without_curves(samples=(sample,)))
    tokens, expected = (tokens_of(card_of(adapters, without_curves(samples=(s,)))) for s in (sample, calm))
    assert [token.type for token in tokens] == [token.type for token in expected]
    shown = [token.content for token in tokens if token.type == "fence" and token.info == "text"]
    assert len(set(shown)) == 1
    plain = text.replace("\r\n", "\n").translate(dict.fromkeys(map(ord, "\x07\u202e\u2028"), "\ufffd"))
    assert shown[0] == f"{plain}\n"
    [example] = header_of(card)["widget"]
    assert example["text"] == text
    assert header_of(card).get("license") is None


@pytest.mark.parametrize("name", ["a|b", "<img src=x>", "`x`", "[l](u)", "a\nb\n# c", "*_~"])
def test_nothing_in_a_name_can_change_the_page(name: str, adapters: Path) -> None:
    def named(name: str) -> str:
        run = without_curves()
        data = tuple(type(count)(**_fields(count) | {"source": name}) for count in run.data)
        return card_of(adapters, without_curves(data=data, settings={name: name}, device=name, versions={name: name}))

    tokens = tokens_of(named(name))
    assert [token.type for token in tokens] == [token.type for token in tokens_of(named("plain"))]
    texts = [child.content for token in tokens for child in token.children or () if child.type == "text"]
    assert name.replace("\n", " ") in texts


def _fields(count: Any) -> dict[str, Any]:
    return {name: getattr(count, name) for name in type(count).__dataclass_fields__}


def tokens_of(card: str) -> list[Any]:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(card).text)


def test_a_long_answer_is_cut(adapters: Path) -> None:
    long = Sample(prompt=Prompt(prompt="x"), before="y" * 100_000, after="z")
    assert len(card_of(adapters, without_curves(samples=(long,) * 50))) < 20_000


# Licences


def test_the_licence_is_the_given_one_or_that_of_the_base_models_own_card(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "license" not in header_of(card_of(adapters, without_curves()))
    assert "Not stated. A tuned model is bound by the licence of [org/base]" in card_of(adapters, without_curves())
    assert header_of(card_of(adapters, without_curves(), licence="mit"))["license"] == "mit"
    cached = tmp_path / "README.md"
    cached.write_text(
        "---\nlicense: other\nlicense_name: ours\nlicense_link: https://example.org/licence\n---\nThe base."
    )
    monkeypatch.setattr(licences, "try_to_load_from_cache", lambda repo, name: str(cached))
    header = header_of(card_of(adapters, without_curves()))
    assert (header["license"], header["license_name"]) == ("other", "ours")
    assert header["license_link"] == "https://example.org/licence"


@pytest.mark.parametrize(
    ("text", "found"), [("---\nlicense: gemma\n---\n", "gemma"), ("no header", None), ("\xff", None)]
)
def test_the_card_beside_a_local_base_model_is_read(text: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    base = Origin.of_model(str(tmp_path))
    assert licences.licence_of(base, str(tmp_path), None).identifier == found


def test_a_licence_that_is_no_identifier_is_refused(adapters: Path) -> None:
    with pytest.raises(TunesmithError, match="--license is 'Apache 2'; write the hub's identifier"):
        model_card(adapters, None, REPO, licence="Apache 2")


# The picture


def test_the_curves_are_a_picture_and_the_same_history_gives_the_same_bytes() -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_$x_loss": 1.5}]
    picture = curves(history)
    assert picture is not None
    assert picture.startswith(PNG)
    assert picture == curves(history)
    assert picture != curves(history[:2])


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}], [{"step": 1}, {"loss": None, "step": 2}]])
def test_where_there_is_no_curve_there_is_no_picture(history: list[dict[str, Any]], adapters: Path) -> None:
    assert curves(history) is None
    files = model_card(adapters, record(history=tuple(history)), REPO)
    assert files.keys() == {"README.md"}
    assert b"curves.png" not in files["README.md"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("license: apache-2.0", None),
        ("license: apache 2", '"license" must be one of'),
        ("base_model: /home/me/x", '"base_model"'),
        ("colour: red", '"colour" is not allowed'),
        ("widget: [{question: x}]", '"widget'),
    ],
)
def test_the_rules_that_stand_for_the_hubs_refuse(change: str, fault: str | None) -> None:
    found = faults(f"---\npipeline_tag: text-generation\n{change}\n---\ntext")
    assert bool(found) == bool(fault)
    assert all(str(fault) in text for text in found)
