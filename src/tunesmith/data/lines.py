"""The bytes of a data file as lines of text: unpacked, in UTF-8, each with its place, and in bounded memory.

How a file is compressed shows in its first bytes, not in its name: gzip, bzip2, xz and Zstandard are unpacked as it is
read. UTF-16 is read where a byte order mark says so. Any other encoding than UTF-8 is refused with the one that fits.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from tunesmith.data.skipped import KEPT_CHARACTERS, BadRow
from tunesmith.errors import TunesmithError

MOST_BYTES = 64_000_000
"""Of a line. A row that can be trained on is a thousandth of it."""
CHUNK = 1 << 20
UNPACKING_BYTES = 256 << 20
"""Of memory for unpacking xz, whose files may ask for gigabytes."""
DAMAGED_SHARE = 0.05
"""So large a share of a file's lines can be damaged; more have another encoding."""

EMPTY = (b"\n", b"\r\n")
BOM = codecs.BOM_UTF8
MAGIC = {
    b"PK\x03\x04": "a zip archive (as .xlsx and .docx are); save a spreadsheet as CSV UTF-8, unpack others first",
    b"\xd0\xcf\x11\xe0": "of an old version of Excel or Word; save it as CSV UTF-8",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"FEA1": "a Feather file of version 1; save it as .parquet",
    b"PAR1": "a Parquet file in a compressed one; unpack it first",
    b"ARROW1": "an Arrow file in a compressed one; unpack it first",
    b"%PDF-": "a PDF document; save its text as .txt",
    b"\x80\x04\x95": "a pickle, which may run any code; save its rows as .jsonl",
}
"""How files that are not text begin."""
TAR = slice(257, 262), b"ustar"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
ENCODED = {codecs.BOM_UTF32_LE: "utf-32", **dict.fromkeys(UTF16, "utf-16")}
"""Byte order marks and the codecs that read them; that of UTF-32 begins like that of UTF-16."""
DAMAGED = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""

CJK = {
    "EUC-KR": ("cp949", re.compile(rb"[\xa1-\xa3\xb0-\xc8][\xa1-\xfe]")),
    "GBK": ("gbk", re.compile(rb"[\xa1-\xa9\xb0-\xd7][\xa1-\xfe]")),
    "BIG5": ("cp950", re.compile(rb"[\xa1-\xc6][\x40-\xfe]")),
    "SHIFT_JIS": ("cp932", re.compile(rb"[\x81-\x83\x88-\x97][\x40-\xfc]")),
}
"""Encodings of two bytes a character, the narrowest first: Python's codec, and where everyday characters lie."""
CHARACTER = re.compile(rb"[\x81-\xfe][\x40-\xfe]")
EVERYDAY_SHARE = 0.8
LOOKED_AT_BYTES = 200_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line with its end, and its number from 1. With `bad`, its text is what could be read of it."""

    number: int
    place: str
    text: str
    bad: BadRow | None = None


# Bytes


@contextmanager
def opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """The content of a file, unpacked, and in UTF-8 where its beginning says how it is encoded.

    Raises TunesmithError, also for what reading in the block raises: a file that is damaged or can't be read.
    """
    try:
        with path.open("rb") as file:
            content = _unpacked(file)
            codec = next((codec for mark, codec in ENCODED.items() if content.peek(4).startswith(mark)), None)
            yield cast(BinaryIO, io.BufferedReader(_Pieces(_transcoded(content, codec))) if codec else content)
    except DAMAGED as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise TunesmithError(f"{name} can't be read: {reason}") from error


def compression_of(head: bytes) -> str | None:
    """How a file that begins with `head` is compressed."""
    return next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None)


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed in a way that `opened` unpacks."""
    with path.open("rb") as file:
        return compression_of(file.read(8)) is not None


def _unpacked(file: io.BufferedReader) -> io.BufferedReader:
    match compression_of(file.peek(8)):
        case "gzip":
            return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)))
        case "bzip2":
            return io.BufferedReader(cast(io.RawIOBase, bz2.BZ2File(file)))
        case "xz":
            return io.BufferedReader(_Pieces(_unpacked_xz(file)))
        case "zstd":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
    return file


def _unpacked_xz(file: BinaryIO) -> Iterator[bytes]:
    """What is in an xz file, which may consist of several."""
    rest = file.read(CHUNK)
    while rest:
        unpacker = lzma.LZMADecompressor(memlimit=UNPACKING_BYTES)
        while not unpacker.eof:
            piece = unpacker.decompress(rest, max_length=CHUNK)
            rest = b""
            if piece:
                yield piece
            elif unpacker.needs_input and not (rest := file.read(CHUNK)):
                raise EOFError("the compressed file is cut off")
        rest = unpacker.unused_data.lstrip(b"\0") or file.read(CHUNK)


def _transcoded(file: BinaryIO, codec: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(codec)()
    while piece := file.read(CHUNK):
        yield decoder.decode(piece).encode()
    yield decoder.decode(b"", final=True).encode()


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            try:
                self._rest = memoryview(next(self._pieces))
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


# Lines


def numbered_lines(path: Path, name: str, most: int = MOST_BYTES, *, skip_empty: bool = False) -> Iterator[Line]:
    """The lines of a file, split at \\n only: JSON may hold other line separators. A BOM is left out.

    Raises TunesmithError for a file that can't be read or is not text; `name` is what messages call it. A line of more
    than `most` bytes (unpacked), with a NUL or with bytes that are not UTF-8 is bad. Empty lines count where they are
    skipped, too.
    """
    offset, number, checked = 0, 0, False
    with opened(path, name) as file:
        while raw := file.readline(most):
            number += 1
            if skip_empty and raw in EMPTY:  # there may be millions
                offset += len(raw)
                continue
            place = f"{name}, line {number}"
            if number == 1:
                check_beginning(raw, place)
            if len(raw) == most and not raw.endswith(b"\n"):
                yield Line(number=number, place=place, text="\n", bad=_too_long(raw, most))
                offset += _read_past_line(file)
            else:
                text, bad = _decoded(raw, offset)
                if bad is not None and not checked:
                    checked = True
                    check_encoding(path, name, bad.reason, place)
                yield Line(number=number, place=place, text=text, bad=bad)
            offset += len(raw)


def check_beginning(raw: bytes, place: str) -> None:
    """Raises TunesmithError for the beginning of what is not text."""
    meanings = (meaning for magic, meaning in MAGIC.items() if raw.startswith(magic))
    meaning = next(meanings, "a tar archive; unpack it first" if raw[TAR[0]] == TAR[1] else None)
    if (packed := compression_of(raw)) is not None:
        meaning = f"compressed twice, with {packed} inside; unpack it first"
    if meaning is not None:
        raise TunesmithError(f"{place}: the file is {meaning}")
    if len(raw) > 1 and (raw[0] == 0) != (raw[1] == 0):
        raise TunesmithError(f"{place}: the file is UTF-16 without a byte order mark, or not text; save it as UTF-8")


def _decoded(raw: bytes, offset: int) -> tuple[str, BadRow | None]:
    """The text of a line, which begins at byte `offset` of the content, and what is wrong with it."""
    if offset == 0 and raw.startswith(BOM):
        raw, offset = raw[len(BOM) :], len(BOM)
    try:
        text, reason = raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        text, reason = raw.decode("utf-8", errors="replace"), not_utf8(offset + error.start, raw[error.start])
    if b"\0" in raw:
        reason = f"there is a NUL at byte {offset + raw.index(0)}; the file is damaged, or it is not UTF-8 text"
    return text, BadRow(reason=reason, content=text) if reason else None


def not_utf8(at: int, byte: int) -> str:
    """What is wrong with a byte of the content."""
    return f"byte {at} (0x{byte:02x}) is not UTF-8; save the file as UTF-8"


def _read_past_line(file: BinaryIO) -> int:
    """Reads to the end of the line, and returns how many bytes that were."""
    passed = 0
    while part := file.readline(CHUNK):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _too_long(raw: bytes, most: int) -> BadRow:
    text = raw[:KEPT_CHARACTERS].decode("utf-8", errors="replace")
    return BadRow(reason=f"the line has more than {most:,} bytes, too many for one row; divide it", content=text)


# Other encodings


def check_encoding(path: Path, name: str, reason: str, place: str) -> None:
    """Raises TunesmithError where more lines are not UTF-8 than are, and not just a few: that is the file's encoding,
    not a bad row. `reason` is what is wrong with the first of them, at `place`."""
    count = right = wrong = 0
    foreign: list[bytes] = []
    with opened(path, name) as file:
        while raw := file.readline(MOST_BYTES):
            count += 1
            if raw.isascii():
                continue
            try:
                raw.decode("utf-8")
                right += 1
            except UnicodeDecodeError:
                wrong += 1
                if sum(map(len, foreign)) < LOOKED_AT_BYTES:
                    foreign.append(raw[:LOOKED_AT_BYTES])
    if wrong > max(1, right) and wrong > DAMAGED_SHARE * count:
        encoding, codec = encoding_of(b"".join(foreign))
        excerpt = " ".join(_first_foreign(foreign[0].decode(codec, errors="replace")).split())
        unpack = "unpack it, and then " if is_compressed(path) else ""
        new = path.with_name(f"{path.stem}.utf8{path.suffix}")
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"
        raise TunesmithError(
            f"{place}: {reason}. Of the lines that are not plain ASCII {right:,} are UTF-8 and {wrong:,} are not: "
            f"the file has another encoding. {encoding} fits, in which this reads {excerpt!r}. If that is right, "
            f"{unpack}write `{command}` and take the new file; else save it as UTF-8 where it was made (Excel calls it "
            "CSV UTF-8)"
        )


def encoding_of(text: bytes) -> tuple[str, str]:
    """The name, as `iconv` knows it, and the codec of an encoding in which `text`, which is not UTF-8, makes sense.

    In an encoding of two bytes a character most characters are everyday ones; in other encodings the same bytes are
    rare ones or none. Where no such encoding fits, the bytes are letters of Western Europe, which any bytes can be.
    """
    best, encoding, codec = EVERYDAY_SHARE, "WINDOWS-1252", "cp1252"
    for name, (candidate, everyday) in CJK.items():
        characters = CHARACTER.findall(text)
        # Letters with accents stand alone: their byte is followed by a letter, not by another one of theirs.
        pairs = sum(pair[1] > 0x7F for pair in characters)
        share = sum(everyday.fullmatch(pair) is not None for pair in characters) / max(1, len(characters))
        try:
            text.decode(candidate)
        except UnicodeDecodeError:
            continue
        if share > best and pairs > len(characters) / 4:
            best, encoding, codec = share, name, candidate
    return encoding, codec


def _first_foreign(text: str, most: int = 30) -> str:
    """What is around the first character that is not ASCII."""
    at = next((i for i, character in enumerate(text) if not character.isascii()), 0)
    return text[max(0, at - most // 2) : at + most]
