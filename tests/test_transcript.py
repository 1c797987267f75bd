"""What transcripts are compared by: the numbers of a machine don't count, words and all other numbers do."""

import pytest

from tests.transcript import stable

STEP = "step 8/24  loss 0.9979  238 tokens/s  43% supervised  peak 1.4 GB  15 s left\n"


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (
            "ok    processor       AMD EPYC, 2 of 2 cores usable, 2 threads; AVX2,\n                      bf16\n",
            "note  processor       Xeon, 4 of 8 cores usable, 4 threads; AVX2\n",
        ),
        ("in GFLOP/s: fp32 102, bf16 1,220\n", "in GFLOP/s: fp32 40, bf16 4\n"),
        (STEP, "step 8/24  loss 1.1  9 tokens/s  44% supervised  peak 1.5 GB  90 s left\n"),
        ("  optimizer                     1.08    0.04\n", "  optimizer                    11.08    0.04\n"),
        ("│ json_equal │ 0% (0, 32) │  +75 (+24, +96) │\n", "│ json_equal │ 12% (2, 47) │ +6 (-1, +9) │\n"),
        (
            "cut off: 5 base answers did not end within 72 tokens, which lowers scores (a, line 9); raise\n",
            "cut off: 2 tuned and 4 base answers did not end within 72 tokens, which lowers scores (b, line 1; b, "
            "line 2; b, line 5; ...); raise\n",
        ),
    ],
)
def test_what_a_machine_measures_does_not_count(here: str, there: str) -> None:
    assert stable(here) == stable(there)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (STEP, STEP.replace("left", "to go")),
        (STEP, STEP.replace("/24", "/25")),
        (STEP, STEP.replace("8/", "9/")),
        (STEP + STEP.replace("8/", "16/"), STEP),
        (STEP + STEP, STEP),
        (STEP, "steps 8/24\n" + STEP),
        ("train: 48 rows, 2,360 supervised (44%)", "train: 47 rows, 2,360 supervised (44%)"),
        ("ok    GPU             none that torch can use", "ok    GPU             none that torch has"),
        ("ok    memory          25.3 GB, 24.5 GB available", "ok    memory          25.3 GB, 24.5 GB unused"),
        ("│ json_equal │    8 │ 0% (0, 32) │", "│ json_same  │    8 │ 0% (0, 32) │"),
        ("learning_rate: 1e-3  # usual", "learning_rate: 2e-4  # usual"),
    ],
)
def test_words_and_other_numbers_count(before: str, after: str) -> None:
    assert stable(before) != stable(after)
