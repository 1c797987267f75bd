"""Machines meet before a run begins, and each mistake in how they were started is told where it was made."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.forked import free_port
from tunesmith.errors import TunesmithError
from tunesmith.train import meeting
from tunesmith.train.meeting import BEGUN, Meeting

Meet = Callable[..., "Future[Any]"]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def meet(port: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Meet]:
    """Starts the command on one machine: what it is held by then. All stop their waiting when the test ends."""
    monkeypatch.setattr(meeting, "PAUSE", 0.01)
    monkeypatch.setattr(meeting, "AT_ONCE", 0)
    over = threading.Event()
    with ThreadPoolExecutor(8) as machines:

        def start(rank: int, nodes: int = 2, host: str = "127.0.0.1") -> "Future[Any]":
            endpoint = f"{host}:{port}"
            machine = Meeting(nodes=nodes, node_rank=rank, endpoint=endpoint, say=said.append, stopped=over.is_set)
            return machines.submit(machine.held)

        yield start
        over.set()


def until(happened: Callable[[], bool]) -> None:
    wait = threading.Event()
    assert any(happened() or wait.wait(0.01) for _ in range(3000))


def test_machines_meet_whichever_comes_first_and_can_tell_each_other_something(meet: Meet, said: list[str]) -> None:
    second = meet(1)
    until(lambda: "nothing listens at 127.0.0.1:" in "".join(said))
    stores = [meet(0).result(60), second.result(60)]
    stores[1].set("failure", "no space")
    assert stores[0].get("failure") == b"no space"
    with pytest.raises(TunesmithError, match=r"has begun, .* start the command on all machines again"):
        meet(1).result(60)


def test_one_that_was_killed_and_is_started_again_takes_its_place(meet: Meet, said: list[str]) -> None:
    first = meet(0, 3)
    killed = meet(1, 3)
    until(lambda: any("--node-rank 2 on another" in text for text in said))
    again = meet(1, 3)
    with pytest.raises(TunesmithError, match=r"started with --node-rank 1 on .*, too; give each machine a number"):
        killed.result(60)
    last = meet(2, 3)
    assert None not in [first.result(60), again.result(60), last.result(60)]


def test_of_two_with_one_number_the_first_machine_takes_one(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    taken = [{"host": host, "nodes": 3, "start": host} for host in ("first", "second", "third")]
    store.set("machine 0", json.dumps(taken[0]))

    def others_begin() -> bool:
        store.set(BEGUN, json.dumps(taken))
        return False

    late = Meeting(nodes=3, node_rank=1, endpoint=f"127.0.0.1:{port}", say=print, stopped=others_begin)
    with pytest.raises(TunesmithError, match="started with --node-rank 1 on second, too"):
        late.held()


def test_a_port_that_is_taken_is_told_at_once(meet: Meet, port: int) -> None:
    told = pytest.raises(TunesmithError, match=f"port {port} .* can't be used on this machine .*in use")
    with socket.create_server(("", port)), told:
        meet(0).result(60)


def test_other_numbers_of_machines_are_told(meet: Meet) -> None:
    meet(0, 3)
    with pytest.raises(TunesmithError, match=r"--nodes is 2 here, and 3 on .* .--node-rank 0"):
        meet(1, 2).result(60)


@pytest.mark.parametrize(
    ("rank", "host", "message"),
    [
        (0, "no-such-machine.invalid", "the name no-such-machine.invalid .* not known here .* write the IP address"),
        (0, "127.0.0.1", "no machine came with --node-rank 1"),
        (1, "127.0.0.1", "nothing listens at 127.0.0.1:.* start the command with --node-rank 0"),
    ],
)
def test_patience_has_an_end(rank: int, host: str, message: str, meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", 0)
    monkeypatch.setattr(meeting, "NAMED", 0)
    with pytest.raises(TunesmithError, match=message):
        meet(rank, host=host).result(60)


def test_the_user_can_stop_the_waiting(port: int) -> None:
    machine = partial(Meeting, nodes=2, endpoint=f"127.0.0.1:{port}", say=print, stopped=lambda: True)
    assert [machine(node_rank=rank).held() for rank in (0, 1)] == [None, None]
