"""Label names that may stand for one label, and names that may stand for none. C labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal

from ..datasets.merge_labels import WORDS_FOR_NONE
from .finding import Finding, plural, shorten

_IRREGULAR = {"people": "person", "men": "man", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot"}
_PLURAL_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""), *_IRREGULAR.items())
_MIN_SINGULAR = 3  # letters: "as" is not the plural of "a"
_BLANKS = re.compile(r"[\s_-]+")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def twins_and_nothings(names: Sequence[str], counts: Sequence[int]) -> Iterator[Finding]:
    """Yield a warning about labels that differ in spelling alone, about singular and plural, and about words for none.

    Args:
        names: the C label names.
        counts: [C] images with each label.
    """
    number_of = dict(zip(names, counts, strict=True))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_simplify(name), []).append(name)

    def show(group: Iterable[str], write: Callable[[str], str] = repr) -> str:
        return ", ".join(f"{write(name)} ({plural(number_of[name], 'image')})" for name in group)

    join = "if each group is one label, join it with --data.merge-labels FILE: a line per group, the name to keep first"
    twins = [_describe(group, show) for group in groups.values() if len(group) > 1]
    if twins:
        title = f"{plural(len(twins), 'group')} of labels that differ in spelling alone"
        yield Finding("warning", title, join, shorten(twins))
    plurals = [
        show([*groups[singular], *group])
        for simple, group in groups.items()
        for singular in dict.fromkeys(_singulars(simple))
        if singular in groups
    ]
    if plurals:
        title = f"{plural(len(plurals), 'group')} of labels that may be singular and plural of one word"
        yield Finding("warning", title, join, shorten(plurals))
    nothings = [
        name for simple, group in groups.items() if simple in WORDS_FOR_NONE or not simple.strip("-") for name in group
    ]
    if nothings:
        yield Finding(
            "warning",
            f"{plural(len(nothings), 'label')} whose name is a word for none",
            "if it marks images without a label, name it with --data.none-values; else give the label another name",
            shorten([show([name]) for name in nothings]),
        )


def _describe(group: Sequence[str], show: Callable[..., str]) -> str:
    """Return the names with their counts and what they differ in. ASCII escapes tell composed and decomposed letters apart."""
    changes: dict[str, Callable[[str], str]] = {
        "case": str.casefold,
        "blanks": _join_words,
        "composed or decomposed letters (Unicode NFC, NFD)": _compose,
        "form of the number": _plain_number,
    }
    differences = [what for what, change in changes.items() if len({change(name) for name in group}) < len(group)]
    is_unicode = len({_compose(name) for name in group}) < len(group)
    return (
        f"{show(group, ascii if is_unicode else repr)}: {', '.join(differences) or 'several of case, blanks, letters'}"
    )


def _simplify(name: str) -> str:
    """Return the name without what people write in several ways: case, blanks, hyphens, Unicode form, decimals of a number."""
    compatible = unicodedata.normalize("NFKC", name)
    visible = "".join(letter for letter in compatible if unicodedata.category(letter) != "Cf")  # zero-width characters
    number = _plain_number(visible.strip())
    simple = number if number != visible.strip() else _join_words(visible.casefold())
    return _compose(simple) or name


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _join_words(name: str) -> str:
    """Remove blanks, "_" and "-", but keep one blank beside a digit: "1 0" is not "10"."""
    if _NUMBER.fullmatch(name):
        return name
    spaced = _BLANKS.sub(" ", name).strip()
    return re.sub(r"(?<=\D) (?=\D)", "", spaced)


def _plain_number(name: str) -> str:
    """Return 1 for 1.0, 1,0 and 01; any other text as it is."""
    return f"{Decimal(name.replace(',', '.')).normalize():f}" if _NUMBER.fullmatch(name) else name


def _singulars(simple: str) -> Iterator[str]:
    """Yield the words that a name may be the plural of."""
    for ending, replacement in _PLURAL_ENDINGS:
        if simple.endswith(ending):
            singular = simple.removesuffix(ending) + replacement
            if len(singular) >= _MIN_SINGULAR:
                yield singular
