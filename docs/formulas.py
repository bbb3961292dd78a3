"""Formulas as MathML, made when the site is built: a page loads nothing from anybody's server.

A hook of mkdocs. `pymdownx.arithmatex` marks the LaTeX in a page; this puts MathML in its place,
which browsers draw by themselves. They need a font with the tables of mathematics for that, which
not every system has, and so the site ships STIX Two Math, a file of the package ziamath.
"""

from __future__ import annotations

import html
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FONT = "STIXTwoMath-Regular.ttf"
# What arithmatex writes with `generic: true`: \(…\) in a span, \[…\] in a div.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# A function's name is set off from what follows it, unless that is a bracket.
NAMED = re.compile(
    r"<mi>(?P<name>log|exp|min|max|det|sup|dist|argmin)</mi>"
    r"(?!<mo(?: [^>]*)?>(?:\(|&#x00028;))"
)


def mathml(latex: str, display: str) -> str:
    """One formula.

    Args:
        latex: Without dollars.
        display: ``"inline"`` or ``"block"``.

    Raises:
        ValueError: For a command that is not known; it would stand in the page as text.

    Examples:
        >>> mathml(r"\\eta", "inline").count("<mi>&#x003B7;</mi>")
        1
        >>> mathml(r"\\unheard", "inline")
        Traceback (most recent call last):
        ...
        ValueError: \\unheard: not known to latex2mathml
    """
    found = convert(latex.strip(), display=display)
    found = NAMED.sub(r'<mo lspace="0" rspace="0.17em">\g<name></mo>', found)
    if unknown := re.search(r"\\[A-Za-z]+", html.unescape(re.sub(r"<[^>]*>", " ", found))):
        raise ValueError(f"{unknown[0]}: not known to latex2mathml")
    return found


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Every formula of a page."""

    def replaced(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        try:
            found = mathml(html.unescape(match["latex"]), display)
        except Exception as error:  # whatever latex2mathml raises, the page is what to look at
            raise PluginError(f"{page.file.src_path}: {match['latex']!r}: {error}") from error
        # A wide formula scrolls, and not the page with it.
        return f'<div class="formula">{found}</div>' if display == "block" else found

    return FORMULA.sub(replaced, content)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The font, beside the stylesheet that names it."""
    [font] = [f for f in metadata.files("ziamath") or () if f.name == FONT]
    source = str(Path(str(font.locate())))
    files.append(File.generated(config, f"stylesheets/{FONT}", abs_src_path=source))
    return files
