"""The text of web pages (HTML), books (EPUB) and subtitles (SubRip): one document per page, chapter or film."""

from __future__ import annotations

import html.parser
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from common.cli import UserError
from data.readers.archives import zip_members
from data.readers.files import decoded_blocks, split_suffix

_HIDDEN = {"script", "style", "head", "template", "noscript", "svg", "nav", "select", "button"}
_BLOCKS = {
    *("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "table", "blockquote", "pre", "section"),
    *("article", "header", "footer", "main", "figure", "aside", "dl", "form", "hr"),
}
_LINES = {"br", "li", "tr", "dt", "dd", "option", "figcaption"}
_PAGES = (".html", ".htm", ".xhtml")


def read_pages(path: str | Path) -> Iterator[str]:
    """The documents of an .html, .epub or .srt file. Raises UserError for a file that cannot be read."""
    kind = split_suffix(path)[0]
    if kind == ".epub":
        yield from _chapters(path)
    else:
        text = "".join(decoded_blocks(path))
        document = subtitle_text(text) if kind == ".srt" else page_text(text)
        if document:
            yield document


# --- HTML ---


class _Text(html.parser.HTMLParser):
    """Collects what a browser shows: blocks divided by blank lines, white space as HTML treats it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []  # the open elements whose content is not shown
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag == "body":
            self._hidden.clear()  # a page may leave its head open
        self._pre += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        self._pre = max(0, self._pre - (tag == "pre"))
        if tag in _BLOCKS:
            self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)  # XHTML: <script src="..."/> has no content

    def _break(self, tag: str) -> None:
        if not self._hidden:
            self.parts.append("\n\n" if tag in _BLOCKS else "\n" if tag in _LINES else "\t" if tag == "td" else "")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._pre else re.sub(r"[ \t\r\n\f]+", " ", data))


def page_text(page: str) -> str:
    r"""The text of an HTML page, without scripts, styles, navigation and markup.

    >>> page_text("<h1>T</h1><p>One &amp; two<p>Three<br>four")
    'T\n\nOne & two\n\nThree\nfour'
    """
    parser = _Text()
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    if "<pre" not in page:
        text = re.sub(r"\n[ \t]+", "\n", text)
        text = re.sub(r" *\t *|  +", lambda space: "\t" if "\t" in space[0] else " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# --- EPUB ---


def _chapters(path: str | Path) -> Iterator[str]:
    """The text of a book's chapters in the order in which they are read, each a document."""
    files = dict(zip_members(path, lambda name: name.lower().endswith((*_PAGES, ".opf", "container.xml"))))
    for name in _reading_order(files):
        try:
            text = page_text(files[name].decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {name} is not UTF-8 at byte {error.start}; convert the book again") from error
        if text:
            yield text


def _reading_order(files: dict[str, bytes]) -> list[str]:
    """The names of the pages in the order of the book's spine; without one, in the order of the archive."""
    pages = [name for name in files if name.lower().endswith(_PAGES)]
    package = next((name for name in files if name.lower().endswith(".opf")), None)
    if package is None:
        return pages
    try:
        root = ElementTree.fromstring(files[package])
    except ElementTree.ParseError:
        return pages
    folder = posixpath.dirname(package)
    items = {item.get("id"): unquote(item.get("href") or "") for item in root.findall(".//{*}item")}
    spine = [items.get(reference.get("idref"), "") for reference in root.findall(".//{*}itemref")]
    ordered = [posixpath.normpath(posixpath.join(folder, name)) for name in spine]
    return [name for name in dict.fromkeys(ordered) if name in files] or pages


# --- SubRip ---

_TIMES = re.compile(r"\d+:\d\d:\d\d[,.]\d+ *--> *\d+:\d\d:\d\d[,.]\d+.*")
_TAGS = re.compile(r"</?(?:[biu]|font)\b[^>]*>|\{\\[^}]*\}")


def subtitle_text(text: str) -> str:
    r"""The spoken text of a SubRip file, one line per subtitle, without numbers, times and formatting.

    >>> subtitle_text("1\n00:00:01,000 --> 00:00:02,000\n<i>Good\nmorning.</i>\n\n2\n00:00:03,000 --> ...")
    'Good morning.'
    """
    lines = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").lstrip("\ufeff")):
        rows = block.strip().split("\n")
        start = next((index + 1 for index, row in enumerate(rows) if _TIMES.match(row.strip())), None)
        if start is not None:
            lines.append(" ".join(_TAGS.sub("", row).strip() for row in rows[start:]).strip())
    return "\n".join(line for line in lines if line)
