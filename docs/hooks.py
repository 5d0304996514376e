"""What the site's pages are made with beside Markdown: formulas, fields of documents, links out of docs/.

mkdocs calls these functions by their names; see hooks in mkdocs.yml.
"""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from curvcli.documents import json_schema

# What arithmatex leaves: \(...\) in a span, \[...\] in a div.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_LINK = re.compile(r"\]\((\.\./[^)\s]+)\)")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the fields of the documents in their place, and makes links out of docs/ links into the repository."""
    markdown = re.sub(r"<!-- fields of ([\w-]+) -->", lambda found: _fields(found[1]), markdown)

    def outward(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[1]))
        return found[0] if path.startswith("docs/") else f"]({config.extra['repository']}/blob/main/{path})"

    return _LINK.sub(outward, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw themselves: no script and no fonts to fetch."""

    def drawn(found: re.Match[str]) -> str:
        latex = found[2].strip()
        for entity, character in _ENTITIES.items():
            latex = latex.replace(entity, character)
        return convert(latex, display="block" if found[1] == "div" else "inline")

    return _FORMULA.sub(drawn, html)


def _fields(name: str) -> str:
    """A table of a document's own fields, and of those of the objects in it."""
    schema = json_schema(name)
    parts = [f"[Schema](schemas/{name}.json), as `curv schema {name}` prints it.", _table(schema)]
    for kind, inner in schema.get("$defs", {}).items():
        parts += [f'??? note "{kind}"', _indented(f"{_sentence(inner)}\n\n{_table(inner)}")]
    return "\n\n".join(parts)


def _table(schema: dict[str, Any]) -> str:
    rows = ["| field | type | what |", "|---|---|---|"]
    for field, described in schema["properties"].items():
        rows.append(f"| `{field}` | {_type(described)} | {_sentence(described)} |")
    return "\n".join(rows)


def _type(described: dict[str, Any]) -> str:
    if "$ref" in described:
        return str(described["$ref"].rsplit("/", 1)[-1])
    if "const" in described:
        return f"`{json.dumps(described['const'])}`"
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    if "anyOf" in described:
        return " or ".join(_type(choice) for choice in described["anyOf"])
    if described.get("type") == "array":
        return f"list of {_type(described['items'])}" if "items" in described else "list"
    return str(described.get("type", "any"))


def _sentence(described: dict[str, Any]) -> str:
    return " ".join(described.get("description", "").split()).replace("|", "\\|")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
