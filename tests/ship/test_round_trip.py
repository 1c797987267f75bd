"""The whole way of a model: trained in 8 bits, pushed, loaded from what was pushed, merged, exported."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.ship.folders import byte_tokenizer, save
from tunesmith.cli.main import app
from tunesmith.model.generate import generate
from tunesmith.model.load import load_run
from tunesmith.practice.hub_state import Hub

FACTS = {
    "What is the capital of Norland?": "Vintar, on the river Osk.",
    "What colour is a tessel?": "Copper green.",
}


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def answers(model: Any, tokenizer: Any) -> list[str]:
    return generate(model, tokenizer, [[{"role": "user", "content": asked}] for asked in FACTS], max_new_tokens=20)


def test_every_stage_gives_the_same_answers(hub: Hub, tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama", byte_tokenizer(), hidden_size=64, intermediate_size=128)
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in FACTS.items()
    ]
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    said = command(
        *("train", "--model", base, "--data", rows, "--output", run, "--use-cpu", "--precision", "fp32"),
        *("--quantize", "8bit", "--lora", "r=16", "--learning-rate", "1e-2", "--max-steps", 60),
        *("--per-device-train-batch-size", 2, "--train-on", "assistant", "--save-strategy", "no"),
        *("--lr-scheduler-type", "constant", "--logging-steps", 20, "--sample-prompts", 0),
    )
    assert "trains 32,768 of 143,936 parameters" in said
    trained = answers(*load_run(str(run)))
    assert trained == list(FACTS.values())

    assert f"pushed to {hub.url}/org/tuned" in command(
        *("push", run, "--repo", "org/tuned", "--base-model", "org/base", "--no-samples")
    )
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.files("org/tuned").items():
        (pushed / name).write_bytes(content)
    strangers: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(pushed)).eval()
    assert answers(strangers, AutoTokenizer.from_pretrained(pushed)) == trained

    merged = tmp_path / "merged"
    command("merge", run, "--output", merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert answers(model, AutoTokenizer.from_pretrained(merged)) == trained

    command("export", run, "--to", "gguf", "--output", tmp_path / "gguf", "--no-check")
    file = {"gguf_file": "model.gguf"}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", **file)
    assert answers(read, AutoTokenizer.from_pretrained(tmp_path / "gguf", **file)) == trained
    assert "<|im_end|>" in (tmp_path / "gguf" / "Modelfile").read_text()
