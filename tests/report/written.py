"""The folder of a run as training leaves it, made up: to be read back and shown."""

import math
from pathlib import Path
from typing import Any

from tests.ship.runs import QUESTION, record
from tunesmith.runs.files import EXAMPLES, METRICS, PREFLIGHT, SAMPLES, append, write

SCRIPT = "</pre></div></title></style><script>document.body.innerHTML = 'broken out'</script><img src=x onerror=x=1>"


def write_run(folder: Path, *, steps: int = 40, text: str = "a text", scale: float = 1.0, **changes: Any) -> Path:
    """A run of `steps` steps with two evaluations, a step that was left out, samples, rows and a checkpoint. `text` is
    in every place where a user's can be; `changes` are those of the record."""
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        loss = None if step == 5 else scale * (2 * math.exp(-step / 10) + 0.3)
        line = {"loss": loss, "tokens": 100, "supervised_tokens": 40, "tokens_per_second": 900 + step % 7}
        more = {"memory_mb": 500 + step, "grad_norm": 1 / step, "learning_rate": 1e-4 * (1 - step / steps)}
        append(folder / METRICS, {"step": step, "epoch": step / steps, **line, **more, "seconds": 2.0 * step})
        if step == 5:
            append(folder / METRICS, {"step": 5, "event": f"loss nan: {text}"})
        if step in (steps // 2, steps):
            evaluation = {f"eval_{text}_loss": loss, "eval_runtime": 1.0, f"eval_{text}_accuracy": 0.5}
            append(folder / METRICS, {"step": step, **evaluation})
    for step in (0, steps // 2, steps):
        answer = "Four." if step == steps else f"{text} {step}"
        entry = {"prompt": [*QUESTION, {"role": "user", "content": text}], "expected": "Four.", "answer": answer}
        append(folder / SAMPLES, {"step": step, **entry})
        append(folder / SAMPLES, {"step": step, "prompt": text, "expected": None, "answer": f"{text} more"})
    row = {"loss": 0.01, "usual": 0.4, "step": 3, "tokens": 9, "supervised": 4, "parts": [[text, False], [text, True]]}
    spread = {"edges": [0.1, 1.0], "histogram": [3, 2, 1], "rows": 6, "mean": 0.5, "first_step": 1, "last_step": steps}
    write(folder / EXAMPLES, spread | {"easiest": [row], "hardest": [row | {"loss": 3.25}]})
    counts = {"examples": 90, "tokens": 9000, "supervised": 4000}
    split = {"counts": counts, "longest": 120, "lengths": [[1, 60, 50], [61, 120, 40]]}
    histograms = {"train": [[1, 8, 90]]}
    write(folder / PREFLIGHT, {"splits": {"train": split}, "notes": [text], "supervised_lengths": histograms})
    (folder / "recipe.yaml").write_text(f"model: demo  # {text}\n")
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-20" / "model.safetensors").write_bytes(bytes(2_000_000))
    settings = {"learning_rate": 2e-4, "max_length": 512, "note": text}
    record(**{"settings": settings} | changes).write(folder)
    return folder
