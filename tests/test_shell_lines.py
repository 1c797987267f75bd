"""The checks of what no test runs refuse what would not work."""

import pytest

from tests.shell_lines import check


@pytest.mark.parametrize(
    "line",
    [
        "make demo     # trains",
        "make bench DATA=rows.json",
        "git clone https://github.com/someone/tunesmith && cd tunesmith",
        'pip install "tunesmith[serve]"',
        "KEY=$(openssl rand -hex 16) PORT=1 tunesmith serve runs/first --host 0.0.0.0 --allow-remote",
        ".venv/bin/pre-commit install",
        '.venv/bin/pytest tests/test_tree.py -m "not slow"',
    ],
)
def test_what_works_passes(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("make demos", "demos"),
        ("make recipes", "recipes"),  # a folder of that name is there
        ("make bench ROWS=rows.json", "ROWS"),
        ("git clone https://github.com/someone/tunesmiths", "tunesmiths"),
        ("cd tunesmiths", "tunesmiths"),
        ('pip install "tunesmith[server]"', "server"),
        ("pip install trl", "trl"),
        ("tunesmith serve runs/first --hosts 0.0.0.0", "No such option: --hosts"),
        ("tunesmith served runs/first", "No such command 'served'"),
        ("tunesmith serve", "Missing parameter: run"),
        ("build/bin/pytest tests/data", "build/bin"),
        (".venv/bin/pytest tests/date", "file or directory not found: tests/date"),
        (".venv/bin/pre-commit installed", "invalid choice: 'installed'"),
        ("curl https://example.org", "curl"),
    ],
)
def test_what_does_not_work_is_refused(line: str, why: str) -> None:
    with pytest.raises(Exception, match=why):
        check(line)
