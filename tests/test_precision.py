"""The number format follows measured speeds, faked here for machines that are not at hand."""

from typing import Any

import pytest

from tunesmith import SFTConfig, TunesmithError
from tunesmith.precision import DTYPES, PrecisionName, decide, describe, measure

ZEN2: dict[PrecisionName, float] = {"fp32": 125.0, "bf16": 14.0, "fp16": 0.0}
ZEN4: dict[PrecisionName, float] = {"fp32": 160.0, "bf16": 400.0, "fp16": 0.0}
T4: dict[PrecisionName, float] = {"fp32": 4_000.0, "bf16": 2_500.0, "fp16": 25_000.0}
A100: dict[PrecisionName, float] = {"fp32": 15_000.0, "bf16": 250_000.0, "fp16": 255_000.0}
M1: dict[PrecisionName, float] = {"fp32": 2_000.0, "bf16": 2_100.0, "fp16": 2_200.0}


@pytest.mark.parametrize(
    ("speeds", "device", "expected"),
    [
        (ZEN2, "cpu", "fp32"),
        (ZEN4, "cpu", "bf16"),
        (T4, "cuda", "fp16"),
        (A100, "cuda", "bf16"),
        (M1, "mps", "fp32"),
        ({"fp32": 10.0, "bf16": 0.0, "fp16": 100.0}, "mps", "fp32"),
    ],
    ids=["zen2", "zen4", "t4", "a100", "m1: little gain", "fp16 without a scaler"],
)
def test_the_format_follows_the_speeds(speeds: dict[PrecisionName, float], device: str, expected: str) -> None:
    assert decide(speeds, device) == expected


def test_a_real_measurement_gives_every_format_a_speed_and_describes_it() -> None:
    speeds = measure("cpu")
    assert speeds.keys() == DTYPES.keys()
    assert speeds["fp32"] > 0
    assert speeds["fp16"] == 0
    assert "fp32 " in describe("fp32", speeds, "cpu")
    assert "fp16" not in describe("fp32", speeds, "cpu")


def test_auto_takes_the_measured_format_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.settings.config.measure", lambda device: ZEN4)
    config = SFTConfig(output_dir="unused")
    assert (config.precision, config.bf16, config.fp16) == ("bf16", True, False)
    assert "bf16 400" in config.precision_note
    assert SFTConfig(**config.to_dict()).precision == "bf16"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"bf16": False}, "fp32"), ({"bf16": True, "use_cpu": True}, "bf16"), ({"precision": "fp32"}, "fp32")],
)
def test_what_the_user_says_is_not_measured(
    given: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.settings.config.measure", lambda device: pytest.fail("measured"))
    assert SFTConfig(output_dir="unused", **given).precision == expected


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(TunesmithError, match="precision is 'fp32', but bf16 and fp16 say bf16"):
        SFTConfig(output_dir="unused", precision="fp32", bf16=True)
