"""Docstrings as Markdown: what they hold of reStructuredText, which the site's generator does not read.

Roles such as ``:func:`rampde.odeint``` become links, a double colon before a block of code a single one, and tables of
equals signs Markdown's. Attributes that are described together get the type of the first of them.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`([\w.]+)`")
RULE = re.compile(r"^=+(?: +=+)+$")
TOGETHER = re.compile(r"^( +\w+(?:, \w+)+):", re.MULTILINE)
# functions that have the name of the module they are in
IN_MODULE = {f"rampde.{name}": f"rampde.{name}.{name}" for name in ("odeint", "odeint_event")}


class Markdown(griffe.Extension):
    """Rewrites every docstring of what is documented."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj)


def rewritten(text: str, of: griffe.Object) -> str:
    """A docstring in Markdown."""
    text = ROLE.sub(lambda match: _link(match[1]), text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = TOGETHER.sub(lambda match: _together(match[1], of), text)
    return "\n".join(_with_markdown_tables(text.splitlines()))


def _link(name: str) -> str:
    # a name that is on no page stays what it is, without a warning
    return f'<autoref identifier="{IN_MODULE.get(name, name)}" optional><code>{name}</code></autoref>'


def _together(names: str, of: griffe.Object) -> str:
    """``names`` and their type, where ``of`` has attributes of these names, as the reader of docstrings expects it."""
    annotation = getattr(of.members.get(names.split(",")[0].strip()), "annotation", None)
    # what follows the first space is taken for the type
    return names.replace(", ", ",\N{NO-BREAK SPACE}") + (f" ({annotation}):" if annotation else ":")


def _with_markdown_tables(lines: list[str]) -> list[str]:
    found: list[str] = []
    rules = 0
    starts: list[int] = []
    for line in lines:
        if RULE.match(line.strip()):
            rules = rules % 3 + 1
            starts = [match.start() for match in re.finditer("=+", line)]
            if rules == 2:
                found.append(_row(["---"] * len(starts), starts[0]))
        elif rules in (1, 2):
            # a cell may go on beyond its rule, up to the next one
            ends = [*starts[1:], None]
            found.append(_row([line[start:end].strip() for start, end in zip(starts, ends, strict=True)], starts[0]))
        else:
            found.append(line)
    return found


def _row(cells: list[str], indent: int) -> str:
    # what belongs to an item of a list is indented by four
    return " " * (-(-indent // 4) * 4) + "| " + " | ".join(cells) + " |"
