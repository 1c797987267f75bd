"""How the memory of a step grows with the rows of a batch and their length, from three steps that are counted.

Every tensor of a step has a size that does not depend on the batch, or is in proportion to its tokens, or, where
attention makes its scores, to the square of the length. So what is alive at each moment is a + rows * (b * length +
c * length^2), and the peak is the largest of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.plan.footprint import Bytes, Timeline

LEAST, MOST = 1024, 4096
"""The longest of the three lengths: below, the loss takes less than a whole chunk; above, counting takes long."""

Law = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """The `a`, `b` and `c` of each kind at each moment, and of a layer's backward."""

    moments: Sequence[dict[str, Law]]
    layer: Law

    def at(self, rows: int, length: int) -> Timeline:
        moments = [Bytes({kind: int(_at(law, rows, length)) for kind, law in laws.items()}) for laws in self.moments]
        return Timeline(moments=moments, layer=_at(self.layer, rows, length))


def growth(counted: Callable[[int, int], Timeline], rows: int, length: int) -> Growth:
    """The growth around batches of `rows` and `length`, where `counted` gives the step of any."""
    rows = min(rows, 2)  # more documents go the way of two
    longest = min(max(length, LEAST), MOST)
    lengths = (longest // 4, longest // 2, longest)
    steps = [counted(rows, length) for length in lengths]
    moments = []
    for moment in zip(*(step.moments for step in steps), strict=True):
        kinds = {kind for kinds in moment for kind in kinds}
        moments.append({kind: _law([kinds[kind] for kinds in moment], rows, lengths) for kind in kinds})
    return Growth(moments=moments, layer=_law([step.layer for step in steps], rows, lengths))


def _at(law: Law, rows: int, length: int) -> float:
    a, b, c = law
    return max(0.0, a + rows * (b * length + c * length**2))


def _law(sizes: Sequence[float], rows: int, lengths: Sequence[int]) -> Law:
    """The polynomial through three points."""
    (x, y, z), (u, v, w) = lengths, sizes
    first, second = (v - u) / (y - x), (w - v) / (z - y)
    c = (second - first) / (z - x)
    if abs(c) * z < 0.02 * abs(second):  # from sizes that are rounded to blocks, and chunks of the loss
        c = 0.0
        first = (w - v) / (z - y)
    b = first - c * (x + y)
    return w - b * z - c * z**2, b / rows, c / rows
