"""matplotlib's SVG as part of a page: the page's colours, labels on marks, nothing loaded, no inline style."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from markupsafe import Markup

from curvcli.errors import plain
from curvcli.render.style import PALETTE

_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_KEPT = {"g", "defs", "clipPath", "pattern", "rect", "path", "use", "text", "title"}
_DROPPED = {"style", "font", "font-family"}
# Which variable of the page's style a colour stands for; names of one look share one.
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in reversed(PALETTE.items())}
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_REFERENCE = re.compile(r"(?<=#)[\w-]+")
_SIZE = re.compile(r"[\d.]+px")
_UPRIGHT = re.compile(r"rotate\(-?0 [^)]*\)")


def embedded(svg: bytes, labels: Mapping[str, Sequence[str]], name: str, says: str) -> Markup:
    """The <svg> element of a page whose policy forbids style attributes and which may hold other pictures.

    Args:
        svg: a file by matplotlib, its text as text.
        labels: of the marks in the group of each id, in the order drawn.
        name: the element's class, and the beginning of its ids.
        says: what the picture is, for those who cannot see it.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314  (made by matplotlib a moment ago)
    for group in root.iter(f"{_SVG}g"):
        if (found := group.get("id", "")) in labels:
            _label(group, labels[found])
    names: dict[str, str] = {}  # of what is referred to

    def renamed(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"{name}-{len(names)}")

    _simplify(root)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "xlink:href" or value.startswith("url("):
                element.set(key, _REFERENCE.sub(renamed, value))
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in names:
            element.set("id", names[own])
    _unwrap(root)
    root.attrib = {
        "class": name, "viewBox": root.get("viewBox", ""), "role": "img", "aria-label": plain(says),
        "stroke-linejoin": "round", "stroke-linecap": "butt",
    }  # fmt: skip
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  (the writer has escaped its text)


def _label(group: ElementTree.Element, labels: Sequence[str]) -> None:
    """A <title> into each mark. One mark left out would shift all labels after it: they must be as many."""
    marks = list(group.iter(f"{_SVG}use")) or list(group.iter(f"{_SVG}path"))
    for mark, label in zip(marks, labels, strict=True):
        ElementTree.SubElement(mark, f"{_SVG}title").text = plain(label)


def _simplify(element: ElementTree.Element) -> None:
    """Names without a namespace, presentation attributes instead of style, short numbers; what a page lacks is left out."""
    element.tag = element.tag.removeprefix(_SVG)
    element.tail = None
    if element.tag not in ("text", "title"):
        element.text = None
    element.attrib = dict(filter(None, (_attribute(*pair) for pair in _attributes(element).items())))
    for child in list(element):
        if child.tag.removeprefix(_SVG) in _KEPT:
            _simplify(child)
        else:
            element.remove(child)


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    """An element's own, and its style's, which come before them."""
    pairs = (part.partition(":") for part in element.get("style", "").split(";") if part.strip())
    style = {key.strip(): value.strip() for key, _, value in pairs}
    if size := _SIZE.search(style.get("font", "")):
        style["font-size"] = size[0]
    return {key: value for key, value in {**element.attrib, **style}.items() if key not in _DROPPED}


def _attribute(key: str, value: str) -> tuple[str, str] | None:
    if key == _HREF:
        return "xlink:href", value
    if value.startswith("#"):
        return key, _VARIABLES[value]  # a colour that is not in the palette has no dark twin
    value = " ".join(_UPRIGHT.sub("", _DECIMALS.sub(r"\1", value)).split())
    return (key, value) if value else None


def _unwrap(element: ElementTree.Element) -> None:
    """Groups that say nothing give way to what is in them."""
    for child in element:
        _unwrap(child)
    element[:] = [
        inner for child in element for inner in (child if child.tag == "g" and not child.attrib else [child])
    ]  # fmt: skip
