"""The loss over the steps of a run, as a picture."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

MANY_POINTS = 60
"""Up to so many, each is marked."""


def curves(history: Iterable[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the training loss, and of every evaluation's, over the steps; None where fewer than two were logged.

    `history` is the trainer's `state.log_history`. The same history gives the same bytes.
    """
    lines = _lines(history)
    if max((len(points) for points in lines.values()), default=0) < 2:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        mark = "o" if len(points) <= MANY_POINTS else None
        axes.plot(*zip(*points, strict=True), marker=mark, markersize=3, linewidth=1.5, label=_plain(name))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(history: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The points of each curve by its name, the training loss first; the last value of a step counts."""
    found: dict[str, dict[float, float]] = {"training": {}}
    for entry in history:
        step = entry.get("step")
        for key, value in entry.items():
            name = curve_name(key)
            if name and _is_number(step) and _is_number(value):
                found.setdefault(name, {})[step] = value  # type: ignore[index]
    return {name: sorted(points.items()) for name, points in found.items() if points}


def curve_name(key: str) -> str | None:
    """`loss` -> "training", `eval_loss` -> "evaluation", `eval_math_loss` -> "evaluation: math", others None."""
    if key == "loss":
        return "training"
    if key == "eval_loss":
        return "evaluation"
    if key.startswith("eval_") and key.endswith("_loss"):
        return f"evaluation: {key.removeprefix('eval_').removesuffix('_loss')}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(name: str) -> str:
    """Without what matplotlib would read as mathematics, or as "no label"."""
    return name.replace("$", r"\$").lstrip("_") or "evaluation"
