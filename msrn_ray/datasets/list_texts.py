"""Reads texts that programs write for lists: JSON, Python's lists and sets, numpy's arrays, Label Studio's choices."""

from __future__ import annotations

import ast
import json
import re

_MAX_CHARACTERS = 100_000  # of one text: Python's parser is recursive
_QUOTED = r"""(?:'[^']*'|"[^"]*")"""
_NUMPY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})*\s*\]")
_ADJACENT = re.compile(rf"{_QUOTED}\s+{_QUOTED}|{_QUOTED}{{2}}")  # Python would join the two texts
LIST_TEXT = r"^\s*(\[.*\]|\{.*\}|\(.*\)|set\(\))\s*$"


def parse_list_text(text: str) -> list[str] | list[int] | None:
    """Return the labels that a text lists, or None if it is no list of texts or whole numbers. No code is run.

    Args:
        text: such as `["a"]`, `['a', 'b']`, `{'a', 'b'}`, `('a',)`, `set()`, `['a' 'b']` or `{"choices": ["a"]}`.
    """
    text = text.strip()
    if len(text) > _MAX_CHARACTERS:
        return None
    if text in ("", "set()"):
        return []
    if _NUMPY.fullmatch(text):
        return [quoted[1:-1] for quoted in re.findall(_QUOTED, text)]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _ADJACENT.search(text):
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return None
    if isinstance(value, dict):
        value = value["choices"] if {*value} == {"choices"} else [] if not value else None
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if not isinstance(value, (list, tuple)):
        return None
    if all(isinstance(part, str) for part in value):
        return [str(part) for part in value]
    return [int(part) for part in value] if all(isinstance(part, int) for part in value) else None
