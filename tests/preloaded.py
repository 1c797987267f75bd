"""What the server of `tests.forked` imports, so that no process that it forks imports it, or collects garbage in it."""

import gc
from importlib import import_module

gc.disable()  # nothing of an import is garbage, and looking for it takes a fifth of the time
for name in ("tests.train.children", "tests.faults.children", "tunesmith.cli.main", "uvicorn"):
    import_module(name)
gc.collect()
gc.freeze()
gc.enable()
