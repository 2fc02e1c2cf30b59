"""Formulas as MathML, which browsers show by themselves: the pages need no script and no font for them.

In Markdown they stand between dollar signs, where forges show them too; arithmatex finds them, and the hook below
turns what it found into MathML while MkDocs builds the site.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(text: str, **_: Any) -> str:
    """``text``, HTML, with every formula in MathML: of a ``div`` on lines of its own, of a ``span`` in the text."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        return convert(html.unescape(match["tex"]), display=display)

    return FORMULA.sub(mathml, text)
