"""What was tried, counted."""

import os
from collections import Counter

FIGURES: Counter[str] = Counter()
LONG = os.environ.get("TUNESMITH_FAULTS") == "long"
