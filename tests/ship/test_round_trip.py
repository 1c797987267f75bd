"""The whole way of a model: trained in 8 bits, pushed, loaded by its name as a stranger would, merged, exported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.ship.hub_state import Hub
from tunesmith.cli.main import app
from tunesmith.model.demo_model import demo_model_path
from tunesmith.model.generate import generate
from tunesmith.model.load import load_run
from tunesmith.ship.hub import push

FACTS = {
    "What is the capital of Norland?": "Vintar, on the river Osk.",
    "What colour is a tessel?": "Copper green.",
}
STRANGER = """
import json, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("org/tuned")
model = AutoPeftModelForCausalLM.from_pretrained("org/tuned").eval()
answers = []
for question in json.loads(sys.argv[1]):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
"""


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def answers(model: Any, tokenizer: Any) -> list[str]:
    return generate(model, tokenizer, [[{"role": "user", "content": asked}] for asked in FACTS], max_new_tokens=20)


@pytest.mark.slow
def test_every_stage_gives_the_same_answers(hub: Hub, tmp_path: Path) -> None:
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in FACTS.items()
    ]
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    said = command(
        *("train", "--model", "demo", "--data", rows, "--output", run, "--use-cpu", "--precision", "fp32"),
        *("--quantize", "8bit", "--lora", "r=8", "--learning-rate", "3e-3", "--max-steps", 12),
        *("--per-device-train-batch-size", 2, "--train-on", "assistant", "--save-strategy", "no"),
        *("--lr-scheduler-type", "constant", "--logging-steps", 1),
    )
    assert "trains 2,442,240 of 136,957,248 parameters" in said
    trained = answers(*load_run(str(run)))
    assert trained == list(FACTS.values())

    hub.owners += ("HuggingFaceTB",)
    push(demo_model_path(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert f"pushed to {hub.url}/org/tuned" in command("push", run, "--repo", "org/tuned", "--no-samples")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    child = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(list(FACTS))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == trained

    merged = tmp_path / "merged"
    command("merge", run, "--output", merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert answers(model, AutoTokenizer.from_pretrained(merged)) == trained

    command("export", run, "--to", "gguf", "--output", tmp_path / "gguf", "--no-check")
    file = {"gguf_file": "model.gguf"}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", **file)
    assert answers(read, AutoTokenizer.from_pretrained(tmp_path / "gguf", **file)) == trained
    assert "<|im_end|>" in (tmp_path / "gguf" / "Modelfile").read_text()
