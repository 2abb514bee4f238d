"""A page as a browser reads it, for tests: elements, texts, tables."""

import html.parser

EVIL = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)></title></style>"


class Page(html.parser.HTMLParser):
    """elements: (tag, attributes). texts: what is shown. tables: rows of cells. badly_nested: closed out of order."""

    VOID = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.tables, self.badly_nested = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.badly_nested.append(tag)

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def of(self, tag, word=""):
        """Attributes of the elements with this tag and this word among their classes."""
        return [
            its for each, its in self.elements if each == tag and (not word or word in its.get("class", "").split())
        ]

    @property
    def text(self):
        return "".join(self.texts)


def opened(text):
    """The page, after checking that it is well formed, needs nothing from outside and has no script but its own."""
    page = Page(text)
    assert page.open == page.badly_nested == []
    assert "http" not in text, "no address of anything outside"
    assert not {tag for tag, _ in page.elements} & {"img", "link", "iframe", "object", "base"}
    for tag, its in page.elements:
        assert not [name for name in its if name == "src" or name.startswith("on")], (tag, its)
        assert its.get("href", "#").startswith("#")
    assert len(page.of("script")) == len(page.of("style")) == 1, "only our own"
    assert EVIL not in text
    assert "nan" not in page.text.lower().split()
    return page
