"""`tunesmith report` writes one page about a run or several; `tunesmith train` writes that of its own run."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.refusing import needs_proc
from tests.report.browser import look, measured
from tests.report.written import write_run
from tunesmith.cli.main import Commands
from tunesmith.cli.main import app as tunesmith
from tunesmith.cli.report import report
from tunesmith.runs.files import METRICS, SAMPLES, append, read_lines
from tunesmith.runs.record import RunRecord

RUNNER = CliRunner()
WIDTHS = (1200, 400)
"""Of a desk's screen, and of a phone's, in pixels."""
app = typer.Typer(cls=Commands)
app.command()(report)


@app.callback()
def options() -> None:
    """So that the command keeps its name."""


def test_a_report_goes_into_the_run_and_a_comparison_into_the_first(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    result = RUNNER.invoke(app, ["report", runs[0]])
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'one' / 'report.html'} (" in result.stdout
    assert "<h1>one</h1>" in (tmp_path / "one" / "report.html").read_text()
    assert RUNNER.invoke(app, ["report", *runs]).exit_code == 0
    assert "2 runs beside each other" in (tmp_path / "one" / "comparison.html").read_text()
    assert sorted(path.name for path in (tmp_path / "two").glob("*.html")) == []


def test_the_page_goes_where_it_is_told(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run"))
    append(tmp_path / "run" / SAMPLES, {"step": 3, "prompt": "lone \ud800 surrogate", "answer": "\udc80"})
    assert RUNNER.invoke(app, ["report", run, "--output", str(tmp_path / "page.html")]).exit_code == 0
    assert (tmp_path / "page.html").is_file()
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder"),
        (["."], "is no run that can be reported on"),
        (["run", "--output", "run"], "is a folder; give the file to write"),
        (["run", "--output", "none/page.html"], "there is no folder"),
        pytest.param(["run", "--output", "/proc/page.html"], "; name another file with --output", marks=needs_proc),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["report", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.reports
def test_training_leaves_a_report_with_answers_before_and_after(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}
    other = {"messages": [{"role": "user", "content": "say no"}, {"role": "assistant", "content": "no"}]}
    for name, rows in (("rows", [row] * 16), ("held", [other] * 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    needed = ["train", "--model", str(tiny_model), "--data", str(tmp_path / "rows.jsonl"), "--use-cpu"]
    needed += ["--eval-data", str(tmp_path / "held.jsonl"), "--output", str(tmp_path / "run")]
    result = RUNNER.invoke(tunesmith, [*needed, "--max-steps", "2", "--sample-prompts", "3"])
    assert result.exit_code == 0, result.output
    assert f"how it went:  {tmp_path / 'run' / 'report.html'}" in result.stdout
    html = (tmp_path / "run" / "report.html").read_text()
    for wanted in ("say no", "before training", "step 2", "Hardest rows", "learning_rate", "model: "):
        assert wanted in html, wanted
    assert [line["step"] for line in read_lines(tmp_path / "run" / SAMPLES)] == [0, 2]
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert len(record.samples) == 1
    monkeypatch.chdir(tmp_path)
    needed[-1] = "run"
    result = RUNNER.invoke(tunesmith, [*needed, "--max-steps", "1"])
    assert result.exit_code == 0, result.output
    assert "how it went:  run/report.html\nsaved the model to run\n" in result.stdout  # named as it was asked for
    told = RUNNER.invoke(tunesmith, ["report", "run/checkpoint-1"]).stdout
    assert re.fullmatch(r"wrote run/report\.html \(\d+ kB\); open it in a browser\n", told)
    assert not (tmp_path / "run" / SAMPLES).exists()  # nothing is generated unless it is asked for; nor left
    assert [line["step"] for line in read_lines(tmp_path / "run" / METRICS) if "loss" in line] == [1]


@pytest.fixture(scope="module")
def pages(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a run that evaluated and answered on the way, and of that run beside another."""
    folder = tmp_path_factory.mktemp("pages")
    rows, runs = folder / "rows.jsonl", [folder / "one", folder / "two"]
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes " * 30}]}
    rows.write_text(f"{json.dumps(row)}\n" * 16)
    needed = ["train", "--model", str(tiny_model), "--data", str(rows), "--eval-data", str(rows), "--use-cpu"]
    needed += ["--precision=fp32", "--eval-strategy=steps", "--eval-steps=3", "--max-steps=6", "--logging-steps=1"]
    commands = [
        [*needed, "--sample-prompts=1", "--output", str(run), "--learning-rate", rate]
        for run, rate in zip(runs, ("1e-3", "2e-3"), strict=True)
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TUNESMITH_HOME", str(folder / "home"))
        for command in (*commands, ["report", *map(str, runs)]):
            result = RUNNER.invoke(tunesmith, command)
            assert result.exit_code == 0, result.output
    return {"report": runs[0] / "report.html", "comparison": runs[0] / "comparison.html"}


# In each panel: training and evaluation in one, or one curve of each of two runs.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "panels", "curves"), [("report", 5, 6), ("comparison", 6, 12)])
def test_a_browser_draws_every_curve_of_a_real_run(
    name: str, panels: int, curves: int, pages: dict[str, Path], tmp_path: Path
) -> None:
    seen = look(pages[name], tmp_path)
    assert seen.console == []
    assert seen.dom.count("<svg") == 2 * panels  # the pictures, and in their places those that can be asked
    assert seen.dom.count('class="live"') == seen.dom.count('class="still"') == panels
    assert len(re.findall(r"fill: none; stroke: var\(--s\d\)", seen.dom)) == curves
    assert len(re.findall(r'class="c\d d\d"', seen.dom)) == curves


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_sticks_out_or_gets_too_small_to_read_on_a_desk_or_on_a_phone_light_or_dark(
    name: str, pages: dict[str, Path], tmp_path: Path
) -> None:
    for dark, background in ((False, "rgb(255, 255, 255)"), (True, "rgb(20, 23, 26)")):
        for width, found in zip(WIDTHS, measured(pages[name], tmp_path, widths=WIDTHS, dark=dark), strict=True):
            assert (found.needed, found.background) == (width, background)
            assert found.smallest >= 8
