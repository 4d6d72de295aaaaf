"""matplotlib's pictures as parts of a page: SVG without styles of its own, coloured by the page's CSS variables.

A page that forbids inline styles still shows them, and dark mode and print recolour them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 7
"""Colours for things of different kinds; the last one is for all others together."""
LEVELS = 6
"""Shades for more and less of one thing."""

_VARIABLES = {
    "ink": "#010101",
    "muted": "#010102",
    "grid": "#010103",
    "card": "#010104",
    "accent": "#010105",
    "track": "#010106",
    "on-heat": "#010107",
    **{f"series-{i}": f"#0200{i:02x}" for i in range(SERIES)},
    **{f"heat-{i}": f"#0300{i:02x}" for i in range(LEVELS)},
}
"""A page's variable, and the colour that stands for it until the picture is drawn."""

_NAMES = {color: f"var(--{name})" for name, color in _VARIABLES.items()}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_FONT = 11.5
_DROPPED = {"font-family", "font", "stroke-miterlimit"}


def color(name: str) -> str:
    """What matplotlib is given for a variable of the page."""
    return _VARIABLES[name]


def draw(paint: Callable[[Axes], None], width: float, height: float, name: str, title: str, text: str) -> str:
    """One picture of so many CSS pixels; ``name`` makes its ids unique, ``title`` and ``text`` are read out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "font.size": _FONT,
        "font.family": "DejaVu Sans",
        "text.color": color("ink"),
        "axes.labelcolor": color("muted"),
        "xtick.color": color("muted"),
        "ytick.color": color("ink"),
        "axes.edgecolor": color("grid"),
        "grid.color": color("grid"),
        "xtick.labelsize": _FONT,
        "ytick.labelsize": _FONT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "path.simplify": False,
    }
    with rc_context(settings):
        figure = Figure((width / 72, height / 72), dpi=72, layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
        axes = figure.add_subplot()
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_facecolor("none")
        paint(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), width, name, title, text)


def _inline(svg: str, width: float, name: str, title: str, text: str) -> str:
    """The picture as an element of a page."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([A-Za-z]\w+)", svg))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata" or (
                child.tag == f"{_SVG}defs" and child.find(f"{_SVG}style") is not None
            ):
                parent.remove(child)
    for node in root.iter():
        _plain(node, name, used)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "width": f"{width:g}", "role": "img"}
    root.attrib["aria-labelledby"] = f"{name}-title {name}-text"
    for i, (tag, words) in enumerate((("title", title), ("desc", text))):
        said = ElementTree.Element(_SVG + tag, {"id": f"{name}-{'title' if tag == 'title' else 'text'}"})
        said.text = words
        root.insert(i, said)
    ElementTree.register_namespace("", _SVG[1:-1])
    return re.sub(r"\s*\n\s*", " ", ElementTree.tostring(root, encoding="unicode")).replace(
        f' xmlns="{_SVG[1:-1]}"', "", 1
    )


def _plain(node: ElementTree.Element, name: str, used: set[str]) -> None:
    """Styles become attributes, colours variables, ids the picture's own."""
    for declaration in node.attrib.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if value and key.strip() not in _DROPPED:
            node.attrib[key.strip()] = _NAMES.get(value.strip(), value.strip())
    identity = node.attrib.pop("id", "")
    if identity in used:
        node.attrib["id"] = f"{name}-{identity}"
    if link := node.attrib.pop(_HREF, ""):
        node.attrib["href"] = f"#{name}-{link[1:]}"
    if clip := node.attrib.get("clip-path"):
        node.attrib["clip-path"] = clip.replace("#", f"#{name}-")
    if node.attrib.get("transform", "").startswith("rotate(-0 "):
        del node.attrib["transform"]
