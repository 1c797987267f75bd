"""A terminal to run a command in, and what its screen shows."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pexpect  # type: ignore[import-untyped]
import pyte


class Terminal:
    """`tunesmith` with `arguments` in a pseudo-terminal; `screen` is drawn by an emulator."""

    def __init__(
        self, arguments: list[str], *, columns: int = 80, rows: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        kept = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "FORCE_COLOR")}
        self.child: Any = pexpect.spawn(
            sys.executable,
            ["-m", "tunesmith", *arguments],
            env=kept | {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""} | dict(env or {}),
            dimensions=(rows, columns),
            encoding="utf-8",
            timeout=60,
        )

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, seen: Callable[[str], bool]) -> None:
        """Reads until the screen is as wanted. Fails at the end of the command or after a minute."""
        while not seen(self.text):
            try:
                self._read()
            except pexpect.EOF:
                raise AssertionError(f"the command ended before:\n{self.text}") from None

    def finish(self) -> int:
        """Reads to the end, and returns the exit code."""
        try:
            while True:
                self._read()
        except pexpect.EOF:
            self.child.close()
        return int(self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def _read(self) -> None:
        text = self.child.read_nonblocking(65536, timeout=60)
        self.raw += text
        self.stream.feed(text)
