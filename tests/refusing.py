"""A folder in which nobody can make a file, root included."""

import sys

import pytest

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses even root")
