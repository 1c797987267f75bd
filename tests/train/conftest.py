"""What all tests of training share."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """A run collects garbage when it starts, which takes half a second where it looks through all of `transformers`."""
    gc.collect()
    gc.freeze()
