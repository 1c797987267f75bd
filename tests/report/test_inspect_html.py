"""The inspect page is whole, holds what the terminal holds, and data can't break out of it."""

from html.parser import HTMLParser

from tests.report.test_inspect import END, WORDS, encode, inspected
from tunesmith.report.inspect import inspect_row, page


class Reader(HTMLParser):
    """Text by the innermost class, the tags and their attributes; fails where tags are not closed in order."""

    VOID = ("meta", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1][1] if self.open else "", data))

    def tokens(self) -> str:
        """The text of all token spans, marks included, behind the legend's."""
        start = next(i for i, (_, data) in enumerate(self.text) if data.startswith("example"))
        return "".join(data for name, data in self.text[start:] if name.startswith("t ") or name in ("t", "m"))


HOSTILE = "<script>alert('&amp;')</script><img src=x onerror=\"x\">\n</div></section>]]>-->"


def test_the_page_escapes_data_in_every_place() -> None:
    row = inspected((HOSTILE, 0), (HOSTILE, 1), title=f"example {HOSTILE}")
    reader = Reader(page(HOSTILE, [(HOSTILE, HOSTILE)], [row]))
    assert reader.tokens() == HOSTILE.replace("\n", "⏎") * 2
    tags = {tag for tag, _ in reader.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe"})
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on") or name == "src"]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page("t", [], [inspected(("a", 0), ("b<|im_end|>", 1))])
    assert not [word for word in ("http:", "https:", "url(", "@import", "<script", "src=", "href=") if word in html]
    assert "default-src 'none'" in html


def test_the_page_marks_supervised_and_special_tokens_and_weights() -> None:
    reader = Reader(page("t", [], [inspected(("ask", 0), ("sa", 0.25), ("y<|im_end|>", 1))]))
    spans = [attributes for _, attributes in reader.tags if "title" in attributes]
    names = [set((attributes["class"] or "").split()) - {"b"} for attributes in spans]
    assert names == [*[{"t"}] * 3, *[{"t", "s"}] * 3, {"t", "s", "x"}]
    a = encode("a")[0]
    assert [spans[index]["title"] for index in (0, 4, 6)] == [
        f"id {a}: not supervised",
        f"id {a}: supervised, weight 0.25",
        f"id {END}: supervised, weight 1",
    ]
    weights = [data for name, data in reader.text if name == "w"]
    assert weights[1:] == ["\N{MULTIPLICATION SIGN}0.25"]  # the first is the legend's


def test_the_page_has_all_ids_and_shows_them_on_demand() -> None:
    row = inspected(("é", 1))
    ids = ",".join(map(str, encode("é")))
    for wanted in (True, False):
        reader = Reader(page("t", [], [row], ids=wanted))
        assert [data for name, data in reader.text if name == "i"] == [ids]
        (box,) = (attributes for tag, attributes in reader.tags if tag == "input")
        assert ("checked" in box) is wanted


def test_the_page_separates_documents_and_warns_where_no_end_token_is_learned() -> None:
    ids = [*encode("ab"), END, *encode("c")]
    row = inspect_row("pack 1 of 1", ids, ids, None, [3, 1], WORDS)
    reader = Reader(page("t", [], [row]))
    assert [tag for tag, _ in reader.tags].count("section") == 2
    warnings = [data for name, data in reader.text if name == "warn"]
    assert warnings == ["1 tokens, 1 supervised (100%), no end token is learned, the last is “c”"]
