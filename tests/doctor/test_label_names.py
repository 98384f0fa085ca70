"""The doctor names labels that may be one label, and labels whose name is a word for none."""

from __future__ import annotations

import unicodedata

import pytest

from msrn_ray.doctor.finding import Finding
from msrn_ray.doctor.label_names import twins_and_nothings


def findings_of(*names: str) -> list[Finding]:
    return list(twins_and_nothings(names, range(1, len(names) + 1)))


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (("Person", "PERSON", "person"), "case"),
        (("dining table", "dining  table"), "blanks"),
        (("dining table", "dining\u00a0table"), "blanks"),
        (("dining table", "dining_table", "dining-table", "diningtable"), "blanks"),
        (("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")), "composed or decomposed"),
        (("1", "1.0"), "form of the number"),
        (("7", "07", "7,0"), "form of the number"),
        (("Dining Table", "dining_table"), "several"),
        (("cup", "cu\u200bp"), "several"),
    ],
)
def test_names_of_one_spelling_are_a_group(names: tuple[str, ...], difference: str) -> None:
    (finding,) = findings_of("sink", *names)
    assert (finding.severity, finding.title) == ("warning", "1 group of labels that differ in spelling alone")
    (line,) = finding.details
    assert difference in line
    assert all(f"({number} images)" in line for number in range(2, len(names) + 2))
    assert "--data.merge-labels" in finding.fix


def test_composed_and_decomposed_letters_look_different() -> None:
    (finding,) = findings_of("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"))
    assert finding.details[0].startswith(r"'caf\xe9' (1 image), 'cafe\u0301' (2 images)")


@pytest.mark.parametrize(
    ("singular", "many"),
    [("car", "cars"), ("bus", "buses"), ("city", "Cities"), ("knife", "knives"), ("person", "people"), ("man", "men")],
)
def test_singular_and_plural_are_a_group(singular: str, many: str) -> None:
    (finding,) = findings_of("sink", many, singular)
    assert finding.title == "1 group of labels that may be singular and plural of one word"
    assert finding.details == (f"'{singular}' (3 images), '{many}' (2 images)",)


@pytest.mark.parametrize(
    "name", ["nan", "None", "NULL", "n/a", "No Finding", "no_finding", "nothing", "__background__"]
)
def test_words_for_none_are_named(name: str) -> None:
    (finding,) = findings_of("sink", name)
    assert finding.details == (f"{name!r} (2 images)",)
    assert "--data.none-values" in finding.fix


def test_different_labels_are_no_group() -> None:
    names = ("1", "10", "1 0", "-1", "glass", "gas", "healthy", "normal", "no person", "person", "a", "as", "c++", "c")
    assert findings_of(*names) == []
