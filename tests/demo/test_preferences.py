"""What the demo on preferences makes of answers, and how it shows its counts."""

import pytest

from tunesmith.cli.demo import _show_preferences
from tunesmith.demo.orders import held_out_rows, training_rows
from tunesmith.demo.preferences import METRICS, Outcome, pairs_of
from tunesmith.demo.run import Score, right_answer
from tunesmith.evaluate.scores import scored


def test_wrong_answers_make_pairs_with_the_right_ones() -> None:
    rows = training_rows(3)
    right = right_answer(rows[1])
    pairs = pairs_of(rows, ["no order", right.replace(",", ", "), ""])  # spaces are no mistake
    assert [pair["chosen"][0]["content"] for pair in pairs] == [right_answer(rows[0]), right_answer(rows[2])]
    assert [pair["rejected"] for pair in pairs] == [
        [{"role": "assistant", "content": text}] for text in ("no order", "")
    ]
    assert pairs[0]["prompt"] == rows[0]["messages"][:2]


def test_shares_are_shown_with_intervals_and_only_answers_that_changed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = held_out_rows(4)
    right = list(map(right_answer, rows))
    before, after = [right[0], "[bold]wrong", "{}", "{}"], [*right[:3], "{}"]
    outcome = Outcome(
        supervised=48,
        answered=192,
        pairs=60,
        held_out=rows,
        before=Score(answers=before, exactly_right=0.25, valid_json=0.25),
        after=Score(answers=after, exactly_right=0.75, valid_json=0.75),
        results=[scored(metric, right, after, before, 1) for metric in METRICS],
        report=None,
    )
    _show_preferences(outcome)
    shown = capsys.readouterr().out
    assert "25% (5% to 70%)" in shown  # Wilson's intervals of 1 and 3 of 4
    assert "75% (30% to 95%)" in shown
    assert "[bold]wrong" in shown
    assert shown.count(rows[0]["messages"][1]["content"].splitlines()[0][:20]) == 0
