"""WebDataset tars: images are read in place, with the labels and splits of the tars."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.datasets.webdataset import read_webdataset
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from tests.datasets.container_files import (
    LABELS,
    NAMES,
    TARGETS,
    as_json,
    picture,
    targets_and_images,
    write_tar,
)


@pytest.fixture(params=["path", "memory"])
def tars(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Write two train tars and a val tar; the second has a folder inside, names longer than 100 bytes and other files."""
    root = tmp_path / "tars"
    write_tar(
        root / "train-0.tar", {f"{row}.{kind}": content for row in range(2) for kind, content in sample(row).items()}
    )
    long = "x" * 150
    rest = {f"{long}/{row}.{kind}": content for row in range(2, 5) for kind, content in sample(row).items()}
    write_tar(root / "train-1.tar", {**rest, f"{long}/4.txt": b"a caption", f"{long}/._4.jpg": b"of a Mac"})
    write_tar(
        root / "val.tar", {f"{row}.{kind}": content for row in range(2, 4) for kind, content in sample(row).items()}
    )
    if request.param == "path":
        return Location.of(root)
    for path in root.iterdir():
        Location.of(f"memory://{tmp_path.name}/{path.name}").write_bytes(path.read_bytes())
    return Location.of(f"memory://{tmp_path.name}")


def sample(row: int) -> dict[str, bytes]:
    return {"jpg": picture(row), "json": as_json(LABELS[row])}


def test_webdataset_rows_are_the_tars_files(tars: Location) -> None:
    tables = read_webdataset(tars)
    assert list(tables) == ["train", "val"]
    assert tables["train"].label_names == NAMES
    assert targets_and_images(tables["train"]) == (TARGETS, [picture(row) for row in range(5)])
    assert targets_and_images(tables["val"]) == (TARGETS[2:4], [picture(2), picture(3)])
    ids = tables["train"].table["image_id"].to_pylist()
    assert ids[:2] == ["train-0/0", "train-0/1"]
    assert ids[4] == f"train-1/{'x' * 150}/4"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.json": as_json("dog")}, [0, 1, 0]),
        ({"a.json": as_json(["dog", "dog"])}, [0, 1, 0]),
        ({"a.json": as_json([2, 0], "label")}, [1, 0, 1]),
        ({"a.json": as_json({"cat": 1, "dog": 0, "owl": 1})}, [1, 0, 1]),
        ({"a.json": as_json([], "tags")}, [0, 0, 0]),
        ({"a.cls": b"1\n"}, [0, 1, 0]),
        ({"a.cls": b"0, 2"}, [1, 0, 1]),
        ({"a.cls": b""}, [0, 0, 0]),
    ],
)
def test_webdataset_labels(tmp_path: Path, members: dict[str, bytes], expected: list[int]) -> None:
    write_tar(tmp_path / "a.tar", {**members, "a.jpg": picture(0)})
    for root in (tmp_path, tmp_path / "a.tar"):
        (table,) = read_webdataset(Location.of(root), label_names=NAMES).values()
        assert table.label_names == NAMES
        assert table.targets.tolist() == [expected]


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"a.jpg": b"x"}, r"sample a holds no labels"),
        ({"a.json": as_json(["dog"])}, r"sample a holds no image"),
        ({"a.jpg": b"x", "a.json": b"{"}, r"sample a: its \.json is not JSON"),
        (
            {"a.jpg": b"x", "a.json": b'{"caption": "", "n": 1}'},
            r"no field labels, .*only caption, n; name .* data\.label_column",
        ),
        ({"a.jpg": b"x", "a.json": b"[1]"}, r"label 1 is a number; name the labels"),
        ({"a.jpg": b"x", "a.json": b"{}"}, r"no field labels.*only nothing"),
        ({"a.b.jpg": b"x", "a.b.json": as_json(["dog"])}, r"key ends at the first dot"),
        ({"a.jpg": b"x", "a.npy": b"\x93NUMPY\x01\x00"}, r"\.npy cannot be read"),
        ({"a.jpg": b"x", "a.txt": b"\xff"}, r"\.txt is not UTF-8"),
        ({"a.jpg": b"x", "a.json": as_json([1.5])}, r"1\.5 is not a label"),
        ({"a.jpg": b"x", "a.json": as_json({"cat": 2})}, r"label 'cat' is 2; write 1 or 0"),
        ({"a.jpg": b"x", "a.json": as_json([3])}, r"label 3 is a number; name the labels .*data\.labels"),
        ({"a.jpg": b"x", "a.json": as_json([])}, r"no image has a label"),
        (
            {
                "a.jpg": b"x",
                "a.json": as_json(["a"]),
                "b.png": b"x",
                "b.json": as_json(["a"]),
                "a.gif": b"",
                "a.cls": b"a",
            },
            r"image id 'a/a' 2 times",
        ),
    ],
)
def test_webdataset_faults_are_named(tmp_path: Path, members: dict[str, bytes], match: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=match):
        read_webdataset(Location.of(tmp_path))


def write_labels(path: Path, files: dict[str, list[bytes]]) -> Location:
    """Write samples with label files of one kind."""
    members = {}
    for suffix, contents in files.items():
        for row, content in enumerate(contents):
            members |= {f"{row}.jpg": picture(row), f"{row}.{suffix}": content}
    write_tar(path / "a.tar", members)
    return Location.of(path)


def npy(values: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


FLAGS = [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("suffix", "contents"),
    [
        ("json", [json.dumps(flags).encode() for flags in FLAGS]),
        ("json", [as_json(flags) for flags in FLAGS]),
        ("json", [as_json([bool(flag) for flag in flags]) for flags in FLAGS]),
        ("labels.json", [json.dumps(flags).encode() for flags in FLAGS]),
        ("npy", [npy(flags) for flags in FLAGS]),
        ("npy", [npy(np.array(flags, np.float32)) for flags in FLAGS]),
        ("npy", [npy([1]), npy([0, 2])]),
        ("cls", [b"0 1 0", b"1 0 1"]),
        ("cls", [b"010", b"101"]),
        ("txt", [b"dog\n", b"cat, owl"]),
        ("txt", [b"dog", b"cat\nowl\n"]),
        ("json", [as_json("dog"), as_json("cat, owl")]),
    ],
)
def test_flags_and_texts_become_labels(tmp_path: Path, suffix: str, contents: list[bytes]) -> None:
    (table,) = read_webdataset(write_labels(tmp_path, {suffix: contents}), label_names=NAMES).values()
    assert table.targets.tolist() == FLAGS


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        ([[0, 0, 1], [0, 1]], r"flags by position or label numbers"),
        ([[0, 0, 0, 1], [0, 1, 0, 1]], r"flags by position or label numbers"),
        ([[0, 0, -1], [0, 1, 0]], r"flags by position with unknown"),
        ([[True, False, True], [True]], r"list 2 has 1 flags, others have 3"),
        ([[True, False, True], [0, 1, 0]], r"write one form"),
        ([[0, 0, 1], ["dog"]], r"flags by position or label numbers"),
    ],
)
def test_ambiguous_flags_are_refused(tmp_path: Path, lists: list[list[object]], match: str) -> None:
    root = write_labels(tmp_path, {"json": [as_json(values) for values in lists]})
    with pytest.raises(UserError, match=match):
        read_webdataset(root, label_names=NAMES)


def test_captions_are_not_labels(tmp_path: Path) -> None:
    root = write_labels(tmp_path, {"txt": [f"photo number {row}".encode() for row in range(12)]})
    with pytest.raises(UserError, match="look like captions"):
        read_webdataset(root)


def test_webdataset_unlisted_labels_are_refused(tmp_path: Path) -> None:
    for value, match in (
        (3, r"label 3 is not one of the 3 of data\.labels \(0 to 2\)"),
        ("bat", r"image a/a has the label 'bat'"),
    ):
        write_tar(tmp_path / "a.tar", {"a.jpg": picture(0), "a.json": as_json([value])})
        with pytest.raises(UserError, match=match):
            read_webdataset(Location.of(tmp_path), label_names=NAMES)


def test_webdataset_broken_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar; .*unpacked"):
        read_webdataset(Location.of(tmp_path))
    whole = write_tar(tmp_path / "a.tar", {"a.jpg": picture(0), "a.json": as_json(["dog"])}).read_bytes()
    for content in (whole[:700], b"text" * 200, b""):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(
            UserError, match=r"a\.tar: (not a whole, uncompressed tar|sample a holds no labels)|train split holds no"
        ):
            read_webdataset(Location.of(tmp_path))


def test_webdataset_names_with_blanks(tmp_path: Path) -> None:
    contents = {"a.cls": b"traffic light, cat\n", "b.json": as_json([" cat", "cat "]), "c.cls": b"dog\ncat"}
    write_tar(
        tmp_path / "a.tar",
        {name: content for key in contents for name, content in ((f"{key[0]}.jpg", picture(0)), (key, contents[key]))},
    )
    (table,) = read_webdataset(Location.of(tmp_path)).values()
    assert table.label_names == ("cat", "dog", "traffic light")
    assert table.targets.tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]


def test_webdataset_invalid_characters_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": picture(0), "a.json": as_json(["a\ud800"])})
    with pytest.raises(UserError, match=r"sample a: 'a\\ud800' is not a label"):
        read_webdataset(Location.of(tmp_path))


def test_image_is_the_file_with_one_suffix(tmp_path: Path) -> None:
    """`a.seg.png` belongs to the sample `a`, but is not its image."""
    files = {"a.jpg": picture(0), "a.seg.png": picture(1), "a.json": as_json(["dog"])}
    write_tar(tmp_path / "a.tar", files)
    (table,) = read_webdataset(Location.of(tmp_path)).values()
    assert table.table["image_id"].to_pylist() == ["a/a"]
    assert targets_and_images(table) == ([[1]], [picture(0)])
