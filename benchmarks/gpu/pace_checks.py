"""Speed, memory and losses beside TRL's, in turns, on the same model, rows and settings."""

import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.gpu.training_checks import CLOSE, WARM, WAYS, apart, chosen, lora, model_folder, text_of
from benchmarks.gpu.verdicts import Place, Trial, Verdict, judged
from tunesmith.demo.orders import training_rows
from tunesmith.model.precision import DTYPES
from tunesmith.text import size
from tunesmith.train.limits import give_back


class Clock(TrainerCallback):
    """Seconds and losses of steps; the GPU is waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._started)

    def on_log(self, *_: Any, **said: Any) -> None:
        if "loss" in said["logs"]:
            self.losses.append(float(said["logs"]["loss"]))

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def speed(place: Place) -> Iterator[tuple[str, Trial]]:
    for way in WAYS:
        yield f"speed, {way}", partial(_pace, place, way)


def _pace(place: Place, way: str) -> Verdict:
    """Two pairs in turns on the same rows in the same order, in the precision that is chosen here; TRL without gradient
    checkpointing, its fastest setting."""
    sides = ["ours", "trl"] if find_spec("trl") else ["ours"]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(place.size(2, 1)):
        for side in sides:
            give_back()
            runs[side].append(_timed(place, side, way))
    best = {side: max(runs[side], key=lambda run: float(run["tokens_per_second"])) for side in sides}
    ours = best["ours"]
    found = f"{ours['tokens_per_second']:,.0f} tokens/s"
    found += f", {size(ours['peak_bytes'])}" if ours["peak_bytes"] else ""
    if "trl" not in best:
        return judged(True, f"{found}; TRL is not installed", **runs)
    theirs = best["trl"]
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    difference = apart(ours["losses"], theirs["losses"])
    found += f"; TRL {theirs['tokens_per_second']:,.0f} tokens/s" + (
        f", {size(theirs['peak_bytes'])}" if theirs["peak_bytes"] else ""
    )
    precision = chosen(place)
    return judged(
        difference <= CLOSE[precision],
        f"{found}: {ratio:.2f} times as fast; losses within {difference:.1e}",
        ratio=ratio,
        difference=difference,
        **runs,
    )


def _timed(place: Place, side: str, way: str) -> dict[str, Any]:
    library: Any = import_module({"ours": "tunesmith", "trl": "trl"}[side])
    tokens: list[int] = []

    class Ordered(library.SFTTrainer):
        """Rows in their order on both sides; and their tokens are counted."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, count = super().get_batch_samples(*args, **kwargs)
            for batch in batches:
                mask = batch.get("attention_mask")
                tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
            return batches, count

    precision, steps = chosen(place), place.size(10, 3)
    folder, packed = model_folder(place), way == "packed"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = list(chain.from_iterable([training_rows(place.size(270, 32))] * place.size(2, 1)))
    batch = place.size(16, 4)
    args = library.SFTConfig(
        output_dir=str(place.out / "runs" / f"pace-{side}-{way}"),
        per_device_train_batch_size=1 if packed else batch,
        packing=packed,
        max_length=place.size(4096, 512) if packed else 2048,
        max_steps=steps,
        learning_rate=WAYS[way]["learning_rate"],
        lr_scheduler_type="constant",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = Ordered(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if way == "full" else DTYPES[precision]),
        args=args,
        train_dataset=Dataset.from_list([{"text": text_of(row) + str(tokenizer.eos_token)} for row in rows]),
        processing_class=tokenizer,
        peft_config=None if way == "full" else lora(),
        callbacks=[clock],
    )
    trainer.train()
    return {
        "tokens_per_second": sum(tokens[WARM:steps]) / sum(clock.seconds[WARM:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "losses": clock.losses[:steps],
    }
