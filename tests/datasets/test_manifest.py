"""Manifests: every form gives the same targets."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msrn_ray.datasets.coco import read_coco
from msrn_ray.datasets.image_uris import absolute_uris, find_local
from msrn_ray.datasets.manifest import NamedColumns, read_manifest
from msrn_ray.datasets.protocol import fingerprint
from msrn_ray.datasets.text_files import read_label_names
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable
from tests.datasets.manifest_files import (
    FORMS,
    ids,
    make,
    present,
    splits_of,
    write_csv,
)


@pytest.fixture(scope="module")
def photographs(shared: Path) -> dict[str, SampleTable]:
    """The COCO photographs, read by the COCO reader."""
    root = shared / "data/coco_mini"
    return {split: read_coco(Location.of(root), split, keep_unlabelled=True) for split in ("train", "val")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_the_coco_reader(photographs: dict[str, SampleTable], tmp_path: Path, form: str) -> None:
    rows = [
        {"image": uri, "id": image, "labels": sorted(labels), "split": {"train": "Train", "val": "validation"}[split]}
        for split, samples in photographs.items()
        for uri, (image, labels) in zip(samples.table["uri"].to_pylist(), present(samples).items(), strict=True)
    ]
    name, write = FORMS[form]
    splits = splits_of(Location.of(write(tmp_path / name, rows)), keep_unlabelled_train=True)
    seen = {label for row in rows for label in row["labels"]}
    for expected, found in ((photographs["train"], splits.train), (photographs["val"], splits.val)):
        columns = [position for position, name in enumerate(expected.label_names) if name in seen]
        assert found.label_names == tuple(expected.label_names[position] for position in columns)
        np.testing.assert_array_equal(found.targets, expected.targets[:, columns])
        assert found.table.drop(["target"]).to_pydict() == expected.table.drop(["target"]).to_pydict()
        assert found.table.schema.field("uri").type == pa.string()
    assert splits.test is None
    assert any(note.startswith("there is no test split") for note in splits.notes)


def test_label_lists_give_the_coco_readers_table(photographs: dict[str, SampleTable], tmp_path: Path) -> None:
    expected = photographs["val"]
    rows = [
        {"image_id": image, "path": uri, "tags": sorted(labels)}
        for uri, (image, labels) in zip(expected.table["uri"].to_pylist(), present(expected).items(), strict=True)
    ]
    place = Location.of(write_csv(tmp_path / "labels.csv", rows))
    found = read_manifest(place, label_names=expected.label_names).samples
    assert fingerprint(found) == fingerprint(expected)
    assert found.table["uri"].to_pylist() == expected.table["uri"].to_pylist()
    (tmp_path / "names.txt").write_text("\n".join(reversed(expected.label_names)) + "\n")
    names = read_label_names(Location.of(tmp_path / "names.txt"))
    turned = read_manifest(place, label_names=names).samples
    assert turned.label_names == expected.label_names[::-1]
    np.testing.assert_array_equal(turned.targets, expected.targets[:, ::-1])


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="/\\;|,"),
    min_size=1,
    max_size=8,
).filter(lambda name: name == name.strip() and name.strip("."))


LABELS = NAMES.filter(
    lambda name: (
        name[0] not in '["' and name.lower() not in {"image", "id", "image_id", "labels", "split", "split_name"}
    )
)


@st.composite
def label_tables(draw: st.DrawFn) -> tuple[list[str], list[str], npt.NDArray[np.int8]]:
    """Draw names of images and labels, and [n, C] targets in which each label occurs."""
    labels = sorted(draw(st.lists(LABELS, min_size=2, max_size=5, unique=True)))
    images = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    row = st.lists(st.sampled_from([0, 1]), min_size=len(labels), max_size=len(labels))
    targets = np.array(draw(st.lists(row, min_size=len(images), max_size=len(images))), np.int8)
    targets[draw(st.integers(0, len(images) - 1))] = 1
    return images, labels, targets


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)  # writing files is slow
@given(table=label_tables())
@example(table=(["0"], ["0", "TAGS"], np.ones((1, 2), np.int8)))  # a label with the usual name of a column of lists
def test_written_manifests_are_read_back(form: str, table: tuple[list[str], list[str], npt.NDArray[np.int8]]) -> None:
    images, labels, targets = table
    if form == "semicolons" or "columns" in form:
        images, targets = (
            [*images, "last of all"],
            np.vstack([targets, np.zeros_like(targets[:1])]),
        )  # without any 0 it would be refused
    rows = [
        {"image": f"s3://bucket/{image}", "labels": [name for name, value in zip(labels, row, strict=True) if value]}
        for image, row in zip(images, targets, strict=True)
    ]
    name, write = FORMS[form]
    with TemporaryDirectory() as folder:
        place = Location.of(write(Path(folder) / name, rows))
        # name the columns: a random label may have the usual name of one
        label = None if "columns" in form or form == "semicolons" else "labels"
        separator = {"csv": ";", "tsv": ";"}.get(form)
        named = NamedColumns("image", label)
        samples = read_manifest(place, named=named, label_separator=separator, label_names=labels).samples
    assert samples.label_names == tuple(labels)
    np.testing.assert_array_equal(samples.targets, targets)
    assert samples.table["uri"].to_pylist() == [f"s3://bucket/{image}" for image in images]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.lists(st.sampled_from([1, 0, -1, None]), min_size=2, max_size=2), min_size=1, max_size=9))
def test_label_columns_may_hold_unknown(form: str, values: list[list[int | None]]) -> None:
    rows = [
        {"image": f"s3://b/{row}", "dog": dog, "cat": None if cat is None else float(cat)}
        for row, (dog, cat) in enumerate(values)
    ]
    rows.append({"image": "s3://b/last", "dog": 0, "cat": 0.0})  # without any 0 the table would be refused
    values = [*values, [0, 0]]
    name, write = FORMS[form]
    with TemporaryDirectory() as folder:
        samples = read_manifest(Location.of(write(Path(folder) / name, rows))).samples
    assert samples.label_names == ("cat", "dog")
    expected = [[-1 if value is None else value for value in (cat, dog)] for dog, cat in values]
    assert samples.targets.tolist() == expected


def test_relative_paths_start_from_the_manifests_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos/old").mkdir(parents=True)
    for name in ("photos/a.jpg", "photos/old/b c.jpg", "ü.jpg"):
        (tmp_path / name).touch()
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.touch()
    text = f"path,label\nphotos/a.jpg,dog\nphotos\\old\\b c.jpg,cat\nü.jpg,dog\n{elsewhere},cat\nhttps://x.org/../c.jpg,dog\n"
    place = make(tmp_path / "photos", text.replace("photos/", "").replace("photos\\", ""), images="") / "x"
    place = make(tmp_path, text, images="")
    monkeypatch.chdir(tmp_path.parent)
    for root in (place, Location.of(Path(tmp_path.name) / "labels.csv"), Location.of(place and f"file://{place}")):
        samples = read_manifest(root).samples
        assert samples.table["uri"].to_pylist() == [
            f"{tmp_path}/photos/a.jpg",
            f"{tmp_path}/photos/old/b c.jpg",
            f"{tmp_path}/ü.jpg",
            str(elsewhere),
            "https://x.org/../c.jpg",
        ]
        assert ids(samples)[:2] == ["photos/a.jpg", "photos/old/b c.jpg"]


def test_a_manifest_behind_a_uri(tmp_path: Path) -> None:
    base = f"memory://{tmp_path.name}"
    with fsspec.open(f"{base}/set/labels.csv", "wb", auto_mkdir=True) as file:
        file.write(b"image,labels\nimages/a.jpg,dog;cat\n/data/none.jpg,\n")
    with pytest.raises(UserError, match=r"1 of its 2 images are missing \(/data/none\.jpg\)"):
        read_manifest(Location.of(f"{base}/set/labels.csv"))
    samples = read_manifest(Location.of(f"{base}/set/labels.csv"), missing_images="skip").samples
    assert samples.table["uri"].to_pylist() == [f"{base}/set/images/a.jpg"], (
        "remote images are not checked, only read later"
    )
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        read_manifest(Location.of(f"{base}/set/none.csv"))
    with fsspec.open(f"{base}/set/labels.csv", "wb") as file:
        file.write(b"image,labels\n../a.jpg,dog\n")
    with pytest.raises(UserError, match=rf"row 1: '\.\./a\.jpg' may lead out of {base}/set; write"):
        read_manifest(Location.of(f"{base}/set/labels.csv"))


def test_options_of_a_uri_stay_after_the_path() -> None:
    place = Location.of("s3://bucket/set/labels.csv?region=eu-west-1&scheme=http")
    uris = absolute_uris(place, pa.chunked_array([["a/b.jpg", "/c.jpg"], ["gs://d/e.jpg"]]))
    assert uris.to_pylist() == ["s3://bucket/set/a/b.jpg?region=eu-west-1&scheme=http", "/c.jpg", "gs://d/e.jpg"]
    assert find_local(uris).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("image,labels\na.jpg,dog;cat\nb.jpg,dog\nc.jpg,\n", "separated by ';'"),
        ("image,labels\na.jpg, dog | cat|\nb.jpg,dog\nc.jpg,||\n", "separated by '|'"),
        ('image,labels\na.jpg,"dog, cat"\nb.jpg,dog\nc.jpg,""\n', "separated by ','"),
        ("image\tlabels\na.jpg\tdog,cat\nb.jpg\tdog\nc.jpg\t\n", "separated by ','"),
        ("image;labels\na.jpg;dog,cat\nb.jpg;dog\nc.jpg;\n", "separated by ','"),
        ('image,labels\na.jpg,"[""dog"", ""cat""]"\nb.jpg,"[""dog""]"\nc.jpg,[]\n', "JSON lists"),
        ('image,labels\na.jpg,"[""dog"", ""cat""]"\nb.jpg,"[""dog""]"\nc.jpg,\n', "JSON lists"),
        ('Image, LABELS ,\r\n"a.jpg",dog;cat,x\r\n\r\nb.jpg,dog,\r\nc.jpg,,', "separated by ';'"),
        ("\ufeffimage,labels\na.jpg,dog;cat\nb.jpg,dog\nc.jpg,\n", "separated by ';'"),
        ('\ufeff"image","labels"\r\n"a.jpg","dog;cat"\r\n"b.jpg","dog"\r\n"c.jpg",""\r\n', "separated by ';'"),
        ("image,dog,cat\na.jpg,1,1\nb.jpg,1,0\nc.jpg,0,0\n", "one column per label"),
        (",image,dog,cat\n0,a.jpg,1.0,True\n1,b.jpg, 1,FALSE\n2,c.jpg,false,0.0\n", "one column per label"),
    ],
)
def test_ways_to_write_a_csv(tmp_path: Path, text: str, how: str) -> None:
    samples = read_manifest(make(tmp_path, text)).samples
    assert samples.label_names == ("cat", "dog")
    assert present(samples) == {"a.jpg": {"dog", "cat"}, "b.jpg": {"dog"}, "c.jpg": set()}
    assert (samples.targets >= 0).all()
    assert how in samples.notes[0]


def test_one_label_per_row_and_custom_separators(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,hot dog\nb.jpg,cat\n")
    assert read_manifest(place).samples.label_names == ("cat", "hot dog")
    assert read_manifest(place, label_separator=" ").samples.label_names == ("cat", "dog", "hot")
    place = make(tmp_path, 'image,labels\na.jpg,"cup, mug;cat"\n')
    assert read_manifest(place, label_separator=";").samples.label_names == ("cat", "cup, mug")
    place = make(tmp_path, "image,labels\na.jpg,[x];[y]\n")
    assert read_manifest(place, label_separator=";").samples.label_names == ("[x]", "[y]")


def test_types_of_json_and_parquet(tmp_path: Path) -> None:
    text = '{"image": "a.jpg", "labels": ["2024-01-31", "dog"], "id": 7}\n\n{"image": "b.jpg", "labels": [], "id": 8}\n'
    samples = read_manifest(make(tmp_path, text + '{"image": "c.jpg", "id": 9}\n', "labels.jsonl")).samples
    assert present(samples) == {"7": {"2024-01-31", "dog"}, "8": set(), "9": set()}
    text = '{"image": "2024-01-31", "labels": [3, 17]}\n{"image": "2024-02-01", "labels": null}\n'
    for name in ("2024-01-31", "2024-02-01"):
        (tmp_path / name).touch()
    assert present(read_manifest(make(tmp_path, text, "labels.jsonl")).samples) == {
        "2024-01-31": {"3", "17"},
        "2024-02-01": set(),
    }
    table = {
        "image": pa.array(["a.jpg", "b.jpg"]).dictionary_encode(),
        "label": pa.array([3, 4], pa.int16()),
        "note": pa.array([b"x", b"y"]),
    }
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    samples = read_manifest(Location.of(tmp_path / "labels.parquet")).samples
    assert present(samples) == {"a.jpg": {"3"}, "b.jpg": {"4"}}
    assert samples.notes[1] == "labels.parquet: columns not used: 'note'"
    for lists in (
        pa.list_(pa.string(), 2),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ):
        labels = pa.array([["x", "y"], ["y", "x"]], pa.list_(pa.string())).cast(lists)
        pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "labels": labels}), tmp_path / "labels.parquet")
        assert read_manifest(Location.of(tmp_path / "labels.parquet")).samples.targets.tolist() == [[1, 1], [1, 1]]
    values = {
        "image": ["a.jpg", "b.jpg"],
        "x": [float("nan"), 0.0],
        "y": [True, None],
        "z": pa.array([None, 1], pa.uint8()),
    }
    pq.write_table(pa.table(values), tmp_path / "labels.parquet")
    assert read_manifest(Location.of(tmp_path / "labels.parquet")).samples.targets.tolist() == [
        [-1, 1, -1],
        [0, -1, 1],
    ]


def test_columns_by_name(tmp_path: Path) -> None:
    place = make(tmp_path, "url,file_name,class,tags,n\nu,a.jpg,dog,x,1\nv,b.jpg,cat,y,2\n")
    with pytest.raises(
        UserError, match=r"image may be in 'url' or 'file_name'; choose one \(--data\.image-column NAME\)"
    ):
        read_manifest(place)
    samples = read_manifest(place, named=NamedColumns("file_name", "class")).samples
    assert present(samples) == {"a.jpg": {"dog"}, "b.jpg": {"cat"}}
    assert samples.notes[1] == "labels.csv: columns not used: 'n', 'tags', 'url'"


def test_labels_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffzebra\r\n\r\n dog\r\ncat".encode())
    names = read_label_names(Location.of(file))
    assert names == ("zebra", "dog", "cat")
    samples = read_manifest(make(tmp_path, "image,labels\na.jpg,dog;cat\n"), label_names=names).samples
    assert samples.label_names == names
    assert samples.targets.tolist() == [[0, 1, 1]]
    columns = make(tmp_path, "image,width,dog,zebra,cat\na.jpg,640,1,0,\n")
    assert read_manifest(columns, label_names=names).samples.targets.tolist() == [[0, 1, -1]]
    with pytest.raises(
        UserError, match=r"row 1: '640' in column 'width' is not 1, 0, -1 or empty; .*--data\.labels FILE"
    ):
        read_manifest(columns)
    with pytest.raises(
        UserError, match=r"row 2: label 'horse' is not among the 3 of data\.labels; correct it or add it"
    ):
        read_manifest(make(tmp_path, "image,labels\na.jpg,dog;cat\nb.jpg,dog;horse\n"), label_names=names)
    with pytest.raises(
        UserError, match=r"nor one for the label 'zebra' of data\.labels; its columns are 'image', 'dog'"
    ):
        read_manifest(make(tmp_path, "image,dog\na.jpg,1\n"), label_names=names)
    for text, message in (
        ("", r"names\.txt: is empty; write"),
        ("a\nb\na\n", r"names\.txt: names 'a' more than once; write each"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_label_names(Location.of(file))
    with pytest.raises(UserError, match=r"none\.txt: no such file; write one label per line"):
        read_label_names(Location.of(tmp_path / "none.txt"))


def test_missing_images_may_be_left_out(tmp_path: Path) -> None:
    place = make(
        tmp_path, "image,labels,split\na.jpg,dog,train\nx.jpg,cat,train\nb.jpg,cat,test\nhttp://y/z.jpg,dog,val\n"
    )
    samples, split = read_manifest(place, missing_images="skip")
    assert split is not None
    assert ids(samples) == ["a.jpg", "b.jpg", "http://y/z.jpg"]
    assert split.tolist() == [0, 2, 1]
    assert present(samples)["b.jpg"] == {"cat"}
    assert samples.notes[-1] == "labels.csv: 1 of 4 listed images are missing and left out"
    with pytest.raises(
        UserError, match=r"2 of its 2 images are missing .*; finish the download or unpacking, or correct the paths$"
    ):
        read_manifest(make(tmp_path, "image,labels\nx.jpg,dog\ny.jpg,cat\n"), missing_images="skip")


def test_rows_keep_their_numbers_across_blocks(tmp_path: Path) -> None:
    """Rows keep their order across the blocks of a file, and an error in a later block names the right row."""
    n = 200_000
    lines = [
        f"s3://bucket/a/rather/long/folder/so/that/the/file/needs/more/than/one/block/{row:07}.jpg" for row in range(n)
    ]
    labels = [("dog", "cat", "dog;cat", "")[row % 4] for row in range(n)]
    place = make(
        tmp_path,
        "image,labels,id\n" + "".join(f"{a},{b},{row}\n" for row, (a, b) in enumerate(zip(lines, labels, strict=True))),
    )
    listed = read_manifest(place).samples
    assert listed.table["uri"].to_pylist() == lines
    np.testing.assert_array_equal(listed.targets, np.tile([[0, 1], [1, 0], [1, 1], [0, 0]], (n // 4, 1)))
    values = ("0,1", "1,0", "1,1", "0,0")
    rows = [f"{a},{values[row % 4]}" for row, a in enumerate(lines)]
    place = make(tmp_path, "\n".join(["image,cat,dog", *rows]))
    np.testing.assert_array_equal(read_manifest(place).samples.targets, listed.targets)
    rows[190_000] += "3"
    with pytest.raises(UserError, match="row 190001: '13' in column 'dog'"):
        read_manifest(make(tmp_path, "\n".join(["image,cat,dog", *rows])))
    rows[190_000] = "x"
    with pytest.raises(UserError, match="row 190001: has 1 cells"):
        read_manifest(make(tmp_path, "\n".join(["image,cat,dog", *rows])))
