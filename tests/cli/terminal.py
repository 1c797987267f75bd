"""A terminal to run a command in, and what its screen shows."""

import codecs
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte

from tests.forked import TerminalCommand


class Terminal:
    """`tunesmith` with `arguments` in a pseudo-terminal; `screen` is drawn by an emulator."""

    def __init__(
        self, arguments: list[str], *, columns: int = 80, rows: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._read_up_to = 0
        kept = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "FORCE_COLOR")}
        kept |= {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""} | dict(env or {})
        self._command = TerminalCommand(*arguments, rows=rows, columns=columns, env=kept, folder=Path.cwd())

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
            except EOFError:
                raise AssertionError(f"the command ended before:\n{self.text}") from None

    def expect(self, words: str) -> None:
        """Reads until the command says `words` behind those that were expected last."""
        while (place := self.raw.find(words, self._read_up_to)) < 0:
            self._read()
        self._read_up_to = place + len(words)

    def finish(self) -> int:
        """Reads to the end, and returns the exit code."""
        try:
            while True:
                self._read()
        except EOFError:
            return self._command.finish()

    def type(self, text: str) -> None:
        self._command.type(text)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self._command.resize(rows, columns)

    def _read(self) -> None:
        text = self._command.read()
        self.raw += self._decode(text)
        self.stream.feed(text)
