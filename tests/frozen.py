"""The last module that the server of `tests.forked` imports: no process that it forks looks through the others."""

import gc

gc.collect()
gc.freeze()
