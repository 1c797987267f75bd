"""The pages of runs as files."""

from pathlib import Path

from tunesmith.errors import TunesmithError

REPORT, COMPARISON = "report.html", "comparison.html"


def write_report(runs: list[str], output: str | None = None) -> Path:
    """Writes the page about one run, or about several, and returns its path. Raises TunesmithError."""
    # Not above: the command line wants the names of the files, and should not wait for NumPy.
    from tunesmith.report.compare_html import comparison
    from tunesmith.report.run_data import read_run
    from tunesmith.report.run_html import page

    found = [read_run(run) for run in runs]
    folder = _as_named(runs[0], found[0].folder)
    path = Path(output).expanduser() if output else folder / (REPORT if len(found) == 1 else COMPARISON)
    if path.is_dir():
        raise TunesmithError(f"--output {output} is a folder; give the file to write, such as {path / REPORT}")
    if not path.parent.is_dir():
        raise TunesmithError(f"--output {output}: there is no folder {path.parent}; make it first")
    text = page(found[0]) if len(found) == 1 else comparison(found)
    try:
        # What a text holds that UTF-8 can't write is shown as such.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise TunesmithError(f"{path} can't be written: {error.strerror}") from error
    return path


def _as_named(run: str, folder: Path) -> Path:
    """The `folder` of a run as the user wrote it, who gave it or a checkpoint in it."""
    given = Path(run).expanduser()
    return next((path for path in (given, given.parent) if path.resolve() == folder), folder)
