"""A page as a reader has it, and text that would act in one."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = [
    "<script>document.documentElement.dataset.owned = 1</script>",
    "<img src=x onerror='document.documentElement.dataset.owned = 1'>",
    "\" onmouseover=\"document.documentElement.dataset.owned = 1\" onfocus=\"document.documentElement.dataset.owned = 1",
    "</title></style></script><svg onload='document.documentElement.dataset.owned = 1'>",
    "{{ 'ja' * 5 }}{% raw %}",
]  # fmt: skip


class Text(HTMLParser):
    """Visible text and every attribute of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self._hidden = "", False
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("style", "script")
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data
