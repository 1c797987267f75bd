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
    path = Path(output).expanduser() if output else found[0].folder / (REPORT if len(found) == 1 else COMPARISON)
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
