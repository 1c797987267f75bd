"""The number format follows measured speeds, faked here for machines that are not at hand."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tunesmith import SFTConfig, TunesmithError
from tunesmith.model.precision import (
    DTYPES,
    PrecisionName,
    compute_dtype,
    decide,
    describe,
    measure,
    settle_precision,
)
from tunesmith.runs.checkpoints import Identity, Manifest

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


def test_a_busy_machine_has_some_speed_and_not_0() -> None:
    speeds: dict[PrecisionName, float] = {"fp32": 1234.5, "bf16": 0.312, "fp16": 0.0}
    expected = "precision fp32: matrix products on a core of this cpu in GFLOP/s: fp32 1,234, bf16 0.31"
    assert describe("fp32", speeds, "cpu") == expected


def test_a_format_that_is_a_hundred_times_slower_costs_no_more_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """124 and 1 GFLOP/s: one large product takes 0.9 s there."""
    spent: list[float] = []

    def product(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, ...]:
        seconds = 2e-9 * size**3 / (1.0 if dtype == torch.bfloat16 else 124.0)
        spent.extend([seconds, seconds])
        return seconds, seconds

    monkeypatch.setattr("tunesmith.model.precision._seconds", product)
    speeds = measure.__wrapped__("cpu")
    assert speeds == {"fp32": pytest.approx(124.0), "bf16": pytest.approx(1.0), "fp16": 0.0}
    assert sum(spent) < 0.25


def test_where_all_products_are_slow_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []

    def product(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, ...]:
        spent.extend([2e-9 * size**3 / 0.5] * 2)
        return spent[-1], spent[-1]

    monkeypatch.setattr("tunesmith.model.precision._seconds", product)
    assert measure.__wrapped__("cpu")["fp32"] == pytest.approx(0.5)
    assert sum(spent) < 1.0


def auto(**settings: Any) -> SFTConfig:
    common: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "report_to": "none"}
    return SFTConfig(**common | settings)


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.model.precision.measure", lambda device: pytest.fail("measured"))


def test_a_config_stays_open_until_a_run_settles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    config = auto()
    assert (config.precision, config.bf16, config.fp16) == ("auto", None, False)
    assert SFTConfig(**config.to_dict()).precision == "auto"
    monkeypatch.setattr("tunesmith.model.precision.measure", lambda device: ZEN4)
    note = settle_precision(config)
    assert "bf16 400" in note
    assert (config.precision, config.bf16, config.fp16) == ("bf16", True, False)
    assert SFTConfig(**config.to_dict()).precision == "bf16"
    unmeasured(monkeypatch)
    assert settle_precision(config) == note


@pytest.mark.parametrize(
    "settings", [{}, {"eval_strategy": "steps", "torch_compile": True}, {"max_tokens_per_batch": 4096}], ids=str
)
@pytest.mark.parametrize(("speeds", "flag"), [(ZEN4, {"bf16": True}), (ZEN2, {"bf16": False})], ids=["bf16", "fp32"])
def test_a_settled_config_equals_one_that_was_made_with_the_flag(
    speeds: dict[PrecisionName, float],
    flag: dict[str, bool],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tunesmith.model.precision.measure", lambda device: speeds)
    settled, flagged = auto(**settings), auto(**settings, **flag)
    settle_precision(settled)
    assert settled.mixed_precision == ("bf16" if flag["bf16"] else "no")
    others: dict[str, Any] = {"precision_note": "", "distributed_state": None}  # the latter is compared by identity
    assert vars(settled) | others == vars(flagged) | others


def test_a_run_that_goes_on_takes_the_precision_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, precision in ((2, "fp32"), (10, "bf16"), (12, "x")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        same = Identity(data={}, settings={}, model={})
        manifest = Manifest(
            step=step, identity=same, precision=precision, onednn=False, environment={}, versions={}, files={}
        )
        (folder / "manifest.json").write_text(manifest.to_json())
    (tmp_path / "checkpoint-14").mkdir()  # another tool's, without a manifest

    def settled(resume: Any, **settings: Any) -> SFTConfig:
        config = auto(output_dir=str(tmp_path), resume_from_checkpoint=resume, **settings)
        settle_precision(config)
        return config

    assert settled(None).precision == "fp32"
    assert settled("nowhere").precision == "fp32"
    unmeasured(monkeypatch)
    newest = settled(True)
    assert (newest.precision, newest.bf16, newest.mixed_precision) == ("bf16", True, "bf16")
    assert newest.precision_note.startswith(f"precision bf16: as in {tmp_path / 'checkpoint-10'}")
    assert settled(str(tmp_path / "checkpoint-2")).precision == "fp32"
    assert settled(True, precision="fp32").precision == "fp32"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"bf16": False}, "fp32"), ({"bf16": True, "use_cpu": True}, "bf16"), ({"precision": "fp32"}, "fp32")],
)
def test_what_the_user_says_is_not_measured(
    given: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmeasured(monkeypatch)
    config = SFTConfig(output_dir="unused", **given)
    assert settle_precision(config) == ""
    assert config.precision == expected


@pytest.mark.parametrize("name", get_args(PrecisionName))
def test_frozen_weights_have_the_precision_of_the_run(name: PrecisionName) -> None:
    assert compute_dtype(auto(precision=name)) == DTYPES[name]


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(TunesmithError, match="precision is 'fp32', but bf16 and fp16 say bf16"):
        SFTConfig(output_dir="unused", precision="fp32", bf16=True)
