"""Runs on the GPU beside runs that do the same in another way: on the CPU, without a saving, without interruption."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.random_model import write_random_model
from benchmarks.gpu.verdicts import Place, Trial, Verdict, judged, left_out
from tunesmith import SFTConfig
from tunesmith.demo.orders import held_out_rows, training_rows
from tunesmith.errors import TunesmithError
from tunesmith.home import DEMO
from tunesmith.model import demo_model, quantize
from tunesmith.model.precision import DTYPES, PrecisionName
from tunesmith.text import size
from tunesmith.train.limits import give_back
from tunesmith.train.sft import SFTTrainer

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 1e-3},
    "full": {"learning_rate": 2e-5},
    "packed": {"learning_rate": 1e-3, "packing": True, "max_length": 512, "per_device_train_batch_size": 1},
}
"""Settings of the ways to train."""
CLOSE: dict[PrecisionName, float] = {"fp32": 2e-3, "bf16": 3e-2, "fp16": 3e-2}
"""How far a loss may be from that of the CPU in fp32, relative to it."""
SAME: dict[PrecisionName, float] = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}
"""How far losses on one device may be apart where the same is computed in other parts."""
QUANTIZED = 0.2
"""How far the first loss of a model in 8 or 4 bits may be from that of the model itself."""
SHARES = (0.8, 0.6, 0.45, 0.3)
"""Of what a run takes beyond its weights: with so little it is to run out of memory, the first one that makes it."""
WARM = 2
"""Steps that are left out of the rates."""
LEARNT = 0.9
"""The share of new e-mails that the demo has to get exactly right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What came of a run: the `losses` of its steps, tokens per second without the first steps, the peak of the GPU's
    memory in bytes (0 on a CPU), its events, and what was trained, on the CPU."""

    losses: list[float]
    rate: float
    peak: int
    events: list[str]
    trained: dict[str, Tensor]

    @property
    def figures(self) -> dict[str, Any]:
        return {"losses": self.losses, "tokens_per_second": self.rate, "peak_bytes": self.peak}

    @property
    def pace(self) -> str:
        return f"{self.rate:,.0f} tokens/s" + (f", {size(self.peak)} at most" if self.peak else "")


# The model


def _ready_model(place: Place) -> Verdict:
    folder = model_folder(place)
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    kind = "a random model that was made here" if folder.parent == place.out else "the demo model"
    return judged(True, f"{kind}, {parameters:,} parameters", parameters=parameters)


def model_folder(place: Place) -> Path:
    """The demo model where its package is installed; else, and in a rehearsal, a random one, made at the first call."""
    if not place.rehearsed and _demo_is_there():
        return demo_model.demo_model_path()
    folder = place.out / "random-model"
    if not folder.is_dir():
        write_random_model(folder, hidden=place.size(256, 32), layers=place.size(6, 2))
    return folder


def _demo_is_there() -> bool:
    return find_spec(demo_model.PACKAGE) is not None


# Runs


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_of(
    place: Place,
    name: str,
    *,
    precision: PrecisionName = "fp32",
    full: bool = False,
    rows: Sequence[Any] | None = None,
    bits: quantize.Bits | None = None,
    **settings: Any,
) -> SFTTrainer:
    """A trainer whose adapters begin with the same numbers on every device, because they are drawn on the CPU."""
    folder, offloading = model_folder(place), settings.pop("activation_offloading", False)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "max_length": 1024,
        "train_on": "assistant",
        "save_strategy": "no",
        "rehearse": "off",
    }
    args = SFTConfig(
        output_dir=str(place.out / "runs" / name),
        precision=precision,
        use_cpu=not torch.cuda.is_available(),
        activation_offloading=offloading and not place.rehearsed,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **defaults | settings,
    )
    args.activation_offloading = offloading  # where the CPU stands in, it is refused before
    rows = training_rows(place.size(32, 16)) if rows is None else rows
    if bits is not None:
        quantization = quantize.quantization(bits, DTYPES[precision])
        given: dict[str, Any] = {"model": str(folder), "quantization_config": quantization, "peft_config": lora()}
        return SFTTrainer(args=args, train_dataset=list(rows), **given)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if full else DTYPES[precision])
    if not full:
        torch.manual_seed(0)
        model = get_peft_model(model, lora())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model=model, args=args, train_dataset=list(rows), processing_class=tokenizer)


def run_of(trainer: SFTTrainer, **arguments: Any) -> Run:
    """Train, from the checkpoint that the `arguments` name, if any."""
    model: Any = trainer.model
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train(**arguments)
    lines = map(json.loads, (Path(str(trainer.args.output_dir)) / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "tokens_per_second" in line]
    timed = steps[WARM:] or steps
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in timed)
    return Run(
        losses=[line["loss"] for line in steps],
        rate=sum(line["tokens"] for line in timed) / seconds,
        peak=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        events=[text for _, text in trainer.events],
        trained={name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad},
    )


def trained(place: Place, name: str, **settings: Any) -> Run:
    give_back()
    return run_of(trainer_of(place, name, **settings))


def apart(losses: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference, relative to what is expected; infinite where one is no number or there are none."""
    if not losses or len(losses) != len(expected):
        return float("inf")
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("inf")


def chosen(place: Place) -> PrecisionName:
    """What `precision: auto` takes here, by the section that looked at it."""
    choice: PrecisionName = place.figures("formats", "precision").get("choice", "fp32")
    return choice


# On the CPU, and beside it


def reference(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "model", partial(_ready_model, place)
    for way in WAYS:
        yield way, partial(_reference, place, way)


def _reference(place: Place, way: str) -> Verdict:
    run = trained(place, f"reference-{way}", full=way == "full", **WAYS[way])
    return judged(True, f"losses {_listed(run.losses)}", **run.figures)


def training(place: Place) -> Iterator[tuple[str, Trial]]:
    names: list[PrecisionName] = ["fp32", "bf16"] if place.rehearsed else ["fp32", "bf16", "fp16"]
    for way in WAYS:
        for precision in names:
            yield f"{way}, {precision}", partial(_beside_the_cpu, place, way, precision)
    yield "shared prefix", partial(_shared_prefix, place)


def _beside_the_cpu(place: Place, way: str, precision: PrecisionName) -> Verdict:
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return left_out("this GPU has no bfloat16")
    expected = place.figures("reference", way).get("losses", [])
    if not expected:
        return judged(False, "there are no losses of the CPU to compare with: the section `reference` comes before")
    run = trained(place, f"{way}-{precision}", full=way == "full", precision=precision, **WAYS[way])
    # The first steps in fp16 may be skipped, until the scale of the loss fits.
    compared = 1 if precision == "fp16" else len(expected)
    difference = apart(run.losses[:compared], expected[:compared])
    counted = "first loss" if precision == "fp16" else "losses"
    return judged(
        difference <= CLOSE[precision] and apart(run.losses, run.losses) == 0,
        f"{counted} within {difference:.1e} of the CPU's in fp32 (at most {CLOSE[precision]:g}); {run.pace}",
        difference=difference,
        **run.figures,
    )


def _shared_prefix(place: Place) -> Verdict:
    """Rows under one long system prompt, which is computed once or for each."""
    system = {"role": "system", "content": "Extract the order as JSON. " * place.size(30, 3)}
    rows = [{"messages": [system, *row["messages"][1:]]} for row in training_rows(16)]
    settings: dict[str, Any] = {"rows": rows, "precision": chosen(place), "learning_rate": 1e-3, "max_length": 2048}
    alone = trained(place, "prefix-off", share_prefix="off", **settings)
    shared = trained(place, "prefix-shared", share_prefix="auto", **settings)
    difference = apart(shared.losses, alone.losses)
    return judged(
        difference <= SAME[chosen(place)],
        f"losses within {difference:.1e} of those without sharing; {shared.pace}, without {alone.pace}",
        difference=difference,
        shared=shared.figures,
        alone=alone.figures,
    )


# Savings, compiled layers, 8 and 4 bits


def savings(place: Place) -> Iterator[tuple[str, Trial]]:
    for setting in ("gradient_checkpointing", "activation_offloading"):
        yield setting, partial(_saving, place, setting)


def _saving(place: Place, setting: str) -> Verdict:
    precision, rows = chosen(place), place.size(16, 4)
    common: dict[str, Any] = {"precision": precision, "learning_rate": 1e-3, "per_device_train_batch_size": rows}
    plain, saving = trained(place, f"without-{setting}", **common), trained(place, setting, **common, **{setting: True})
    difference = apart(saving.losses, plain.losses)
    return judged(
        difference <= SAME[precision] and (place.rehearsed or saving.peak < plain.peak),
        f"losses within {difference:.1e}; {saving.pace}, without it {plain.pace}",
        difference=difference,
        on=saving.figures,
        off=plain.figures,
    )


def compiled(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "torch_compile", partial(_compiled, place)


def _compiled(place: Place) -> Verdict:
    if torch.cuda.is_available() and find_spec("triton") is None:
        return left_out("triton is not installed, which code for a GPU is compiled with")
    precision, steps = chosen(place), place.size(12, 3)
    common: dict[str, Any] = {"precision": precision, "learning_rate": 1e-3, "max_steps": steps}
    backend = {"torch_compile_backend": "eager"} if place.rehearsed else {}
    plain = trained(place, "not-compiled", **common)
    run = trained(place, "compiled", torch_compile=True, **backend, **common)
    difference = apart(run.losses, plain.losses)
    return judged(
        difference <= 2 * SAME[precision],
        f"losses within {difference:.1e}; {run.pace}, not compiled {plain.pace}",
        difference=difference,
        compiled=run.figures,
        plain=plain.figures,
    )


def quantized(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "products", partial(_products, place)
    for bits in ("8bit", "4bit"):
        yield f"{bits} base", partial(_bits, place, bits)
    for optimizer in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        yield optimizer, partial(_optimizer, place, optimizer)


def _products(place: Place) -> Verdict:
    if reason := _no_bitsandbytes():
        return left_out(reason)
    problem = quantize.problem("cuda" if torch.cuda.is_available() else "cpu")
    return judged(not problem, problem or "products and gradients in 8 and 4 bits are right")


def _bits(place: Place, bits: quantize.Bits) -> Verdict:
    """The same four rows in each step are learnt, from a loss near that of the model itself."""
    if reason := _no_bitsandbytes():
        return left_out(reason)
    precision, rows = chosen(place), training_rows(4)
    common: dict[str, Any] = {"precision": precision, "rows": rows, "learning_rate": 1e-3, "max_steps": 6}
    plain, run = trained(place, f"not-{bits}", **common), trained(place, bits, bits=bits, **common)
    difference = apart(run.losses[:1], plain.losses[:1])
    return judged(
        difference <= QUANTIZED and run.losses[-1] < run.losses[0],
        f"first loss within {difference:.1%} of the model's own; losses {_listed(run.losses)}; {run.pace}, "
        f"unquantized {plain.pace}",
        difference=difference,
        quantized=run.figures,
        plain=plain.figures,
    )


def _optimizer(place: Place, optimizer: str) -> Verdict:
    if reason := _no_bitsandbytes():
        return left_out(reason)
    if "paged" in optimizer and not torch.cuda.is_available():
        return left_out("it pages its state between GPU and main memory, and this is a CPU")
    common: dict[str, Any] = {"learning_rate": 2e-5, "full": True, "precision": chosen(place), "max_steps": 4}
    plain = trained(place, "adamw", **common)
    run = trained(place, optimizer, optim=optimizer, **common)
    difference = apart(run.losses, plain.losses)
    return judged(
        difference <= 5e-2,
        f"losses within {difference:.1%} of AdamW's; {run.pace}, AdamW {plain.pace}",
        difference=difference,
        low=run.figures,
        plain=plain.figures,
    )


def _no_bitsandbytes() -> str:
    return "" if find_spec("bitsandbytes") else "bitsandbytes is not installed"


# Out of memory


def recovery(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "a batch, in a step", partial(_recovered, place, "same gradients", rehearse="off")
    yield "a batch, in the rehearsal", partial(_recovered, place, "same gradients", rehearse="always")
    long = " ".join(text_of(row) for row in training_rows(place.size(60, 4)))
    single: dict[str, Any] = {"rows": [{"text": long}] * 3, "train_on": None, "per_device_train_batch_size": 1}
    single |= {"max_length": place.size(4096, 512), "allow_no_eos": True}
    yield "one example", partial(_recovered, place, "gradient checkpointing is on", **single)


def _recovered(place: Place, event: str, **settings: Any) -> Verdict:
    """A run that runs out of memory, says `event`, and has the losses of one that has enough. In fp32, where they are
    close."""
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": place.size(16, 8)} | settings
    give_back()
    trainer = trainer_of(place, "enough-memory", **settings)
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    whole = run_of(trainer)
    dataset: Any = trainer.train_dataset
    tokens = sum(len(ids) for ids in dataset["input_ids"]) // 8
    del trainer, dataset
    tried = []
    for share in SHARES:
        give_back()
        trainer = trainer_of(place, "short-of-memory", **settings)
        limit = held + share * (whole.peak - held)
        try:
            with _memory_of(place, trainer, limit, tokens):
                run = run_of(trainer)
        except TunesmithError as error:  # not even one example fits
            tried.append(f"with {size(limit)}: {error}")
            break
        if any(event in text for text in run.events):
            difference = apart(run.losses, whole.losses)
            return judged(
                difference <= SAME["fp32"],
                f"losses within {difference:.1e} of those with enough memory; {run.events[0]}",
                difference=difference,
                events=run.events,
                limit_bytes=limit,
                enough=whole.figures,
                short=run.figures,
            )
        tried.append(f"with {size(limit)}: {'; '.join(run.events) or 'it had enough'}")
        del trainer
    return judged(False, f"expected was an event with '{event}'; of {size(whole.peak)} " + " | ".join(tried))


@contextmanager
def _memory_of(place: Place, trainer: SFTTrainer, limit: float, tokens: int) -> Iterator[None]:
    """Let torch hold `limit` bytes of the GPU at most; rehearsed, let the model take `tokens` tokens at most."""
    if place.rehearsed:
        from benchmarks.gpu.stand_ins import room_for

        model: Any = trainer.model
        room_for(model.get_base_model(), tokens)
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Going on from a checkpoint


def resumed(place: Place, *, deterministic: bool = False) -> Iterator[tuple[str, Trial]]:
    for way in ("lora", "full"):
        yield way, partial(_resumed, place, way, deterministic)


def _resumed(place: Place, way: str, deterministic: bool) -> Verdict:
    """Two steps, and two more from their checkpoint, against four in one go, to the last bit. Where kernels add in an
    order of their own, two whole runs differ as well; a deterministic run has to be exact."""
    settings: dict[str, Any] = {"full": way == "full", "precision": chosen(place), "full_determinism": deterministic}
    settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **WAYS[way]}
    give_back()
    name = f"resumed-{way}" + "-deterministic" * deterministic
    whole = run_of(trainer_of(place, name, **settings))
    again = run_of(trainer_of(place, f"{name}-again", **settings))
    shutil.rmtree(place.out / "runs" / name / "checkpoint-4")
    run = run_of(trainer_of(place, name, **settings), resume_from_checkpoint=True)
    difference, between = _difference(run.trained, whole.trained), _difference(again.trained, whole.trained)
    shutil.rmtree(place.out / "runs" / name)
    shutil.rmtree(place.out / "runs" / f"{name}-again")
    repeats = (
        f"differ by {between:.1e}: kernels add in an order of their own" if between else "are equal to the last bit"
    )
    return judged(
        difference == 0 or (not deterministic and between > 0 and difference <= 10 * between),
        ("equal to the last bit" if difference == 0 else f"weights differ by {difference:.1e}")
        + f"; two runs without interruption {repeats}",
        difference=difference,
        between_runs=between,
    )


def _difference(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((weights[name] - value).abs().max()) for name, value in expected.items())


# The demo


def demo(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "demo", partial(_demo, place)


def _demo(place: Place) -> Verdict:
    from rich.console import Console

    from tunesmith.demo import run as demo_run

    if not place.rehearsed and not _demo_is_there():
        return left_out(f"the demo model is not installed: {demo_model.INSTALL}")
    started = time.perf_counter()
    with _small_demo(place, demo_run):
        outcome = demo_run.run(place.out / "runs" / DEMO, Console(width=120))
    seconds, right = time.perf_counter() - started, outcome.after.exactly_right
    return judged(
        place.rehearsed or right >= LEARNT,
        f"{outcome.before.exactly_right:.0%} of {len(outcome.held_out)} new e-mails exactly right before, {right:.0%} "
        f"after (at least {LEARNT:.0%}); {seconds:.0f} s",
        seconds=seconds,
        before=outcome.before.shares(),
        after=outcome.after.shares(),
    )


@contextmanager
def _small_demo(place: Place, demo_run: Any) -> Iterator[None]:
    """Rehearsed, the random model on a few rows, of which it learns nothing to speak of."""
    if not place.rehearsed:
        yield
        return
    folder = model_folder(place)
    small: dict[str, Any] = {
        "DEMO": str(folder),
        "demo_model_path": lambda **_: folder,
        "training_rows": lambda: training_rows(8),
        "held_out_rows": lambda: held_out_rows(2),
        "MAX_NEW_TOKENS": 4,
    }
    with mock.patch.multiple(demo_run, **small):
        yield


def text_of(row: Mapping[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def _listed(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)
