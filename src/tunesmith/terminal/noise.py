"""What libraries print, kept from the terminal: noise for good, and while a view is drawn everything, which it shows.

Each entry of the lists says why nobody who runs a command can act on it; any other warning is shown.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

LOGGERS: dict[str, int] = {
    # It logs that each layer in each step rounds its input, which package would make 4 bits faster, and each library
    # that it does not find. What keeps it from working is an error, or a line of `tunesmith doctor`.
    "bitsandbytes": logging.ERROR,
}
MESSAGES: dict[str, str] = {
    # With `torch_compile`, which was asked for, on a machine without a GPU.
    "transformers.training_args": "The speedups for torchdynamo mostly come with",
}
"""By logger, the beginning of a line."""
WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("MatMul8bitLt: inputs will be cast", UserWarning),  # as earlier versions of bitsandbytes said it
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # peft reads a name that transformers deprecates
    ("Setting `save_embedding_layers` to `True`", UserWarning),  # of peft, which does what is right
    # Of peft, where adapters are on a head that shares its weight with the embeddings: merging separates the two, and
    # says so.
    ("Model has `tie_word_embeddings=True`", UserWarning),
)
OF_NO_USE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""They are for whoever writes the library."""


def hide_noise() -> None:
    """For the rest of the process."""
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for name in MESSAGES:
        logger = logging.getLogger(name)
        if _is_of_use not in logger.filters:  # a second command in one process
            logger.addFilter(_is_of_use)
    for text, kind in WARNINGS:
        warnings.filterwarnings("ignore", re.escape(text), kind)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(MESSAGES[record.name])


@contextmanager
def silent_libraries(*, bars: bool, warnings_too: bool) -> Iterator[None]:
    """Without progress bars of libraries, also of those that are imported later and read the environment then; and
    without warnings, which a run's journal keeps."""
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE") if bars else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        if warnings_too:
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


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
