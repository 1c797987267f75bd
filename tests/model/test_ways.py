"""The faster of two ways is taken for each kind of call, the plain one in doubt, and a resumed run takes the same."""

from collections.abc import Callable, Iterator

import pytest

from tunesmith.model import ways


class Clock:
    """A time that passes only where a way says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def way(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr("tunesmith.model.ways.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr(ways, "_forced", None)
    kept = ways.state()
    ways.restore({})
    ways.begin_anew()
    yield clock
    ways.restore(kept)


@pytest.mark.parametrize(("plain", "other", "faster"), [(0.02, 0.01, True), (0.01, 0.02, False), (0.0102, 0.01, False)])
def test_the_other_way_is_taken_where_it_is_clearly_faster(
    plain: float, other: float, faster: bool, clock: Clock
) -> None:
    pair = clock.way("plain", plain), clock.way("other", other)
    assert ways.is_faster(("product", 4, 7), *pair) is faster
    assert clock.calls == ["plain", "other"] * 3  # in turns, the first time to warm up
    assert ways.is_faster(("product", 4, 7), *pair) is faster
    assert len(clock.calls) == 6


def test_after_the_first_step_a_new_size_goes_the_way_of_the_nearest(clock: Clock) -> None:
    fast, slow = clock.way("fast", 0.01), clock.way("slow", 0.03)
    assert ways.is_faster(("product", 4, 7), slow, fast)
    assert not ways.is_faster(("product", 9, 7), fast, slow)
    ways.settle()
    calls = len(clock.calls)
    assert [ways.is_faster(("product", size, 7), slow, fast) for size in (5, 8, 12)] == [True, False, False]
    assert not ways.is_faster(("product", 4, 8), slow, fast)  # another product altogether
    assert len(clock.calls) == calls


def test_a_second_of_trials_is_enough(clock: Clock) -> None:
    assert ways.is_faster(("product", 1, 7), clock.way("plain", 0.3), clock.way("other", 0.1))
    calls = len(clock.calls)
    assert not ways.is_faster(("product", 1, 8), clock.way("plain", 0.3), clock.way("other", 0.1))
    assert len(clock.calls) == calls


def test_a_resumed_run_takes_what_was_taken_and_tries_nothing(clock: Clock) -> None:
    kind: ways.Kind = ("product", 4, 7, True, False)
    ways.is_faster(kind, clock.way("plain", 0.02), clock.way("other", 0.01))
    state = ways.state()
    assert state == {"('product', 4, 7, True, False)": True}
    ways.restore({})
    ways.begin_anew()
    ways.restore(state)
    calls = len(clock.calls)
    assert ways.is_faster(kind, clock.way("plain", 0.01), clock.way("other", 0.02))
    assert len(clock.calls) == calls


def test_what_is_forced_holds_for_all(clock: Clock) -> None:
    ways.force(True)
    assert ways.is_faster(("product", 4, 7), clock.way("plain", 0.01), clock.way("other", 0.02))
    assert ways.forced() is True
    assert not clock.calls
