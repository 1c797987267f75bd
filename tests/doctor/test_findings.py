"""Whatever `tunesmith doctor` finds, it says what that means, and how to mend what is not ok."""

import ast
import sys
from pathlib import Path

import pytest

from tests.doctor.cases import CASES, gpu_with_wrong_kernel
from tunesmith.doctor import checks
from tunesmith.doctor.checks import Finding


def found_in(name: str, patch: pytest.MonkeyPatch) -> list[Finding]:
    with patch.context() as faked:
        CASES[name].fake(faked)
        return list(CASES[name].check())


@pytest.mark.parametrize("name", CASES)
def test_every_finding_says_what_it_means_and_how_to_mend_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_in(name, monkeypatch)
    assert [finding.mark for finding in found] == CASES[name].marks
    for finding in found:
        assert finding.means.endswith(".")
        assert bool(finding.mend) == (finding.mark != "ok")
        assert not finding.found.endswith(".")  # it begins a sentence, or ends a line
        assert "\n" not in finding.found + finding.means + finding.mend


def test_a_finding_without_a_meaning_or_a_way_to_mend_it_cannot_be_made() -> None:
    for wrong in ({"mark": "ok", "means": ""}, {"mark": "note", "means": "Slow."}, {"mark": "problem", "means": "No."}):
        with pytest.raises(AssertionError):
            Finding(name="one", found="two", **wrong)  # type: ignore[arg-type]


def test_every_finding_that_the_code_can_make_is_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[int] = set()

    def note(self: Finding) -> None:
        frame = sys._getframe(2)  # behind `__init__`
        if frame.f_code.co_name in ("ok", "note", "problem"):
            frame = sys._getframe(3)
        made.add(frame.f_lineno)

    monkeypatch.setattr(Finding, "__post_init__", note)
    for name in CASES:
        found_in(name, monkeypatch)
    written = {
        node.lineno
        for node in ast.walk(ast.parse(Path(checks.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("Finding", "Finding.ok", "Finding.note", "Finding.problem")
    }
    assert len(written) > 20
    assert written <= made


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("old processor", "AVX2"),
        ("old driver", "update the NVIDIA driver"),
        ("cpu build", "CUDA build"),
        ("no product", "use_cpu"),
        ("failing product", "a small 4bit product fails on cpu: Native code method attempted to call"),
        ("failing product", "pip install --force-reinstall --no-deps 'bitsandbytes"),
        ("wrong product", "a small 8bit product on cpu and its gradient are 1"),
        ("unimportable bitsandbytes", "can't be imported: libbitsandbytes.so: cannot open shared object file"),
        ("bitsandbytes of other devices", "runs on cuda"),
        ("old bitsandbytes", "0.45.0; <1,>=0.46.1 is needed"),
        ("attention in one kernel", "; attention takes PyTorch's varlen attention"),
        ("attention without a kernel", "pip install --upgrade torch"),
        ("attention on an old gpu", "from Ampere on"),
        ("attention with a wrong kernel", "differ from plain attention's"),
        ("unknown token", "ReadTimeout: slow"),
        ("check without a library", "could not be looked at: ImportError: no module torch"),
    ],
)
def test_what_is_said_of_it(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found_in(name, monkeypatch)[-1]
    assert said in f"{finding.found} {finding.means} {finding.mend}"


def test_why_a_kernel_is_not_taken_is_in_the_finding_and_not_printed_beside_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu_with_wrong_kernel(monkeypatch)
    [finding] = checks.flash_attention()
    assert "PyTorch's varlen attention is not used for attention" in finding.found
    assert caplog.messages == []


def test_the_requirement_is_that_of_the_package() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'quant = ["{checks.BITSANDBYTES}"]' in project
