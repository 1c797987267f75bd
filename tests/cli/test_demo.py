import pytest
from typer.testing import CliRunner

from tests.refusing import needs_proc
from tunesmith.cli.main import app


@needs_proc
@pytest.mark.parametrize("option", ["--export-data", "--output"])
def test_a_folder_that_refuses_is_named_before_anything_is_loaded(option: str) -> None:
    result = CliRunner().invoke(app, ["demo", option, "/proc/demo"])
    assert result.exit_code == 2
    expected = "error: output /proc/demo can't be written: No such file or directory; take another folder\n"
    assert result.stderr == expected
    assert result.stdout == ""
