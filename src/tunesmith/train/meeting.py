"""How machines meet before any of them starts its processes, so that what keeps one away is told at once."""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import uuid4

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from tunesmith.errors import TunesmithError

PATIENCE = 900
"""Seconds in which all machines must have come."""
LONGEST = f"up to {PATIENCE // 60} minutes"
NAMED = 30
"""Seconds in which the name of the first machine must be known: in a cluster it may be only once that one runs."""
ANSWER = timedelta(seconds=10)
"""In which what accepts a connection must have answered as the first machine does."""
BEGUN = "begun"
"""Set by the first machine: the machines that it takes, in the order of their numbers."""
PAUSE = 0.2
"""Seconds between two looks."""
AT_ONCE = 2
"""Seconds for which nobody is told that others are waited for."""


@dataclass(kw_only=True, slots=True)
class Meeting:
    """Of `nodes` machines at `endpoint` (HOST:PORT), which is the first one; this one has the number `node_rank`. `say`
    hears whom it waits for, and `stopped` tells whether the user has had enough of that."""

    nodes: int
    node_rank: int
    endpoint: str
    say: Callable[[str], None]
    stopped: Callable[[], bool]
    _started: float = field(init=False, default=0.0)
    _told: str = field(init=False, default="")

    def held(self) -> TCPStore | None:
        """What holds the place at which they met, as long as it is kept; None where the user stopped the waiting.

        Raises TunesmithError where the address is unknown or taken, another machine has this one's number or another
        `nodes`, or somebody is missing after `PATIENCE` seconds.
        """
        self._started = time.monotonic()
        host, _, port = self.endpoint.rpartition(":")
        host = host.strip("[]")  # of an IPv6 address
        if not self._is_known(host):
            return None
        if self.node_rank == 0:
            store: TCPStore | None = _opened(host, int(port))
        else:
            store = self._joined(host, int(port))
        if store is None:
            return None
        try:
            return store if self._all_came(store) else None
        except DistError as error:
            raise TunesmithError(
                f"the first machine, at {self.endpoint}, has left before all had come; what it printed says why"
            ) from error

    def _is_known(self, host: str) -> bool:
        while True:
            try:
                socket.getaddrinfo(host, None)
            except OSError as error:
                waits_for = f"the name {host} of --rendezvous is not known here ({error.strerror})"
                if self._seconds() > NAMED:
                    raise TunesmithError(
                        f"{waits_for}; write the IP address of the machine with --node-rank 0, on all machines"
                    ) from error
            else:
                return True
            if not self._pause(f"{waits_for}; trying again (up to {NAMED} seconds"):
                return False

    def _joined(self, host: str, port: int) -> TCPStore | None:
        while True:
            try:
                socket.create_connection((host, port), timeout=ANSWER.total_seconds()).close()
            except OSError as error:
                waits_for = f"nothing listens at {self.endpoint} ({error.strerror or error})"
                if self._seconds() > PATIENCE:
                    raise TunesmithError(
                        f"{waits_for}; start the command with --node-rank 0 on that machine, and see that no firewall "
                        "keeps the port from this one"
                    ) from error
            else:
                break
            if not self._pause(f"{waits_for}; waiting for the command with --node-rank 0 on that machine ({LONGEST}"):
                return None
        try:
            return TCPStore(host, port, is_master=False, timeout=ANSWER, wait_for_workers=False)
        except DistError as error:
            raise TunesmithError(
                f"what listens at {self.endpoint} is no run that waits for machines; if another program has the port, "
                "write another one in --rendezvous, on all machines"
            ) from error

    def _all_came(self, store: TCPStore) -> bool:
        """Whether all came, before the user had enough. A machine that is started anew takes its place again. Of two
        with one number, the first machine takes one."""
        own = {"host": socket.gethostname(), "start": uuid4().hex, "nodes": self.nodes}
        keys = [f"machine {rank}" for rank in range(self.nodes)]
        first = json.loads(
            store.compare_set(keys[0], "", json.dumps(own)) if self.node_rank == 0 else store.get(keys[0])
        )
        if first["nodes"] != self.nodes:
            raise TunesmithError(
                f"--nodes is {self.nodes} here, and {first['nodes']} on {first['host']} (--node-rank 0); write the "
                "same on all machines"
            )
        if store.check([BEGUN]):
            raise TunesmithError(
                f"the run at {self.endpoint} has begun, and takes no machine in any more; stop it, and start the "
                "command on all machines again"
            )
        if self.node_rank > 0:
            store.set(keys[self.node_rank], json.dumps(own))
        while True:
            here = [rank for rank, key in enumerate(keys) if store.check([key])]
            if self.node_rank == 0 and len(here) == self.nodes:
                store.set(BEGUN, json.dumps([json.loads(store.get(key)) for key in keys]))
            begun = store.check([BEGUN])
            holder = (
                json.loads(store.get(BEGUN))[self.node_rank] if begun else json.loads(store.get(keys[self.node_rank]))
            )
            if holder != own:
                raise TunesmithError(
                    f"the command was started with --node-rank {self.node_rank} on {holder['host']}, too; give each "
                    "machine a number of its own, from 0"
                )
            if begun:
                return True
            missing = ", ".join(str(rank) for rank in range(self.nodes) if rank not in here) or "0"
            if self._seconds() > PATIENCE:
                raise TunesmithError(
                    f"no machine came with --node-rank {missing} in {PATIENCE // 60} minutes; start the command on "
                    "each, with its own number and otherwise the same options"
                )
            if not self._pause(f"waiting for the command with --node-rank {missing} on another machine ({LONGEST}"):
                return False

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _pause(self, waits_for: str) -> bool:
        """Tells once what is waited for. False where the user has stopped it."""
        if self._seconds() > AT_ONCE and waits_for != self._told:
            self.say(f"{waits_for}; Ctrl-C stops)")
            self._told = waits_for
        time.sleep(PAUSE)
        return not self.stopped()


def _opened(host: str, port: int) -> TCPStore:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise TunesmithError(
            f"port {port} of --rendezvous can't be used on this machine ({os.strerror(error.errno or 0)}); write "
            "another one, on all machines, or end the run that has --node-rank 0 here already"
        ) from error
    settings: dict[str, Any] = {"timeout": ANSWER, "wait_for_workers": False, "multi_tenant": True}
    try:
        return TCPStore(host, port, is_master=True, **settings)
    except DistError as error:
        raise TunesmithError(
            f"this machine has --node-rank 0, and {host}:{port} of --rendezvous does not lead to it; write the address "
            "of this one, on all machines, or the number of this one"
        ) from error
