"""The report of a run holds what the run wrote, whole and alone, and no text of the data can break out of it."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from tests.report.browser import asked, look
from tests.report.test_inspect import HOSTILE
from tests.report.test_inspect import Reader as PageReader
from tests.report.written import SCRIPT, write_run
from tests.ship.runs import record
from tunesmith.errors import TunesmithError
from tunesmith.report.page import MOST_POINTS, Curve, amount, cut, folded, smoothed, svg, table
from tunesmith.report.page import SCRIPT as CURVES
from tunesmith.report.run_data import RunData, read_run
from tunesmith.report.run_html import (
    SHOWN_ANSWERS,
    Outcome,
    comparison,
    differences,
    distinct,
    final_loss,
    outcomes,
    page,
)
from tunesmith.runs.files import EXAMPLES, METRICS, SAMPLES, append, read, write
from tunesmith.runs.record import Method


class Reader(PageReader):
    """SVG closes some tags at once, as XML does."""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def words(self) -> str:
        return " ".join(data for _, data in self.text)


def without_style(html: str) -> str:
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


# What is in it


def test_the_page_holds_what_the_run_wrote(tmp_path: Path) -> None:
    reader = Reader(page(read_run(write_run(tmp_path / "run", text="a text of the run"))))
    for wanted in (
        *("40", "0.3", "1 min 20 s", "903", "org/base", "LoRA adapters, rank 4, alpha 8, on k_proj, q_proj", "1.00%"),
        *("Loss", "Learning rate", "Speed", "Gradient norm", "Memory", "loss nan: a text of the run"),
        *("What is two plus two?", "before training", "step 20", "a text of the run 0", "step 40, as in the data"),
        *("Hardest rows", "loss 3.25, usual then 0.4", "1 to 60", "61 to 120", "supervised tokens", "0.1 to 1"),
        *("learning_rate", "0.0002", "torch", "2.13.0", "checkpoint-20", "2 MB", "model: demo", "44.4%"),
    ):
        assert wanted in reader.words, wanted
    assert [tag for tag, _ in reader.tags].count("svg") == 5


def test_of_several_processes_the_page_has_each(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "Processes" not in Reader(page(read_run(folder))).words
    for fast, slow in ((300.0, 100.0), (200.0, 100.0)):
        processes = [
            {"tokens_per_second": fast, "waited": 0.5, "memory_mb": 1024.0},
            {"tokens_per_second": slow, "waited": 0.0, "memory_mb": 2048.0 if slow == fast / 3 else None},
        ]
        append(folder / METRICS, {"step": 41, "epoch": 1.0, "loss": 0.3, "processes": processes})
    words = Reader(page(read_run(folder))).words
    assert "waiting most memory 0 250 50% 1.1 GB 1 100 0% 2.1 GB Events" in " ".join(words.split())


def test_no_text_breaks_out_of_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>run", text=HOSTILE, method=Method(kind=HOSTILE))
    runs = [read_run(folder), read_run(write_run(tmp_path / "other", text=SCRIPT))]
    for html in (page(runs[0]), page(runs[1]), comparison(runs)):
        reader = Reader(html)
        tags = {tag for tag, _ in reader.tags}
        assert tags.isdisjoint({"img", "link", "iframe", "a", "foreignobject", "image"})
        assert [tag for tag, _ in reader.tags].count("script") == 1
        [script] = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in html
        assert script == CURVES.read_text(encoding="utf-8")
        attributes = [(name, value or "") for _, found in reader.tags for name, value in found.items()]
        assert not [name for name, _ in attributes if name.startswith("on") or name == "src"]
        assert all(value.startswith("#") for name, value in attributes if name == "href")
        assert "<b>run" not in html
    assert HOSTILE in Reader(page(runs[0])).words


def test_the_page_needs_nothing_from_elsewhere_and_is_small(tmp_path: Path) -> None:
    html = page(read_run(write_run(tmp_path / "run", steps=6_000)))
    assert not [word for word in ("http:", "https:", "@import", "src=") if word in html]
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "default-src 'none'" in html
    assert len(html) < 1_000_000
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = {*re.findall(r'href="#([^"]+)"', html), *re.findall(r"url\(#([^)]+)\)", html)}
    assert used <= set(ids)


def test_of_a_run_on_pairs_the_page_has_rewards_lengths_and_the_worst(tmp_path: Path) -> None:
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    history = tuple({"step": step, "logps/rejected": -9.0} | dict.fromkeys(names, 0.1 * step) for step in (1, 2))
    folder = write_run(tmp_path / "run", trainer="dpo", history=history)
    pair = {"margin": -1.5, "usual": 0.25, "step": 7, "prompt": "asked", "chosen": HOSTILE, "rejected": "worse"}
    lengths = [["the chosen answer is longer", 8, 6], ["the rejected answer is longer", 4, 1]]
    write(folder / EXAMPLES, (read(folder / EXAMPLES) or {}) | {"lengths_of_pairs": lengths, "worst_pairs": [pair]})
    html = without_style(page(read_run(folder)))
    for label in ("Rewards of chosen", "Margins", "Pairs whose chosen", "Log-probabilities of chosen"):
        assert f'aria-label="{label}' in html
    words = Reader(html).words
    assert "the chosen answer is longer 8 75%" in words
    assert "the rejected answer is longer 4 25%" in words
    assert "margin -1.5, usual then 0.25; step 7" in words
    assert HOSTILE in words
    assert "Worst pairs" not in page(read_run(write_run(tmp_path / "other")))


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert page(run) == page(run)


def test_secrets_are_blacked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "tell-nobody-1234")
    html = page(read_run(write_run(tmp_path / "run", text="the key tell-nobody-1234 and hf_" + "a" * 30 + " end")))
    assert "tell-nobody" not in html
    assert "hf_aaa" not in html
    assert "&lt;secret&gt;" in html or "<secret>" not in without_style(html)


def test_many_answers_are_shown_by_the_first_the_last_and_some_between(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for step in range(50, 90):
        append(folder / SAMPLES, {"step": step, "prompt": "a text", "expected": None, "answer": f"at {step}"})
    html = without_style(page(read_run(folder)))
    shown = html.split("<h3>Prompt 2</h3>")[1].split("<h2>")[0]
    assert shown.count('class="text"') == 1 + SHOWN_ANSWERS
    assert "before training" in shown
    assert "at 89" in shown


# What is read


def test_what_a_run_did_not_write_is_left_out(tmp_path: Path) -> None:
    record(settings={}).write(tmp_path / "saved")
    html = page(read_run(tmp_path / "saved"))  # from the trainer's history
    assert "Curves" in html
    assert "<h2>Samples" not in html
    killed = write_run(tmp_path / "killed")
    for name in ("run.json", "samples.jsonl", "examples.json", "preflight.json", "recipe.yaml"):
        (killed / name).unlink()
    with (killed / METRICS).open("a") as file:
        file.write('{"step": 41, "lo')
    run = read_run(killed)
    assert run.steps[-1].step == 40
    assert "was not saved" in page(run)
    assert "Settings" not in page(run)


def test_a_checkpoint_stands_for_its_run(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "run") / "checkpoint-20").name == "run"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl is not what a run writes there"),
        ("samples.jsonl", "[]\n", "samples.jsonl, line 1 is no JSON object"),
        ("examples.json", '{"rows": "many"}', "examples.json is not what a run writes there"),
        ("examples.json", "nonsense", "examples.json can't be read"),
        ("preflight.json", "[1]", "preflight.json can't be read: it holds list, not an object"),
        ("preflight.json", '{"splits": {"train": 3}}', "preflight.json is not what a run writes there"),
        ("metrics.jsonl", '{"step": "x", "loss": 1}\n', "metrics.jsonl is not what a run writes there"),
        ("run.json", "{}", "run.json can't be read"),
    ],
)
def test_a_file_that_is_damaged_is_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / file).write_text(content)
    with pytest.raises(TunesmithError, match=message):
        read_run(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="there is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(TunesmithError, match=r"has neither metrics.jsonl nor run.json"):
        read_run(tmp_path)


# Curves


def test_long_curves_are_thinned_to_their_course_and_their_extremes() -> None:
    points: list[tuple[float, float | None]] = [(i, 100.0 if i == 5_000 else 1.0) for i in range(20_000)]
    picture = svg([Curve(points=points, noisy=True)], label="loss")
    assert picture is not None
    assert picture.count("L ") < 6 * MOST_POINTS
    assert svg([Curve(points=[(1, None), (2, None)])], label="loss") is None
    assert svg([], label="loss") is None


def test_the_course_is_a_centred_mean_without_what_is_not_finite() -> None:
    import numpy as np

    found = smoothed(np.array([1.0, 2.0, np.nan, 4.0, 5.0]))
    assert found.tolist() == [1.5, 1.5, 3.0, 4.5, 4.5]
    assert smoothed(np.arange(400.0))[200] == 200.0


def test_the_loss_at_the_end_is_that_of_the_last_tenth(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    losses = [step.loss for step in run.steps if step.loss is not None]
    assert final_loss(run.steps) == pytest.approx(sum(losses[-4:]) / 4)
    assert final_loss(()) is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (amount(1234.5), "1,234"),
        (amount(0.00002), "2e-05"),
        (amount(0.123456), "0.1235"),
        (amount(None), ""),
        (cut("abcdef", 2), "ab … (4 more characters)"),
    ],
)
def test_values_are_written_for_people(found: str, expected: str) -> None:
    assert found == expected


# Several runs


def test_runs_are_compared_by_what_differs_and_where_they_ended(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run", settings={"learning_rate": 1e-4, "max_length": 512})
    second = write_run(tmp_path / "b" / "run", scale=2.0, settings={"learning_rate": 3e-4, "max_length": 512})
    runs = [read_run(first), read_run(second)]
    assert distinct(runs) == ["a/run", "b/run"]
    best = {item.name: item.best for item in outcomes(runs)}
    assert best["training loss, at the end"] == best["a text loss, lowest"] == 0
    assert best["most memory"] is None  # it is the same
    assert Outcome(name="n", values=(1.00001, 1.00002), better=min).best is None  # both are written 1
    html = comparison(runs)
    assert "learning_rate</td>" in html
    assert "max_length" not in html
    assert "other settings, counts and versions are the same" in html
    assert html.count("<svg") == 6
    assert "stroke: var(--s1)" in html


def test_one_run_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    html = comparison([run, run])
    assert "Nothing that the runs have written down" in html
    assert "run (2)" in html
    assert differences([{"a": "1"}, {}]) == [["a", "1", "n/a"]]
    bare = RunData(name="bare", folder=tmp_path)
    assert "n/a" in comparison([run, bare])


def test_cells_of_numbers_stand_to_the_right_and_the_best_is_marked() -> None:
    html = table(("", "a"), [("x", "1,5"), ("y", "n/a")], [1])
    assert html.count('class="n best"') == 1
    assert '<td class="n">n/a' in html


def test_what_an_answer_repeats_is_shown_twice() -> None:
    assert folded("So it goes. " * 40 + "End.") == "So it goes. So it goes.  … (38 more times)End."
    assert folded("a " * 30) == "a " * 30  # short enough
    assert folded("1. one\n2. two\n3. three\n" * 2) == "1. one\n2. two\n3. three\n" * 2


def test_what_hardly_changes_is_drawn_flat_and_in_whole_numbers() -> None:
    picture = svg([Curve(points=[(i, 1770.0 + 0.1 * (i % 5)) for i in range(60)])], label="MiB")
    assert picture is not None
    assert "1e3" not in picture
    assert {"1755", "1770", "1785"} & {*re.findall(r">(\d{4})<", picture)}


# In a browser


@pytest.mark.slow
def test_curves_can_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(read_run(write_run(tmp_path / "run", steps=100))), encoding="utf-8")
    answer = asked(
        path,
        tmp_path,
        """
        const curve = page.querySelector("svg.live"), box = curve.getBoundingClientRect(), bar = curve.parentElement;
        const said = [], ask = () => {
          curve.dispatchEvent(new frame.PointerEvent("pointermove", {clientX: box.right - 8, clientY: box.top + 9}));
          said.push(bar.querySelector("output").textContent);
        };
        ask();
        for (const button of bar.querySelectorAll("button")) { said.push(button.textContent); button.click(); ask(); }
        return said.join("; ");
        """,
    )
    assert answer == (
        "step 100: training 0.3001 · a text 0.3001; log; step 100: training 0.3001 · a text 0.3001; tokens; "
        "step 100, 10,000 tokens: training 0.3001 · a text 0.3001"
    )


@pytest.mark.slow
def test_a_browser_shows_the_pages_without_a_complaint_and_runs_nothing_of_the_data(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, text=SCRIPT, scale=scale)) for name, scale in (("a", 1.0), ("b", 1.5))]
    for name, html in (("report", page(runs[0])), ("comparison", comparison(runs))):
        path = tmp_path / f"{name}.html"
        path.write_text(html, encoding="utf-8")
        seen = look(path, tmp_path)
        assert seen.console == []
        assert "broken out" in seen.dom  # as a text
        assert "<h2>Curves</h2>" in seen.dom  # which the script would have replaced
        assert seen.picture.stat().st_size > 20_000


@pytest.mark.slow
def test_the_browser_test_would_see_a_script_that_runs_and_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(f"<title>t</title><h2>Curves</h2>{SCRIPT}<script>console.error('seen'); nothing()</script>")
    seen = look(path, tmp_path)
    assert "<h2>Curves</h2>" not in seen.dom
    assert any("seen" in line for line in seen.console)


@pytest.mark.parametrize(("set_to", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_fails_a_build_and_skips_elsewhere(
    set_to: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.report.browser.CHROMIUM", tmp_path / "none")
    monkeypatch.setenv("CI", set_to)
    with pytest.raises(outcome, match="the Debian package chromium"):
        look(tmp_path / "page.html", tmp_path)
