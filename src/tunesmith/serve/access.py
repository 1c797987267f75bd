"""Who may ask: programs of this machine, and whoever has the key; no web page that a browser shows."""

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.serve.replies import error

OPEN = "/health"
"""Needs no key."""


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
    (DNS rebinding) names another. `api_key`: requests must bring it."""

    local: bool = True
    api_key: str | None = None


class Guard:
    """ASGI middleware that refuses requests by their headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refused = self._refused(Headers(scope=scope), scope["path"])
        return await (refused or self._app)(scope, receive, send)

    def _refused(self, headers: Headers, path: str) -> JSONResponse | None:
        host = headers.get("host", "")
        if self._access.local and not is_loopback(_name(host)):
            return _refusal(403, f"the Host header is {host!r}; this server answers to localhost only", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return _refusal(403, f"pages of {origin} may not ask this server", "wrong_origin")
        key = self._access.api_key
        if key is not None and path != OPEN and not _same(headers.get("authorization", ""), f"Bearer {key}"):
            return _refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer", "invalid_api_key")
        return None


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _refusal(status: int, message: str, code: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error(message, status=status, code=code), status, headers)
