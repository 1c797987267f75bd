"""What several processes cost: the memory of each, what they send in a step, and how long a step takes at the least.

Nothing here was measured on several GPUs: bytes are counted, and times follow from what the makers of GPUs state. Each
process has the same rows a step, however many there are.
"""

from dataclasses import dataclass, replace

from tunesmith.plan.memory import FP32, Counted, Method, Run, count

SCALES = (1, 8, 64, 512)
"""Numbers of GPUs that a run is shown for, beside its own."""
REACHED = 0.4
"""The share of the stated rate that products reach: Llama 3 was trained with 38 to 43% (arXiv:2407.21783, table 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that each process sends in a step, by the kind of exchange."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    @property
    def total(self) -> float:
        return self.all_reduce + self.all_gather + self.reduce_scatter


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A run in `processes`: bytes of memory of each, and its tokens a step, all of them together.

    A step takes `computing` seconds for products and `sending` for the traffic; None where no speed is stated. What is
    sent while products are computed costs nothing more, so it takes between the larger one and the sum.
    """

    processes: int
    memory: int
    fits: bool
    traffic: Traffic
    tokens: int
    computing: float | None
    sending: float | None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The least, where all is sent meanwhile, and the most, where nothing is."""
        if self.computing is None or self.sending is None:
            return None
        return max(self.computing, self.sending), self.computing + self.sending


def spread(run: Run, method: Method) -> list[Spread]:
    """`run` in its own number of processes, and in those of `SCALES`.

    Raises TunesmithError for a model that is no causal language model.
    """
    together = count(replace(run, processes=max(run.processes, 2)), method)
    alone = together if run.shard == "none" else count(replace(run, processes=1), method)
    spreads = []
    for processes in sorted({*SCALES, run.processes}):
        counted = alone if processes == 1 else together
        spreads.append(_spread(replace(counted, run=replace(counted.run, processes=processes))))
    return spreads


def _spread(counted: Counted) -> Spread:
    run = counted.run
    memory, sent = counted.memory(run.rows, run.length).total, traffic(counted)
    tokens = run.rows * run.documents * run.length * run.accumulation
    speed = run.device.speed if run.precision != "fp32" else None
    computing = sending = None
    if speed is not None:
        computing = tokens * work(counted) / (REACHED * speed.flops)
        slowest = speed.link if run.processes <= speed.together else min(speed.link, speed.network)
        sending = sent.total / slowest
    return Spread(
        processes=run.processes,
        memory=memory,
        fits=memory <= run.device.memory,
        traffic=sent,
        tokens=tokens * run.processes,
        computing=computing,
        sending=sending,
    )


def traffic(counted: Counted) -> Traffic:
    """What a process sends in a step.

    In a ring of N processes each sends (N - 1) / N of n bytes to gather them, or to sum and scatter them, and twice
    that to sum them for all (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations
    in MPICH"). Without sharing, fp32 gradients are summed once. With it, each layer is gathered once a step (`grad`),
    or for the forward and again for the backward of each micro-batch (`full`, as ZeRO-3, arXiv:1910.02054), and the
    root once. The fp32 gradients of a whole model are scattered with each micro-batch, and those of adapters once.
    """
    run, units = counted.run, counted.units
    part = (run.processes - 1) / run.processes
    trained = FP32 * counted.trained
    if run.shares == 1:
        return Traffic(all_reduce=2 * part * trained)
    times = 2 * run.accumulation if run.shard == "full" else 1
    return Traffic(
        all_gather=part * (units.root + times * sum(units.layers)),
        reduce_scatter=part * trained * (1 if counted.is_adapted else run.accumulation),
    )


def work(counted: Counted) -> float:
    """Floating point operations for a token of a step.

    A forward has 2 for each weight that a token is multiplied with, and 2 T for each number of its queries: products
    with the keys and values before it, half of T on average. A backward has as many for what it hands on, and as many
    again for the gradients of weights that are trained and for both factors of attention (Kaplan et al. 2020,
    arXiv:2001.08361; PaLM, arXiv:2204.02311, appendix B).
    """
    run, units = counted.run, counted.units
    weights, attention = 2.0 * units.products, 2.0 * run.length * units.attention
    forwards = 1 + run.passes + (1 / run.checkpoint_every if run.checkpoint_every else 0)
    backward = weights * (1 if counted.is_adapted else 2) + 2 * attention
    return forwards * (weights + attention) + backward
