"""A server in a thread, on a free port of this machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.model.generate import Sampling
from tunesmith.serve.access import Access, bind, url_of
from tunesmith.serve.server import Server, Service, Settings


@contextmanager
def serving(
    model: Any, tokenizer: Any, access: Access | None = None, defaults: Sampling | None = None
) -> Iterator[str]:
    """The URL of a server of `model` under the name "tiny"; it ends with the block."""
    settings = Settings(
        name="tiny", defaults=defaults or Sampling(max_new_tokens=8), access=Access() if access is None else access
    )
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    server = Server(Service(model, tokenizer, settings), ready.set)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        assert ready.wait(20)
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
