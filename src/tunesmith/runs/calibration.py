"""How a reward model did on pairs, beside its run: `tunesmith eval` writes it, and the report shows it."""

from dataclasses import dataclass
from pathlib import Path

from tunesmith.runs.files import as_json, from_json, read, unreadable, write

PAIRS = "pairs.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """The pairs of which the model takes one answer to be the better one with a probability from `low` to `high`, the
    sigmoid of the margin of their rewards: the mean of these, `predicted`, and the share of `pairs` of which it is the
    better one, `observed`."""

    low: float
    high: float
    pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """What a reward model says of the `pairs` of `data`: the share of those whose chosen answer has the higher reward,
    and the mean margin, each with its 95% interval (None of a single pair); `bins` with a pair in them."""

    data: str
    pairs: int
    accuracy: tuple[float, float | None, float | None]
    margin: tuple[float, float | None, float | None]
    bins: tuple[Bin, ...]

    @property
    def error(self) -> float:
        """The mean over pairs of how far the predicted probability of their bin is from the observed share (expected
        calibration error; Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602)."""
        return sum(item.pairs * abs(item.predicted - item.observed) for item in self.bins) / self.pairs

    def write(self, folder: Path) -> Path:
        """Writes the file into the folder of a run, and returns its path."""
        write(folder / PAIRS, as_json(self))
        return folder / PAIRS

    @classmethod
    def read(cls, folder: Path) -> "PairScores | None":
        """What is in the folder of a run; None where nothing is. Raises TunesmithError for a file of another kind."""
        values = read(folder / PAIRS)
        if values is None:
            return None
        try:
            scores: PairScores = from_json(values, cls)
        except ValueError as error:
            raise unreadable(folder / PAIRS, error) from error
        return scores
