"""What libraries say while a view is drawn: heard, so that it does not tear the view apart."""

import logging
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

OF_NO_USE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""They are for whoever writes the library."""


class Remarks(logging.Handler):
    """Within `with Remarks(hear)`, warnings and worse go to `hear`, each text once, instead of to the terminal: those
    of `logging`, whichever handler they had, and those of `warnings`."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear
        self._heard: set[str] = set()
        self._replaced: list[tuple[logging.Logger, logging.Handler]] = []
        self._show_warning: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(record.getMessage())
        except Exception:  # a message whose arguments don't fit it must not end a run
            self.handleError(record)

    def _tell(self, text: str) -> None:
        first = text.strip().partition("\n")[0]
        if first and first not in self._heard:
            self._heard.add(first)
            self._hear(first)

    def _warning(self, message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, OF_NO_USE):
            self._tell(str(message))

    def __enter__(self) -> "Remarks":
        self._show_warning, warnings.showwarning = warnings.showwarning, self._warning
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            if isinstance(logger, logging.Logger):
                for handler in filter(_on_terminal, list(logger.handlers)):
                    self._replaced.append((logger, handler))
                    logger.removeHandler(handler)
                    logger.addHandler(self)
        logging.root.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warnings.showwarning = self._show_warning
        logging.root.removeHandler(self)
        for logger, handler in self._replaced:
            logger.removeHandler(self)
            logger.addHandler(handler)
        self._replaced = []


def _on_terminal(handler: logging.Handler) -> bool:
    streams = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams
