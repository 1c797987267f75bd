"""`tunesmith export` writes the file, says what it compared, and what it left out."""

from pathlib import Path

import pytest
import typer
from gguf import GGUFReader
from typer.testing import CliRunner

from tests.ship.folders import byte_tokenizer, save
from tunesmith.cli.export import export
from tunesmith.cli.main import Commands

RUNNER = CliRunner()
APP = typer.Typer(cls=Commands)
APP.command()(export)
APP.command("other")(lambda: None)


def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", "llama", byte_tokenizer())


def test_the_file_its_modelfile_and_what_was_compared(tmp_path: Path) -> None:
    output = tmp_path / "out" / "tiny.gguf"
    result = RUNNER.invoke(
        APP, ["export", str(source(tmp_path)), "--to", "gguf", "--output", str(output), "--quant", "q8_0"]
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tokens equal: ")
    assert lines[1] == "tensors equal but for rounding: 21 of 21"
    assert lines[2].startswith("greedy tokens equal: ")
    assert lines[3] == f"{output} ({output.stat().st_size / 1e3:,.0f} kB)"
    modelfile = output.with_suffix(".Modelfile")
    assert lines[4:] == [f"{modelfile}: ollama create NAME -f {modelfile}"]
    assert "Writing tiny.gguf (q8_0)" in result.stderr
    assert {tensor.tensor_type.name for tensor in GGUFReader(output).tensors} == {"F32", "F16", "Q8_0"}
    assert modelfile.read_text().startswith("FROM ./tiny.gguf\n")


def test_without_the_check_nothing_is_compared(tmp_path: Path) -> None:
    result = RUNNER.invoke(APP, ["export", str(source(tmp_path)), "--output", str(tmp_path / "out"), "--no-check"])
    assert result.exit_code == 0, result.output
    assert "equal" not in result.output
    assert (tmp_path / "out" / "model.gguf").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "ggfu"], "error: --to is 'ggfu'; write gguf; did you mean 'gguf'?"),
        (["--quant", "f64"], "error: quant is 'f64'; write f32, f16, q8_0"),
    ],
)
def test_a_mistake_is_said_before_anything_is_loaded(tmp_path: Path, options: list[str], message: str) -> None:
    result = RUNNER.invoke(APP, ["export", "owner/nowhere", "--output", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert not (tmp_path / "out").exists()
