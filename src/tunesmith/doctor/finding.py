"""What a check of `tunesmith doctor` tells."""

from dataclasses import dataclass
from typing import Literal

Mark = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found. `means` says what follows from it for training, `mend` what to do where it is not ok. A
    `problem` keeps training from working."""

    name: str
    mark: Mark
    found: str
    means: str
    mend: str = ""

    def __post_init__(self) -> None:
        assert self.name
        assert self.found
        assert self.means
        assert bool(self.mend) == (self.mark != "ok")
