"""A page as a browser takes it apart, and text that tries to be more than text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

TAGS = """html head meta title style body main header section figure h1 h2 h3 p div span i dl dt dd small table thead tbody
    tr th td svg g path text line circle rect details summary pre code"""
EVIL = "<script>alert('x')</script>\"&\x00\ud800"


class Page(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def refers_outside(raw: str) -> list[str]:
    """Whatever in a page could load something or run."""
    page = Page(raw)
    found = sorted({"link", "script", "img", "iframe", "base", "object", "embed", "form"} & set(page.tags))
    found += [name for name, _ in page.attributes if name in {"src", "href", "xlink:href", "action", "data", "style"}]
    found += [name for name, _ in page.attributes if name.startswith("on")]
    style = raw[raw.index("<style>") : raw.index("</style>")]
    return found + [word for word in ("url(", "@import") if word in style]
