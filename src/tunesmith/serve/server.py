"""A service on a port of this machine."""

import socket
from collections.abc import Callable

import uvicorn

from tunesmith.errors import TunesmithError
from tunesmith.serve.app import Service

GRACE = 5
"""Seconds for the last bytes of answers, once the server ends."""
MOST = 256
"""Connections and requests at a time; more are answered with 503."""


def bind(host: str, port: int) -> socket.socket:
    """A socket on `port`, or on a free one for 0. It accepts nothing yet. Raises TunesmithError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise TunesmithError(f"host {host} is no address of this machine: {error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise TunesmithError(
            f"port {port} of {host} can't be used: {error.strerror}; give another --port, or 0 for a free one"
        ) from error
    return made


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves `service` on a socket of `bind`, until a signal ends it, or `should_exit` set by another thread. `ready`
    is called once requests are accepted."""

    def __init__(self, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                service.app,
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=MOST,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.close()  # else it would wait until every answer has come to its own end
        await super().shutdown(sockets)
