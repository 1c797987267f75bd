from pathlib import Path

import pytest

from tests.refusing import needs_proc
from tunesmith.errors import TunesmithError
from tunesmith.runs.files import check_writable


@needs_proc
def test_a_folder_that_refuses_is_named_with_the_way_on() -> None:
    with pytest.raises(TunesmithError) as refused:
        check_writable(Path("/proc/runs/first"))
    expected = "output /proc/runs/first can't be written: No such file or directory; take another folder"
    assert str(refused.value) == expected
    with pytest.raises(TunesmithError, match=r"^--html /proc/a.html can't be written: .*; take another folder$"):
        check_writable(Path("/proc"), "--html /proc/a.html")


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "first")
    assert list(tmp_path.iterdir()) == []
