"""One thread that writes, one thing at a time."""

import threading
from collections.abc import Callable


class Writer:
    """Runs what it is given in a thread; `wait` returns when it is done, and raises what went wrong.

    The thread does not keep the process alive: who leaves at once leaves a partial file, never half of a whole one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work` after what was begun before is done."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # it is raised by `check` or `wait`
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last time, without waiting."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until nothing is being written any more."""
        self.join()
        self.check()

    def join(self) -> None:
        """As `wait`, but raises nothing: something else went wrong already."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
