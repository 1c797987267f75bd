"""Who may ask a server: programs of this machine, and whoever has the key; no web page of another site."""

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.errors import TunesmithError

KEY = "TUNESMITH_API_KEY"
HEALTH = "/health"
"""Needs no key."""


def error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The interface's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, and reached from nowhere else."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """`local`: requests must name this machine in their Host header. A page whose name an attacker lets point here
    (DNS rebinding) names another. `api_key`: requests must bring it, in a header, or with `in_url` as `?token=` of what
    a browser opens; those for `open` paths need none."""

    local: bool = True
    api_key: str | None = None
    in_url: bool = False
    open: frozenset[str] = frozenset({HEALTH})


def access_for(host: str, api_key: str | None, *, allow_remote: bool) -> Access:
    """Who may ask a server on `host`. Raises TunesmithError for a key that no header can have, and where other machines
    could ask although nobody allowed it, or without a key."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise TunesmithError(f"{KEY} is empty, or has characters that a header can't have; unset it, or set a key")
    local = is_loopback(host)
    if not local and not allow_remote:
        raise TunesmithError(
            f"host {host} lets other machines ask; keep to 127.0.0.1, or give --allow-remote and set {KEY}"
        )
    if not local and api_key is None:
        raise TunesmithError(f"--allow-remote needs a key that clients send: set {KEY}")
    return Access(local=local, api_key=api_key)


class Guard:
    """ASGI middleware that refuses requests by their headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0] if self._access.in_url else ""
        refused = self._refused(Headers(scope=scope), scope["path"], token if scope["method"] == "GET" else "")
        return await (refused or self._app)(scope, receive, send)

    def _refused(self, headers: Headers, path: str, token: str) -> JSONResponse | None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self._access.local and not is_loopback(name):
            return _refusal(403, f"the Host header is {host!r}; this server answers to localhost only", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return _refusal(403, f"pages of {origin} may not ask this server", "wrong_origin")
        key = self._access.api_key
        given = headers.get("authorization", "").encode(), f"Bearer {token}".encode()
        if (
            key is not None
            and path not in self._access.open
            and not any(hmac.compare_digest(value, f"Bearer {key}".encode()) for value in given)
        ):
            return _refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer", "invalid_api_key")
        return None


def _refusal(status: int, message: str, code: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error(message, status=status, code=code), status, headers)


# A port


def bind(host: str, port: int) -> socket.socket:
    """A socket on `port`, or on a free one for 0. It accepts nothing yet. Raises TunesmithError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise TunesmithError(f"host {host} is no address of this machine: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise TunesmithError(
            f"port {port} of {host} can't be used: {error.strerror}; give another --port, or 0 for a free one"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
