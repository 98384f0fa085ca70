"""Faults planted in a sound data set are found and named; a sound one has nothing above info."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from msrn_ray.cli.app import main
from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.doctor.diagnosis import FACTS, Diagnosis, all_samples, diagnose
from msrn_ray.doctor.finding import Evidence, Finding
from msrn_ray.doctor.report import print_diagnosis, summary_line, write_page
from msrn_ray.errors import UserError
from msrn_ray.ray_data import inspect_images as inspection
from msrn_ray.ray_data.inspect_images import inspect_images, inspect_rows
from msrn_ray.training.inputs import label_counts
from tests.tiny import make_coco, make_photo

TRAIN = [[0, 1]] * 6 + [[0]] * 4 + [[1]] * 3 + [[2]] * 8 + [[1, 2]] * 2
HELD_OUT = [[0], [1], [2], [0, 1]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound data set: 23 train, 4 val, 4 test images, 3 labels."""
    return make_coco(tmp_path / "set", {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT})


def config(root: Path, **overrides: object) -> ExperimentConfig:
    settings = {"data.dataset": "coco", "data.root": str(root), "data.image_size": 64}
    return ExperimentConfig().with_overrides(
        settings | {name.replace("__", "."): value for name, value in overrides.items()}
    )


def in_blocks_of_ten(samples: pa.Table, max_pixels: int) -> Iterator[pa.Table]:
    """`inspect_images` without Ray, the last block first."""
    for start in reversed(range(0, len(samples), 10)):
        yield inspect_rows(samples, start, 10, max_pixels)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "connect", lambda settings: None)
    monkeypatch.setattr(inspection, "inspect_images", in_blocks_of_ten)


def diagnosis_of(root: Path, **overrides: object) -> Diagnosis:
    """What `diagnose_data` does, without Ray."""
    settings = config(root, **overrides)
    splits = load_splits(settings)
    facts = pa.concat_tables(in_blocks_of_ten(all_samples(splits), settings.data.max_pixels))
    counts = label_counts(splits.train, None)
    return diagnose(splits, facts, settings, counts=counts, graph=counts)


def grave(found: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.gravity != "info"]


def only(found: Sequence[Finding]) -> Finding:
    (finding,) = grave(found)
    return finding


def photo(root: Path, split: str, row: int) -> Path:
    return root / f"{split}2014" / f"{split}_{row:03}.jpg"


def test_a_sound_set_has_nothing_above_info(root: Path) -> None:
    diagnosis = diagnosis_of(root)
    assert grave(diagnosis.findings) == []
    train, val, test = diagnosis.splits
    assert (train.name, train.num_images, train.num_unlabelled, train.num_unreadable) == ("train", 23, 0, 0)
    assert train.present.tolist() == [10, 11, 10]
    assert train.labels_per_image.tolist() == [0, 15, 8]
    assert train.mean_labels == pytest.approx(31 / 23)
    assert (val.num_images, test.num_images) == (4, 4)
    assert train.num_bytes == sum(path.stat().st_size for path in (root / "train2014").iterdir())
    assert dict(diagnosis.sizes)["width, pixels"] == (48, 48, 48, 48, 48)
    assert diagnosis.pairs[0] == ("apple", "bench", 6, 0.6)
    assert {name: Path(one.uri).name for name, one in diagnosis.examples.items()} == {
        "apple": "train_000.jpg",
        "bench": "train_000.jpg",
        "cat": "train_013.jpg",
    }


def test_the_graph_at_several_tau(root: Path) -> None:
    diagnosis = diagnosis_of(root, model__tau=0.58)
    edges = {at.tau: (at.num_edges, at.mean_degree, at.num_alone) for at in diagnosis.taus}
    # P(apple | bench) = 6/11, P(bench | apple) = 6/10, P(bench | cat) = 2/10, P(cat | bench) = 2/11
    assert edges[0.1] == (4, pytest.approx(4 / 3), 0)
    assert edges[0.2] == (3, 1, 0)
    assert edges[0.5] == (2, pytest.approx(2 / 3), 1)
    assert edges[0.58] == (1, pytest.approx(1 / 3), 1)
    assert edges[0.7] == (0, 0, 3)
    assert diagnosis.tau == 0.58


def test_the_same_photograph_in_two_splits(root: Path) -> None:
    shutil.copy(photo(root, "train", 3), photo(root, "val", 3))
    shutil.copy(photo(root, "train", 3), photo(root, "test", 3))
    shutil.copy(photo(root, "train", 20), photo(root, "test", 2))
    finding = only(diagnosis_of(root).findings)
    assert finding.gravity == "error"
    assert finding.title == "2 images in more than one split (train and val: 1, train and test: 2, val and test: 1)"
    assert finding.details == (
        f"train: {photo(root, 'train', 3)} = val: {photo(root, 'val', 3)} = test: {photo(root, 'test', 3)}",
        f"train: {photo(root, 'train', 20)} = test: {photo(root, 'test', 2)}",
    )
    assert [Path(one.uri).name for one in finding.images][:3] == ["train_003.jpg", "val_003.jpg", "test_003.jpg"]
    assert "keep each in one split" in finding.mend


def test_the_same_photograph_twice_in_a_split(root: Path) -> None:
    shutil.copy(photo(root, "train", 0), photo(root, "train", 1))
    shutil.copy(photo(root, "train", 0), photo(root, "train", 2))
    finding = only(diagnosis_of(root).findings)
    assert (finding.gravity, finding.title) == (
        "warning",
        "1 image more than once in the same split, 2 copies too many",
    )
    assert all(f"train_00{row}.jpg" in finding.details[0] for row in range(3))


def test_many_copies_and_many_groups_are_cut_with_a_count(tmp_path: Path) -> None:
    rows = TRAIN + [[0]] * 15
    root = make_coco(tmp_path / "set", {"train": rows, "val": [[0]] * 20, "test": HELD_OUT})
    for row in range(23, 38):
        shutil.copy(photo(root, "train", 6), photo(root, "train", row))
    many = next(finding for finding in diagnosis_of(root).findings if "more than once" in finding.title)
    assert many.title == "1 image more than once in the same split, 15 copies too many"
    assert many.details[0].endswith(f"train: {photo(root, 'train', 33)} = ... and 4 more")
    for row in range(14):
        shutil.copy(photo(root, "train", row), photo(root, "val", row))
    leak = diagnosis_of(root).findings[0]
    assert leak.title.startswith("14 images in more than one split (train and val: 14)")
    assert len(leak.details) == 13
    assert leak.details[-1] == "... and 2 more"
    assert len(leak.images) == 12


def test_the_same_photograph_with_other_labels(root: Path) -> None:
    shutil.copy(photo(root, "train", 0), photo(root, "train", 8))
    finding = only(diagnosis_of(root).findings)
    assert finding.title == "1 image more than once with different labels"
    assert "train_000.jpg = " in finding.details[0]
    assert "train_008.jpg" in finding.details[0]


def test_unreadable_files(root: Path) -> None:
    photo(root, "train", 5).write_bytes(photo(root, "train", 5).read_bytes()[:300])
    photo(root, "test", 1).write_bytes(b"")
    photo(root, "test", 2).write_bytes(b"")  # not the same photograph twice
    in_train, in_test = grave(diagnosis_of(root).findings)
    assert in_train.gravity == "error"
    assert in_train.title == "1 image of train cannot be read (4.35%)"
    assert in_train.details == (f"{photo(root, 'train', 5)} (the image data is broken or cut off)",)
    assert "more than data.max_bad_fraction=0.01 allows, training would stop" in in_train.mend
    assert in_test.title == "2 images of test cannot be read (50.00%)"
    assert "the file is empty" in in_test.details[0]
    assert {finding.gravity for finding in grave(diagnosis_of(root, data__max_bad_fraction=0.5).findings)} == {
        "warning"
    }
    assert [one.num_unreadable for one in diagnosis_of(root).splits] == [1, 0, 2]
    none = diagnosis_of(root, data__max_pixels=48 * 40 - 1)
    assert all(one.num_unreadable == one.num_images for one in none.splits)
    assert (none.sizes, none.examples) == ((), {})


def test_a_file_that_is_gone_between_listing_and_reading(root: Path) -> None:
    samples = all_samples(load_splits(config(root)))
    photo(root, "train", 2).unlink()
    facts = inspect_rows(samples, 0, 5, 10**6)
    assert facts.schema == FACTS
    assert facts["digest"].is_null().to_pylist() == [False, False, True, False, False]
    assert "No such file" in facts["error"][2].as_py()
    assert facts["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert facts["width"].to_pylist() == [48, 48, 0, 48, 48]


def test_labels_without_an_image(tmp_path: Path) -> None:
    held_out = [[0], [1], [2]]
    root = make_coco(
        tmp_path / "set", {"train": TRAIN, "val": held_out, "test": [*held_out, [3]]}, ["apple", "bench", "cat", "dog"]
    )
    in_train, in_val = grave(diagnosis_of(root).findings)
    assert (in_train.title, in_train.details) == ("1 label without an image in train", ("dog",))
    assert "cannot be learnt" in in_train.mend
    assert (in_val.title, in_val.details) == ("1 label without an image in val", ("dog",))


def test_labels_that_cannot_be_told_apart(tmp_path: Path) -> None:
    rows = [[0, 1, 2]] * 5 + [[2, 3]] * 4 + [[2]] * 3
    root = make_coco(tmp_path / "set", {"train": rows, "val": rows, "test": rows}, ["apple", "bench", "cat", "dog"])
    found = [finding for finding in diagnosis_of(root).findings if "split" not in finding.title]
    titles = {finding.title: finding for finding in found}
    assert titles["1 pair of labels that always occur together"].gravity == "warning"
    assert titles["1 pair of labels that always occur together"].details == ("apple = bench (5 images)",)
    assert titles["1 label on every train image where known"].details == ("cat",)
    assert titles["2 labels never without another"].details == (
        "apple -> cat (5 images)",
        "bench -> cat (5 images)",
    ), "dog with 4 images may be a coincidence"


def test_images_without_a_label(root: Path, tmp_path: Path, without_ray: None) -> None:
    other = make_coco(tmp_path / "other", {"train": [*TRAIN, []], "val": [*HELD_OUT, []], "test": HELD_OUT})
    found = inspection.diagnose_data(config(other)).findings
    in_val = only(found)
    assert (in_val.gravity, in_val.title) == ("warning", "1 image of val without a label (20.00%)")
    assert in_val.details == (str(photo(other, "val", 4)),)
    (dropped,) = [finding for finding in found if "left out" in finding.title]
    assert dropped.title == "1 image left out for want of a label"
    assert dropped.details == (str(photo(other, "train", 23)),)
    assert dropped.images[0].uri == str(photo(other, "train", 23))
    kept = inspection.diagnose_data(config(other, data__keep_unlabelled_train=True)).findings
    assert not any("left out" in finding.title for finding in kept)
    assert any(finding.title == "1 image of train without a label (4.17%)" for finding in kept)
    assert not any("without a label" in one.title for one in inspection.diagnose_data(config(root)).findings)


def test_unknown_labels_are_no_missing_labels(shared: Path) -> None:
    diagnosis = diagnosis_of(shared / "data/voc_mini", data__dataset="voc", protocol="paper")
    train = diagnosis.splits[0]
    assert train.unknown.sum() > 0
    assert train.num_unlabelled == 0, "12 photos hold nothing but difficult objects"
    assert any("unknown (-1): train " in finding.title for finding in diagnosis.findings)


def test_sizes(root: Path) -> None:
    Image.new("RGB", (9, 7)).save(photo(root, "val", 1))
    Image.new("RGB", (400, 90)).save(photo(root, "val", 2))
    diagnosis = diagnosis_of(root)
    tiny = only(diagnosis.findings)
    assert tiny.title == "1 image enlarged more than 8 times (short side below 8 pixels)"
    assert tiny.details == (f"{photo(root, 'val', 1)}",)
    titles = [finding.title for finding in diagnosis.findings]
    assert "1 image 4 times as long as wide, or more" in titles
    assert any("smaller than the network's input" in title for title in titles)
    width = dict(diagnosis.sizes)["width, pixels"]
    assert (width[0], width[2], width[4]) == (9, 48, 400)


def test_rare_and_uneven_labels(tmp_path: Path) -> None:
    rows = [[0, 1], *[[0]] * 109, *[[1]] * 2, [2]]
    root = make_coco(tmp_path / "set", {"train": rows, "val": HELD_OUT, "test": HELD_OUT})
    found = diagnosis_of(root, model__tau="auto").findings
    assert grave(found) == []
    titles = {finding.title: finding.details for finding in found}
    assert titles["2 labels with fewer than 10 train images"] == ("cat (1), bench (3)",)
    assert "uneven labels: apple is 110 times as frequent as cat" in titles


def test_an_empty_and_a_dense_graph(root: Path, tmp_path: Path) -> None:
    empty = only(diagnosis_of(root, model__tau=0.9).findings)
    assert empty.title == "the label graph is empty at tau 0.9: every label attends to itself alone"
    assert empty.mend == "take --model.tau auto (here 0.2)"
    dense = diagnosis_of(root, model__tau=0.1).findings
    assert any("dense at tau 0.1: 4 of 6 possible edges" in finding.title for finding in dense)
    alone = make_coco(tmp_path / "alone", {name: [[0], [1], [2]] for name in ("train", "val", "test")})
    assert "no two labels occur together" in only(diagnosis_of(alone).findings).mend


def test_labels_without_a_word_vector(tmp_path: Path, without_ray: None) -> None:
    root = make_coco(tmp_path / "set", {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT}, ["apple", "bench", "qzxv"])
    finding = only(inspection.diagnose_data(config(root)).findings)
    assert (finding.gravity, finding.details) == ("error", ("qzxv",))
    assert "--data.word-vectors learned" in finding.mend
    assert grave(inspection.diagnose_data(config(root, data__missing_words="zero")).findings) == []
    assert grave(inspection.diagnose_data(config(root, data__word_vectors="learned")).findings) == []


def test_the_gravest_come_first_and_the_order_of_facts_does_not_matter(root: Path) -> None:
    shutil.copy(photo(root, "train", 0), photo(root, "train", 1))
    shutil.copy(photo(root, "train", 20), photo(root, "test", 2))
    settings = config(root)
    splits = load_splits(settings)
    counts = label_counts(splits.train, None)
    facts = inspect_rows(all_samples(splits), 0, 31, 10**6)
    mixed = facts.take(pa.array(np.random.default_rng(0).permutation(31)))
    first, second = (diagnose(splits, one, settings, counts=counts, graph=counts) for one in (facts, mixed))
    assert first.findings == second.findings
    gravities = [finding.gravity for finding in first.findings]
    assert gravities[:2] == ["error", "warning"]
    assert set(gravities[2:]) <= {"info"}
    assert summary_line(first).startswith("findings: 1 error, 1 warning, ")


@pytest.mark.ray
def test_the_stream_gives_each_image_once(local_ray: None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_MIN_ROWS", 16)
    photo(root, "train", 5).write_bytes(b"")
    samples = all_samples(load_splits(config(root)))
    blocks = list(inspect_images(samples, 10**6))
    assert len(blocks) > 1
    facts = pa.concat_tables(blocks)
    assert facts["row"].to_pylist() == list(range(31))
    assert facts.equals(inspect_rows(samples, 0, 31, 10**6))


# the report -----------------------------------------------------------------------------------------------------------


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


def test_the_page_is_one_file_and_runs_nothing(hostile: Path, tmp_path: Path) -> None:
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


def test_the_terminal_shows_names_as_they_are(hostile: Path) -> None:
    console = Console(width=300, record=True, file=io.StringIO(), highlight=False, soft_wrap=True)
    print_diagnosis(console, diagnosis_of(hostile))
    text = console.export_text()
    for name in HOSTILE:
        assert name in text
    assert "error 1 image in more than one split (train and test: 1)" in text
    assert "-> keep each in one split" in text
    assert re.search(r"0\.4 \* +│ +\d+ ", text), "the tau that is taken is marked"
    assert text.rstrip().splitlines()[-1].startswith("findings: 2 errors")


def test_many_labels_are_cut_on_the_terminal_alone(tmp_path: Path) -> None:
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
    assert "<svg" not in text, "a picture of 16,900 cells says nothing"


def test_a_page_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        write_page(tmp_path, diagnosis_of(root), 10**6)


def run(monkeypatch: pytest.MonkeyPatch, *argv: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["msrn", "doctor", *map(str, argv)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(
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


def test_the_command_refuses_a_bad_out_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "coco2014", "--out", "report.pdf") == 2
    assert "--out report.pdf: the suffix must be one of .html" in capsys.readouterr().err


def test_photographs(shared: Path) -> None:
    """Every photograph is sound, none is in two splits; what the fixtures' text says is counted."""
    diagnosis = diagnosis_of(shared / "data/coco_mini", protocol="paper", data__keep_unlabelled_train=True)
    train, val = diagnosis.splits
    assert (train.num_images, train.num_unlabelled, train.num_unreadable) == (178, 3, 0)
    assert (val.num_images, val.num_unlabelled, val.num_unreadable) == (114, 2, 0)
    assert train.mean_labels == pytest.approx(3.18, abs=0.005)
    assert [finding.title for finding in grave(diagnosis.findings)] == [
        "4 labels without an image in train",
        "11 labels without an image in val",
        "1 pair of labels that always occur together",
    ]


def test_hostile_files(shared: Path, tmp_path: Path) -> None:
    """Each file that training cannot read is named with the reason, whatever it is."""
    for path in (shared / "data/hostile").iterdir():
        if path.suffix != ".csv":
            shutil.copy(path, tmp_path / path.name)
    uris = sorted(str(path) for path in tmp_path.iterdir())
    facts = inspect_rows(pa.table({"uri": uris}), 0, len(uris), 10**8)
    bad = {Path(uris[row]).name for row in range(len(uris)) if facts["error"][row].as_py()}
    assert bad == {
        "truncated.jpg",
        "header_only.jpg",
        "zero_byte.jpg",
        "text_named.jpg",
        "truncated.png",
        "huge_20000x20000.png",
    }
    turned = uris.index(str(tmp_path / "exif_orientation6.jpg"))
    with Image.open(uris[turned]) as lying:
        assert (facts["height"][turned].as_py(), facts["width"][turned].as_py()) == lying.size


def test_a_photo_of_each_format_is_measured(tmp_path: Path) -> None:
    uris = [str(make_photo(tmp_path / f"a{suffix}", 1)) for suffix in (".jpg", ".png", ".webp", ".bmp")]
    facts = inspect_rows(pa.table({"uri": uris}), 0, 9, 10**6)
    assert facts["width"].to_pylist() == [48] * 4
    assert facts["height"].to_pylist() == [40] * 4
    assert len(set(facts["digest"].to_pylist())) == 4


def test_a_part_of_a_file_is_shown_by_its_id() -> None:
    samples = pa.table({"image_id": ["7", "8"], "uri": ["/a.parquet#bytes=4+5", "/b.jpg"]})
    evidence = Evidence(ExperimentConfig(), ("train",), (), samples, np.array([0]), samples, (), np.zeros(2, np.int32))
    shown = evidence.show(np.array([0, 1]))
    assert [(one.caption, one.uri) for one in shown] == [
        ("train: 7", "/a.parquet#bytes=4+5"),
        ("train: /b.jpg", "/b.jpg"),
    ]
