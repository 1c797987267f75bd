"""A hub on 127.0.0.1, in memory, for the real client: repositories, LFS uploads whole or in parts, commits, downloads.

It speaks what `huggingface_hub` asks of https://huggingface.co, but not Xet: clients set HF_HUB_DISABLE_XET. Tests
tell it to fail: to break connections, to refuse, to quote the token in its answers.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import TunesmithError
from tunesmith.practice.hub_routes import ROUTES
from tunesmith.practice.hub_state import Call, Cut, Hub, Refused


@contextmanager
def hub_server(**settings: Any) -> Iterator[Hub]:
    """A server on a free port, stopped at the end."""
    hub = Hub(**settings)
    server, thread = _serve(hub)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _serve(hub: Hub) -> tuple[ThreadingHTTPServer, threading.Thread]:
    """Answer for `hub` on a free port, from a thread that ends with the process at the latest."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    return server, thread


def practice_hub(cache: str | Path, *, owner: str = "learner") -> Hub:
    """A hub in this process, in which the hub's client of this process is logged in as `owner` from here on.

    Whatever is pushed stays in memory and is gone when the process ends; what is downloaded goes into the folder
    `cache`. Call it before anything that imports `huggingface_hub`, which reads on import where its hub is; raises
    TunesmithError afterwards.
    """
    if "huggingface_hub" in sys.modules:
        raise TunesmithError(
            "practice_hub comes too late: huggingface_hub is imported already, and talks to another hub. Start Python "
            "anew (in a notebook, restart the kernel), and call practice_hub before you import transformers or datasets"
        )
    hub = Hub(token="hf_onlyforpractice", owners=(owner,))
    _serve(hub)
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ["HF_HOME"] = str(Path(cache).absolute())
    return hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        self._left = int(self.headers.get("Content-Length") or 0)
        try:
            for pattern, (status, text) in self.hub.refuse.items():
                if re.fullmatch(pattern, f"{self.command} {path}"):
                    raise Refused(status, self._quoting(text))
            headers, body = self._route(path)
            status = int(headers.pop("status", 200))
        except Refused as refused:
            status, headers = refused.status, {"X-Error-Message": refused.message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            body = json.dumps({"error": refused.message} | refused.body).encode()
        except Cut:
            self.close_connection = True
            self.connection.close()
            return
        self._send(status, headers, body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _route(self, path: str) -> tuple[dict[str, str], bytes]:
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                result = function(Call(self.hub, self.command, found.groupdict(), self.headers, self._read))
                return result if isinstance(result, tuple) else ({}, json.dumps(result).encode())
        raise Refused(404, f"no such page: {self.command} {path}")

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if self._left:
            self._read()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.hub.warning:
            self.send_header("X-HF-Warning", self._quoting(self.hub.warning))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        content, self._left = self.rfile.read(self._left), 0
        return content

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
        self.rfile.readline()
        return content

    def _quoting(self, text: str) -> str:
        return text.replace("{authorization}", self.headers.get("Authorization", ""))
