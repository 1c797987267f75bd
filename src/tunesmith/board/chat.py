"""Answers of a run and of its base model, from `tunesmith serve` in processes of their own."""

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import TunesmithError

WAIT = 600
"""Seconds for a model to load, and between two pieces of an answer."""
MOST = 2
"""Models that are kept in memory: a run, and its base."""


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model that answers at `url`."""

    name: str
    process: "subprocess.Popen[str]"
    url: str

    def answer(self, messages: Sequence[dict[str, Any]], *, temperature: float, max_tokens: int) -> Iterator[str]:
        """The pieces of the answer as they come. Raises TunesmithError with what the model's server says."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT)
        body = {"messages": list(messages), "stream": True, "temperature": temperature, "max_tokens": max_tokens}
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"{place.path}/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise TunesmithError(_message(response.read()))
            for line in response:
                data = line.decode("utf-8").strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise TunesmithError(str(event["error"]["message"]))
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece
        finally:
            connection.close()


class Speakers:
    """Models that were asked lately; the one that was asked longest ago makes room for another."""

    def __init__(self) -> None:
        self._speakers: dict[str, Speaker] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Speaker:
        """The model in the folder `name`, or of that name, loaded if it is not. Raises TunesmithError."""
        with self._lock:
            speaker = self._speakers.pop(name, None)
            if speaker is None or speaker.process.poll() is not None:
                while len(self._speakers) >= MOST:
                    oldest = next(iter(self._speakers))
                    _end(self._speakers.pop(oldest).process)
                speaker = _started(name)
            self._speakers[name] = speaker
            return speaker

    def close(self) -> None:
        for speaker in self._speakers.values():
            _end(speaker.process)
        self._speakers.clear()


def name_of(run: Path, *, base: bool) -> str:
    """What `tunesmith serve` takes for the run in this folder, or for the base model of its adapters.

    Raises TunesmithError where the run has no base model to ask.
    """
    if not base:
        return str(run)
    from tunesmith.model.load import base_of, holds_adapters  # takes seconds

    if not holds_adapters(str(run)):
        raise TunesmithError("this run has trained all weights, and its base model is not beside it")
    name, revision = base_of(str(run))
    if revision:
        raise TunesmithError(
            f"the base model is {name} at the revision {revision['revision']}, and the board asks for no revision; "
            "chat with a folder that has it"
        )
    return name


def _started(name: str) -> Speaker:
    command = [sys.executable, "-m", "tunesmith", "serve", "--port", "0", "--json", "--", name]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()  # else a full pipe would stop the server
    line = process.stdout.readline()
    if not line:
        process.wait()
        reader.join(timeout=5)
        raise TunesmithError(_message("".join(said[-1:]).encode()) or f"{name} can't be loaded")
    ready = json.loads(line)
    return Speaker(name=name, process=process, url=ready["url"])


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", errors="replace")[:300]
