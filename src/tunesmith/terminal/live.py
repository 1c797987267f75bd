"""What a person sees of a run on a terminal: its numbers, drawn anew in place.

Nothing here knows of a trainer; `progress` fills in the numbers, and another thread draws them.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith.text import clock, size

BARS = "▁▂▃▄▅▆▇█"
REFRESH_PER_SECOND = 2
EVENTS_SHOWN = 4
"""While training; when it is over, there is room for more."""
EVENTS_AT_THE_END = 20
CELL = 24
"""Columns of the terminal for one number with its name."""
WIDEST = 100
SHORTEST_BAR = 8
SMOOTHING = 0.9
"""How much of a speed or a share that is shown comes from the steps before."""


def can_draw(console: Console) -> bool:
    """Whether a view can be drawn anew in place: on a terminal that can go back, and not in a CI's log."""
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal and not in_ci


class Curve:
    """Numbers of any count in bounded memory: when there are too many, neighbours become their mean."""

    def __init__(self, most: int = 512) -> None:
        self._most, self._each = most, 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """One more; what is not finite has no place on a curve."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) >= self._most:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means, self._each = [(first + second) / 2 for first, second in pairs], 2 * self._each

    def sparkline(self, width: int) -> str:
        """The curve in at most `width` characters, between its lowest and its highest value."""
        if not self._means:
            return ""
        count = min(len(self._means), max(width, 1))
        edges = [i * len(self._means) // count for i in range(count + 1)]
        values = [sum(self._means[i:j]) / (j - i) for i, j in pairwise(edges)]
        low, high = min(values), max(values)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(BARS[round((value - low) * scale)] for value in values)


@dataclass(kw_only=True)
class Snapshot:
    """Where a run is. `curve` is of the loss, or of the reward in a run that learns from rewards. Sizes in MiB, times
    in seconds, shares in [0, 1]; None is what is not known yet."""

    output: str
    total: int
    epochs: float
    step: int = 0
    epoch: float = 0.0
    phase: str = "training"
    loss: float | None = None
    reward: float | None = None
    curve: Curve = field(default_factory=Curve)
    eval_losses: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    speed: float | None = None
    supervised: float | None = None
    memory: float | None = None
    peak: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    left: float | None = None
    events: list[str] = field(default_factory=list)
    over: bool = False
    began: float = field(default_factory=time.perf_counter)

    def take(self, line: Mapping[str, Any]) -> None:
        """The numbers of a step, as a line of `metrics.jsonl` has them; other lines change nothing."""
        if line.get("loss") is None:
            return
        self.loss, self.memory = line["loss"], line["memory_mb"]
        self.reward = line.get("reward", self.reward)
        shown = line["loss"] if self.reward is None else line.get("reward")
        if shown is not None:
            self.curve.add(shown)
        self.peak = max(self.peak or 0.0, self.memory) if self.memory else self.peak
        self.grad_norm, self.learning_rate = line["grad_norm"], line["learning_rate"]
        self.supervised = _blended(self.supervised, line["supervised_tokens"] / max(line["tokens"], 1))
        if line["tokens_per_second"]:
            self.speed = _blended(self.speed, line["tokens_per_second"])

    def numbers(self) -> list[tuple[str, str]]:
        """What is known, with its name."""
        sizes = {"memory": self.memory, "peak": self.peak}
        return [
            *((name, f"{value:.4f}") for name, value in self.eval_losses.items()),
            *([("best", f"{self.best:.4f}")] if self.best is not None else []),
            ("tokens/s", _number(self.speed, ",.0f")),
            ("supervised", _number(self.supervised, ".0%")),
            *((name, "-" if mib is None else size(mib * 2**20)) for name, mib in sizes.items()),
            ("grad norm", _number(self.grad_norm, ".3g")),
            ("lr", _number(self.learning_rate, ".2e")),
            ("elapsed", clock(time.perf_counter() - self.began)),
            *([] if self.over else [("left", clock(self.left))]),
        ]


def _blended(before: float | None, value: float) -> float:
    return value if before is None else SMOOTHING * before + (1 - SMOOTHING) * value


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


class RunView:
    """`snapshot` as lines for a terminal of any width."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A line that fills its row wraps when the window gets smaller, and its end would stay behind.
        width = min(options.max_width - 1, WIDEST)
        now = self.snapshot
        name, value = ("loss", now.loss) if now.reward is None else ("reward", now.reward)
        shown = Text.assemble((f"{name} ", "dim"), (_number(value, ".4f"), "bold"), " ")
        yield self._head(width)
        yield _line(shown.append(now.curve.sparkline(width - shown.cell_len), "cyan"), width)
        yield self._numbers(width)
        yield from self._events(width)
        yield _line(Text.assemble(("output ", "dim"), now.output), width)

    def _head(self, width: int) -> Table:
        """Narrow terminals do without the epoch, very narrow ones without the bar."""
        now = self.snapshot
        share = now.step / now.total if now.total else 0.0
        parts = [Text(now.phase, "bold"), Text(f"{now.step}/{now.total} {share:4.0%}")]
        epoch = Text(f"epoch {now.epoch:.2f}/{now.epochs:g}", "dim")
        free = width - sum(part.cell_len + 1 for part in parts)
        if free - epoch.cell_len - 1 >= SHORTEST_BAR:
            parts.append(epoch)
            free -= epoch.cell_len + 1
        head = Table.grid(padding=(0, 1))
        if free < SHORTEST_BAR:
            head.add_row(_line(Text(" ").join(parts), width))
        else:
            bar = ProgressBar(total=max(now.total, 1), completed=now.step, width=free)
            head.add_row(parts[0], bar, *parts[1:])
        return head

    def _numbers(self, width: int) -> Table:
        numbers = self.snapshot.numbers()
        across = max(1, min(4, width // min(CELL, max(width // 2, 16))))
        table = Table.grid(padding=(0, 1))
        cell = (width - across) // across
        for _ in range(across):
            table.add_column(width=cell, no_wrap=True, overflow="ellipsis")
        for i in range(0, len(numbers), across):
            table.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in numbers[i : i + across]))
        return table

    def _events(self, width: int) -> Iterator[Text]:
        now = self.snapshot
        shown = now.events[-(EVENTS_AT_THE_END if now.over else EVENTS_SHOWN) :]
        if len(shown) < len(now.events):
            yield _line(Text(f"{len(now.events) - len(shown)} earlier events", "dim"), width)
        for event in shown:
            text = Text.assemble(("• ", "yellow"), event)
            yield text if now.over else _line(text, width)


def _line(text: Text, width: int) -> Text:
    """One line: while it moves, the view keeps its height."""
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


class ResizableLive(Live):
    """Starts on a clean screen when the width of the window changes: the terminal has moved what was drawn."""

    def __init__(self, view: RunView, console: Console) -> None:
        super().__init__(view, console=console, refresh_per_second=REFRESH_PER_SECOND, vertical_overflow="crop")
        self._width = console.width

    def refresh(self) -> None:
        with self._lock:
            if self.console.width != self._width:
                self._width = self.console.width
                self.console.control(Control.home(), Control.clear())
                self._live_render._shape = None  # there is nothing above to go back to
            super().refresh()
