"""Lines of files that are compressed, in another encoding, or too long."""

import bz2
import lzma
from pathlib import Path

import pytest

from tunesmith.data import lines
from tunesmith.data.lines import encoding_of, numbered_lines
from tunesmith.errors import TunesmithError

TEXTS = {
    "BIG5": ("cp950", "請問台北明天的天氣如何。我想知道會不會下雨、需要帶傘嗎。謝謝你的說明。"),
    "GBK": ("gbk", "请问北京明天的天气怎么样。我想知道会不会下雨、需要带伞吗。谢谢你的说明。"),
    "SHIFT_JIS": ("cp932", "明日の東京の天気はどうですか。傘を持って行ったほうがいいでしょうか。"),
    "EUC-KR": ("cp949", "내일 서울 날씨는 어떻습니까? 비가 올까요? 우산을 가져가야 합니까?"),
    "WINDOWS-1252": ("cp1252", "Où est le café de l\u2019hôtel ? Größe, naïve, señor, São Paulo, 5 €"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_another_encoding_is_named_with_what_to_write(tmp_path: Path, name: str) -> None:
    codec, text = TEXTS[name]
    file = tmp_path / "my rows.csv"
    file.write_bytes("".join(f"{i},{text}\n" for i in range(5)).encode(codec))
    assert encoding_of(file.read_bytes())[0] == name
    with pytest.raises(TunesmithError) as caught:
        list(numbered_lines(file, "my rows.csv"))
    assert f"0 are UTF-8 and 5 are not: the file has another encoding. {name} fits, in which" in str(caught.value)
    new = tmp_path / "my rows.utf8.csv"
    assert f"write `iconv -f {name} -t UTF-8 '{file}' > '{new}'` and take the new file" in str(caught.value)
    assert next(word for word in text.split() if not word.isascii())[:8] in str(caught.value)


def test_a_few_letters_of_western_europe_are_not_taken_for_chinese() -> None:
    for text in ("café", "Äpfel Öl Übung", "año niño", "ÀÉÎÕÜ", "L\u2019été, déjà"):
        assert encoding_of(text.encode("cp1252"))[0] == "WINDOWS-1252"


def test_a_single_damaged_line_is_bad_and_names_its_byte(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes("ä\n".encode() * 3 + b"\xe4\n")
    *right, wrong = numbered_lines(file, "rows.txt")
    assert [line.text for line in right] == ["ä\n"] * 3
    assert wrong.bad is not None
    assert wrong.bad.reason == "byte 9 (0xe4) is not UTF-8; save the file as UTF-8"


def test_lines_keep_their_numbers_and_bytes_where_empty_ones_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(b"\n\r\na\n\n\xe4\n \n\n")
    first, wrong, blank = numbered_lines(file, "rows.txt", skip_empty=True)
    assert (first.text, first.place) == ("a\n", "rows.txt, line 3")
    assert wrong.bad is not None
    assert wrong.bad.reason == "byte 6 (0xe4) is not UTF-8; save the file as UTF-8"
    assert (blank.text, blank.number) == (" \n", 6)


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_a_compressed_file_that_is_cut_off_or_damaged_is_refused(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    file, packed = tmp_path / "rows", pack(b"line\n" * 10_000)
    for content in (packed[:-9], packed[:20] + b"\0" * 9 + packed[29:]):
        file.write_bytes(content)
        with pytest.raises(TunesmithError, match=r"^rows can't be read: "):
            list(numbered_lines(file, "rows"))


def test_xz_may_not_take_any_amount_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.xz"
    file.write_bytes(lzma.compress(b"line\n"))
    assert [line.text for line in numbered_lines(file, "rows.xz")] == ["line\n"]
    monkeypatch.setattr(lines, "UNPACKING_BYTES", 1 << 20)
    with pytest.raises(TunesmithError, match=r"rows\.xz can't be read: Memory usage limit exceeded"):
        list(numbered_lines(file, "rows.xz"))


def test_a_long_line_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(b"a" * 3000 + b"\n" + b"b" * 10 + b"\n")
    long, short = numbered_lines(file, "rows.txt", most=1000)
    assert long.bad is not None
    assert long.bad.reason == "the line has more than 1,000 bytes, too many for one row; divide it"
    assert (short.text, short.place, short.bad) == ("b" * 10 + "\n", "rows.txt, line 2", None)
