"""The report on the terminal and as a page."""

from __future__ import annotations

import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from msrn_ray.cli.app import main
from msrn_ray.doctor.report import print_diagnosis, write_page
from msrn_ray.errors import UserError
from tests.doctor.coco_set import HELD_OUT, TRAIN, diagnosis_of, photo
from tests.tiny import make_coco


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


HOSTILE = ["<script>alert(1)</script>", "[red]bench[/red]", 'cat" onload="x']


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Names that would be markup on a page or a terminal, and an unreadable file."""
    root = make_coco(tmp_path / "<img src=x>", {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT}, HOSTILE)
    photo(root, "train", 5).write_bytes(b"")
    shutil.copy(photo(root, "train", 20), photo(root, "test", 2))
    return root


def test_page_is_one_file_and_runs_nothing(hostile: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", diagnosis_of(hostile), 10**6)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {"script", "link", "iframe", "object", "form"} & set(page.tags) == set()
    assert len(page.links) >= 5
    assert {link.split(",")[0] for link in page.links} == {"data:image/jpeg;base64", "data:image/png;base64"}
    assert "url(" not in text
    assert "@import" not in text
    words = "".join(page.words)
    for name in HOSTILE:
        assert name in words
    assert "train: " + str(photo(hostile, "train", 20)) + " = test: " in words
    assert "unreadable" in words
    assert "counted on 23 images of instances_train2014.json (fingerprint " in words
    assert "prefers-color-scheme: dark" in text


def test_terminal_shows_names_unchanged(hostile: Path) -> None:
    console = Console(width=300, record=True, file=io.StringIO(), highlight=False, soft_wrap=True)
    print_diagnosis(console, diagnosis_of(hostile))
    text = console.export_text()
    for name in HOSTILE:
        assert name in text
    assert "error 1 image in more than one split (train and test: 1)" in text
    assert "-> keep each image in one split" in text
    assert re.search(r"0\.4 \* +│ +\d+ ", text), "the tau in use is marked"
    assert text.rstrip().splitlines()[-1].startswith("findings: 2 errors")


def test_only_the_terminal_cuts_many_labels(tmp_path: Path) -> None:
    names = [f"label {number:03}" for number in range(130)]
    rows = [[number, (number + 1) % 130] for number in range(130)]
    root = make_coco(tmp_path / "set", {"train": rows, "val": rows, "test": rows}, names)
    diagnosis = diagnosis_of(root)
    console = Console(width=200, record=True, file=io.StringIO())
    print_diagnosis(console, diagnosis)
    assert "... 70 more" in console.export_text()
    write_page(tmp_path / "report.html", diagnosis, 10**6)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in text for name in names)
    assert "<svg" not in text, "a heat map of 16,900 cells is unreadable"


def test_a_page_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        write_page(tmp_path, diagnosis_of(root), 10**6)


def test_a_failed_write_keeps_the_old_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    diagnosis = diagnosis_of(root)

    def fill_the_disk(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(No space left on device\)"):
        write_page(page, diagnosis, 10**6)
    assert page.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "set"}


def run(monkeypatch: pytest.MonkeyPatch, *argv: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["msrn", "doctor", *map(str, argv)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command_writes_page_and_exits_with_1_on_errors(
    root: Path,
    tmp_path: Path,
    without_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "report.html"
    assert run(monkeypatch, "coco2014", "--data.root", root, "--data.image-size", "64", "--out", page) == 0
    assert f"page {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    shutil.copy(photo(root, "train", 3), photo(root, "val", 3))
    assert run(monkeypatch, "coco2014", "--data.root", root) == 1
    assert "in more than one split" in capsys.readouterr().out


def test_command_refuses_a_bad_out_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "coco2014", "--out", "report.pdf") == 2
    assert "--out report.pdf: the suffix must be one of .html" in capsys.readouterr().err
