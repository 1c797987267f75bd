"""The lines of a text file that nobody should trust: each with its place, or with what is wrong with it.

Memory is bounded by the longest line that is allowed, whatever the file holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunesmith.data.skipped import KEPT_CHARACTERS, BadRow
from tunesmith.errors import TunesmithError

MOST_BYTES = 64_000_000
"""Of a line. A row that can be trained on is a thousandth of it."""
CHUNK = 1 << 20
FEW = 0.05
"""So large a share of a file's lines can be damaged; more have another encoding."""

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
MAGIC = {
    b"\x1f\x8b": "gzip-compressed; unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive (as .xlsx and .docx are); unpack it first, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first (unzstd)",
    b"BZh": "compressed with bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it first (unxz)",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; save it as .parquet or .jsonl",
    b"%PDF-": "a PDF document; save its text as .txt",
}
"""How files begin that are no text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line with its end, and its number from 1. With `bad`, its text is what could be read of it."""

    number: int
    place: str
    text: str
    bad: BadRow | None = None


def numbered_lines(path: Path, name: str, most: int | None = MOST_BYTES) -> Iterator[Line]:
    """The lines of a file of UTF-8, split at \\n only: JSON may hold other line separators. A BOM is left out.

    Raises TunesmithError for a file that can't be read or is no UTF-8 text as a whole; `name` is what messages call
    it. A line of more than `most` bytes (None: no limit), with a NUL or with bytes that are not UTF-8 is bad.
    """
    offset, number, checked = 0, 0, False
    try:
        with path.open("rb") as file:
            while raw := file.readline(-1 if most is None else most):
                number += 1
                place = f"{name}, line {number}"
                if number == 1:
                    _check_beginning(raw, place)
                size = len(raw)
                if most is not None and size == most and not raw.endswith(b"\n"):
                    size += _passed_over(file)
                    yield _too_long(raw, number, place, most)
                else:
                    line = _decoded(raw, offset, number, place)
                    if line.bad is not None and not checked:
                        checked = True
                        _check_encoding(path, line.bad, place)
                    yield line
                offset += size
    except OSError as error:
        raise TunesmithError(f"{name} can't be read: {error.strerror}") from error


def _check_beginning(raw: bytes, place: str) -> None:
    for magic, meaning in MAGIC.items():
        if raw.startswith(magic):
            raise TunesmithError(f"{place}: the file is {meaning}")
    if raw.startswith(UTF16) or (len(raw) > 1 and (raw[0] == 0) != (raw[1] == 0)):
        raise TunesmithError(f"{place}: the file is UTF-16, or no text; save it as UTF-8")


def _decoded(raw: bytes, offset: int, number: int, place: str) -> Line:
    if offset == 0 and raw.startswith(BOM):
        raw, offset = raw[len(BOM) :], len(BOM)
    try:
        text, reason = raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8", errors="replace")
        wrong = f"byte {offset + error.start} (0x{raw[error.start]:02x})"
        reason = f"{wrong} is not UTF-8; save the file as UTF-8"
    if b"\0" in raw:
        reason = f"there is a NUL at byte {offset + raw.index(0)}; the file is damaged, or it is no UTF-8 text"
    bad = BadRow(reason=reason, content=text) if reason else None
    return Line(number=number, place=place, text=text, bad=bad)


def _passed_over(file: BinaryIO) -> int:
    """Reads to the end of the line; how many bytes that were."""
    passed = 0
    while part := file.readline(CHUNK):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _too_long(raw: bytes, number: int, place: str, most: int) -> Line:
    text = raw[:KEPT_CHARACTERS].decode("utf-8", errors="replace")
    hint = "; a file with one JSON value is to be named .json" if text.lstrip("\ufeff \t").startswith("[") else ""
    reason = f"the line has more than {most:,} bytes, too many for one row; divide it{hint}"
    return Line(number=number, place=place, text="\n", bad=BadRow(reason=reason, content=text))


def _check_encoding(path: Path, first: BadRow, place: str) -> None:
    """Raises TunesmithError where more lines are not UTF-8 than are, and not just a few: that is the file's encoding,
    not a bad row."""
    count = right = wrong = 0
    with path.open("rb") as file:
        while raw := file.readline(MOST_BYTES):
            count += 1
            if raw.isascii():
                continue
            try:
                raw.decode("utf-8")
                right += 1
            except UnicodeDecodeError:
                wrong += 1
    if wrong > max(1, right) and wrong > FEW * count:
        raise TunesmithError(
            f"{place}: {first.reason}. Of the lines that are not plain ASCII {right:,} are UTF-8 and "
            f"{wrong:,} are not: the file has another encoding, such as Latin-1 (`iconv -f latin1 -t utf8`)"
        )
