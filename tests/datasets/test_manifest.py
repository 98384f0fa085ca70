"""Manifests: the same targets from every form, and one clear line for everything that can be wrong with one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.coco import read_coco
from msrn_ray.datasets.image_uris import absolute_uris, find_local
from msrn_ray.datasets.manifest import read_manifest
from msrn_ray.datasets.protocol import Splits, fingerprint, load_splits
from msrn_ray.datasets.text_files import read_label_names
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable

Rows = Sequence[Mapping[str, Any]]


def write_csv(path: Path, rows: Rows, delimiter: str = ",") -> Path:
    """With the standard library's writer, which knows nothing of ours; lists become text with `;`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(
            {key: ";".join(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        )
    return path


def write_json_csv(path: Path, rows: Rows) -> Path:
    texts = [
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
    ]
    return write_csv(path, texts)


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=50)
    return path


FORMS: dict[str, tuple[str, Callable[[Path, Rows], Path]]] = {
    "csv": ("labels.csv", write_csv),
    "tsv": ("labels.tsv", lambda path, rows: write_csv(path, rows, "\t")),
    "semicolons": ("labels.CSV", lambda path, rows: write_csv(path, as_columns(rows), ";")),
    "columns": ("labels.csv", lambda path, rows: write_csv(path, as_columns(rows))),
    "json in csv": ("labels.csv", write_json_csv),
    "jsonl": ("labels.jsonl", write_jsonl),
    "jsonl columns": ("labels.ndjson", lambda path, rows: write_jsonl(path, as_columns(rows))),
    "parquet": ("labels.parquet", write_parquet),
    "parquet columns": ("labels.pq", lambda path, rows: write_parquet(path, as_columns(rows))),
}


def as_columns(rows: Rows) -> list[dict[str, Any]]:
    """The lists in `labels` as a column of 1 and 0 for each label."""
    names = {name: None for row in rows for name in row["labels"]}
    others = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    return [
        other | {name: int(name in row["labels"]) for name in names} for other, row in zip(others, rows, strict=True)
    ]


def make(folder: Path, text: str | bytes, name: str = "labels.csv", images: str = "abcd") -> Location:
    """Writes a manifest as it is, and the images a.jpg, b.jpg, ... beside it."""
    for image in images:
        (folder / f"{image}.jpg").touch()
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Location.of(folder / name)


def present(samples: SampleTable) -> dict[str, set[str]]:
    """image id -> its labels."""
    return {
        image: {name for name, value in zip(samples.label_names, row, strict=True) if value == 1}
        for image, row in zip(samples.table["image_id"].to_pylist(), samples.targets, strict=True)
    }


def splits_of(place: Location, **data: Any) -> Splits:
    overrides = {"data.dataset": "manifest", "data.root": str(place)}
    return load_splits(ExperimentConfig().with_overrides(overrides | {f"data.{key}": data[key] for key in data}))


def ids(table: SampleTable | None) -> list[str]:
    assert table is not None
    column: list[str] = table.table["image_id"].to_pylist()
    return column


@pytest.fixture(scope="module")
def photographs(shared: Path) -> dict[str, SampleTable]:
    """The COCO photographs as the COCO reader sees them."""
    root = shared / "data/coco_mini"
    return {split: read_coco(root, split, keep_unlabelled=True) for split in ("train", "val")}


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
    """Names of images and of labels, and [n, C] targets in which each label occurs."""
    labels = sorted(draw(st.lists(LABELS, min_size=2, max_size=5, unique=True)))
    images = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    row = st.lists(st.sampled_from([0, 1]), min_size=len(labels), max_size=len(labels))
    targets = np.array(draw(st.lists(row, min_size=len(images), max_size=len(images))), np.int8)
    targets[draw(st.integers(0, len(images) - 1))] = 1
    return images, labels, targets


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)  # files take their time
@given(table=label_tables())
@example(table=(["0"], ["0", "TAGS"], np.ones((1, 2), np.int8)))  # a label that is called as a column of lists is
def test_written_manifests_are_read_back(form: str, table: tuple[list[str], list[str], npt.NDArray[np.int8]]) -> None:
    images, labels, targets = table
    rows = [
        {"image": f"s3://bucket/{image}", "labels": [name for name, value in zip(labels, row, strict=True) if value]}
        for image, row in zip(images, targets, strict=True)
    ]
    name, write = FORMS[form]
    with TemporaryDirectory() as folder:
        place = Location.of(write(Path(folder) / name, rows))
        # which column is what is known here; a random label may be named like one
        columns = {} if "columns" in form or form == "semicolons" else {"label_column": "labels"}
        separator = {"csv": ";", "tsv": ";"}.get(form)
        samples = read_manifest(
            place, image_column="image", label_separator=separator, label_names=labels, **columns
        ).samples
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
    assert samples.table["uri"].to_pylist() == [f"{base}/set/images/a.jpg"], "not looked for, but read later"
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
        "x": [float("nan"), 1.0],
        "y": [True, None],
        "z": pa.array([None, 1], pa.uint8()),
    }
    pq.write_table(pa.table(values), tmp_path / "labels.parquet")
    assert read_manifest(Location.of(tmp_path / "labels.parquet")).samples.targets.tolist() == [
        [-1, 1, -1],
        [1, -1, 1],
    ]


def test_columns_by_name(tmp_path: Path) -> None:
    place = make(tmp_path, "url,file_name,class,tags,n\nu,a.jpg,dog,x,1\nv,b.jpg,cat,y,2\n")
    with pytest.raises(
        UserError, match=r"image may be in 'url' or 'file_name'; choose one \(--data\.image-column NAME\)"
    ):
        read_manifest(place)
    samples = read_manifest(place, image_column="file_name", label_column="class").samples
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r": is empty; write one row per image"),
        (" \r\n \n", r": is empty; write one row"),
        ("image,labels\n", r": has a header but no row; write one row"),
        ("photo,labels\na.jpg,dog\n",
         r"no column has a usual name of an image column \(image, .*\), its columns are 'photo', 'labels'; name"),
        ("image\na.jpg\n", r"no column holds labels, its columns are 'image'; add one named 'labels', or name"),
        ("image,label,labels\na.jpg,x,y\n", r"the label may be in 'label' or 'labels'; choose one \(--data\.label-column"),
        ("image,labels,labels\na.jpg,x,y\n", r"two columns are named 'labels'; rename one of them"),
        ("image,labels\na.jpg,dog\nb.jpg,dog,cat\n", r", row 2: has 3 cells, but there are 2 columns \('b\.jpg,dog,cat'\); put"),
        ("image,labels\na.jpg,dog\n\nb.jpg\n", r", row 2: has 1 cells, but there are 2 columns"),
        ('image,labels\na.jpg,"dog\nb.jpg,cat\n', r"has an odd number of quotes \(\"\), so one is missing"),
        ('image,labels\na.jpg,"dog\nb.jpg,cat"\n', r"row 1: column 'labels' has a line break in it; is a quote missing"),
        ('image,labels\n"a.jpg\nb.jpg",cat\n', r"row 1: column 'image' has a line break in it; is a quote missing"),
        ("image,labels\na.jpg,dog\n,cat\n", r"row 2: column 'image' is empty; fill it in"),
        ("image,labels,id\na.jpg,dog,1\nb.jpg,cat,\n", r"row 2: column 'id' is empty; fill it in"),
        ("image,labels\na.jpg,dog\nb.jpg,dog\na.jpg,cat\n", r"'a\.jpg' in column 'image' is in rows 1 and 3, .*; write one row"),
        ("image,labels,id\na.jpg,dog,1\nb.jpg,dog,1\n", r"'1' in column 'id' is in rows 1 and 2"),
        ("image,labels,split\na.jpg,dog,train\nb.jpg,dog,tset\n", r"row 2: 'tset' in column 'split' is none of train, training, val"),
        ("image,labels,split\na.jpg,dog,train\nb.jpg,dog,\n", r"row 2: column 'split' is empty; fill it in"),
        ("image,labels\na.jpg,;\nb.jpg,\n", r"no row has a label in column 'labels'; name the column"),
        ('image,labels\na.jpg,"dog;cat,x"\n', r"holds ';' and ','; choose the separator of the labels \(--data\.label-separator ';'\)"),
        ("image,labels\na.jpg,\"['dog']\"\n", r"row 1: \"\['dog'\]\" is not a JSON list; write it as \[\"dog\", \"person\"\]"),
        ('image,labels\na.jpg,"[""dog""]"\nb.jpg,[x\n', r"row 2: '\[x' is not a JSON list"),
        ('image,labels\na.jpg,"[""dog""]"\nb.jpg,cat\n', r"row 2: 'cat' in column 'labels' is no JSON list, but other rows hold one"),
        ('image,labels\na.jpg,"[""dog""]"\nb.jpg,[1]\n', r"its JSON lists hold values of different types; write each label as a text"),
        ('image,labels\na.jpg,"[""a""]} {""labels"":[""b""]"\n', r"row 1: .* is not a JSON list"),
        ("image,labels\na.jpg,[1.5]\n", r"column 'labels' holds double, but text is needed"),
        ("image,dog\na.jpg,1\nb.jpg,yes\n", r"row 2: 'yes' in column 'dog' is not 1, 0, -1 or empty; correct it\. If"),
        ("image,labels\n../a.jpg,dog\n", r"row 1: '\.\./a\.jpg' may lead out of .*; write it without '\.\.'"),
        ("image,labels\na.jpg,dog\nx/../../b.jpg,dog\n", r"row 2: 'x/\.\./\.\./b\.jpg' may lead out"),
        ("image,labels\nx\\..\\..\\b.jpg,dog\n", r"row 1: 'x/\.\./\.\./b\.jpg' may lead out"),
        ("image,labels\na.jpg,dog\nx.jpg,dog\nno/y.jpg,cat\n", r"2 of its 3 images .*\(.*/x\.jpg, .*/no/y\.jpg\).*-images skip"),
    ],
)  # fmt: skip
def test_csv_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_manifest(make(tmp_path, text))
    assert "labels.csv" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", "image,labels\na.jpg,dog\nb.jpg,caf\xe9\n".encode("latin-1"), r"line 3: byte 0xe9 is not UTF-8; save"),
        ("labels.csv", "image,labels\nü.jpg,dog\n".encode() + b"b.jpg,\xe9\n", r"line 3: byte 0xe9 is not UTF-8"),
        ("labels.csv", "im\xe9ge,labels\na.jpg,dog\n".encode("latin-1"), r"line 1: byte 0xe9 is not UTF-8"),
        ("labels.csv", "image,labels\na.jpg,dog\n".encode("utf-16"), r"is UTF-16; save the whole file as UTF-8"),
        ("labels.csv", b"\x89PNG\r\n\x1a\n\x00\x00", r"line 1: byte 0x89 is not UTF-8"),
        ("labels.csv", b"<!DOCTYPE html>\n<html>\n</html>\n", r"its columns are '<!DOCTYPE html>'"),
        ("labels.tsv", b"image,labels\na.jpg,dog\n", r"its columns are 'image,labels'"),
        ("labels.parquet", b"image,labels\na.jpg,dog\n", r"is not a whole Parquet file \(.*\); write or download it again"),
        ("labels.parquet", b"", r"is not a whole Parquet file"),
        ("labels.jsonl", b"", r"is empty; write one row"),
        ("labels.jsonl", b"image,labels\na.jpg,dog\n", r"line 1: is not JSON \(.*\); write one object per line"),
        ("labels.jsonl", b'{"image": "a.jpg", "labels": []}\n{"image":\n', r"line 2: is not JSON"),
        ("labels.jsonl", b'[{"image": "a.jpg", "labels": []}]\n', r'line 1: is no JSON object; write one per line, such as \{"image"'),
        ("labels.jsonl", b'{"image": "a.jpg", "tags": "x"}\n\n{"image": "b.jpg", "tags": ["x"]}\n', r"line 3: 'tags' is a list, but a"),
        ("labels.jsonl", b'{"image": "a.jpg", "x": 1}\n{"image": "b.jpg", "x": true}\n', r"line 2: 'x' is true or false, but a number in"),
        ("labels.jsonl", b'{"image": "a.jpg", "labels": "\xe9"}\n', r"line 1: byte 0xe9 is not UTF-8"),
        ("labels.jsonl", '{"image": "a.jpg"}\n'.encode("utf-16"), r"is UTF-16"),
        ("labels.jsonl", b'{"image": "a.jpg", "labels": {"dog": 1}}\n', r"column 'labels' holds struct<dog: int64>, but text is needed"),
        ("labels.jsonl", b'{"image": {"path": "a.jpg"}, "labels": "dog"}\n', r"column 'image' holds struct.*, but text is needed"),
        ("labels.jsonl", b'{"image": "a.jpg", "labels": "dog"}\n{"labels": "dog"}\n', r"row 2: column 'image' is empty"),
        ("labels.xlsx", b"PK", r"has no suffix of a manifest; give a file that ends in \.csv, \.tsv"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_manifest(make(tmp_path, content, name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    rows = [{"image": f"s3://b/{row}.jpg", "labels": ["dog"]} for row in range(500)]
    path = write_parquet(tmp_path / "labels.parquet", rows)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"labels\.parquet: cannot be read \(.*\); write it again"):
        read_manifest(Location.of(path))


def test_folder_or_missing_file_is_refused(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,dog\n")
    with pytest.raises(UserError, match=r"is a folder; give the manifest itself, .* \(did you mean .*/labels\.csv\?\)"):
        read_manifest(place.parent)
    with pytest.raises(UserError, match=r"none\.csv: no such file; give the manifest, a file that ends in \.csv"):
        read_manifest(place.parent / "none.csv")
    with pytest.raises(UserError, match=r"there is no column 'photo' \(data\.image_column\); its columns are 'image'"):
        read_manifest(place, image_column="photo")


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


def hundred(folder: Path, splits: Sequence[str] = ()) -> Location:
    """100 images, 50 dogs, 25 cats, 25 without a label; in turn in the splits."""
    lines = [
        f"s3://b/{row}.jpg,{('dog', 'cat', 'dog', '')[row % 4]}"
        + (f",{splits[row // 4 % len(splits)]}" if splits else "")
        for row in range(100)
    ]
    return make(folder, "\n".join(["image,labels" + (",split_name" if splits else ""), *lines]))


def test_missing_splits_are_drawn_by_seed(tmp_path: Path) -> None:
    place = hundred(tmp_path)
    splits = splits_of(place, test_fraction=0.2, val_fraction=0.25, keep_unlabelled_train=True)
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts if part is not None] == [60, 20, 20]
    assert sorted(image for part in parts for image in ids(part)) == sorted(f"s3://b/{row}.jpg" for row in range(100))
    assert splits.test is not None
    assert splits.test.targets.sum(0).tolist() == [5, 10], "a fifth of 25 cats and 50 dogs"
    assert splits.notes == (
        "labels.csv: 100 images, 2 labels (one label per row)",
        "no splits are named: test is drawn (data.test_fraction=0.2, data.split_seed=0)",
        "train: 80 images, 20 without a label kept",
        "test: 20 images, 5 without a label kept",
        "protocol honest: 20 of 80 train images are val (data.val_fraction=0.25), test of labels.csv is test",
    )
    again = splits_of(place, test_fraction=0.2, val_fraction=0.25, keep_unlabelled_train=True)
    assert ids(again.test) == ids(splits.test)
    assert ids(splits_of(place, test_fraction=0.2, split_seed=1).test) != ids(splits.test)
    none = splits_of(place, test_fraction=0, keep_unlabelled_train=True)
    assert none.test is None
    assert (len(none.train), len(none.val)) == (90, 10)
    assert any(note.startswith("there is no test split") for note in none.notes)
    with pytest.raises(UserError, match="there is no test split"):
        none.named("test")


def test_named_splits_are_kept(tmp_path: Path) -> None:
    splits = splits_of(hundred(tmp_path, ("TRAIN", " train", "dev", "test")))
    assert len(splits.named("train")) == 39, "13 of 52 have no label"
    assert (len(splits.named("val")), len(splits.named("test"))) == (24, 24)
    assert splits.notes == (
        "labels.csv: 100 images, 2 labels (one label per row)",
        "train: 39 of 52 images, 13 without a label dropped",
        "val: 24 images, 6 without a label kept",
        "test: 24 images, 6 without a label kept",
    )
    two = splits_of(hundred(tmp_path, ("train", "test")), keep_unlabelled_eval=False)
    assert len(two.named("train")) + len(two.named("val")) == 39
    assert len(two.named("test")) == 36
    config = ExperimentConfig().with_overrides(
        {"data.dataset": "manifest", "data.root": str(hundred(tmp_path, ("train", "val", "test"))), "protocol": "paper"}
    )
    paper = load_splits(config)
    assert (len(paper.train), ids(paper.val)[0], paper.test) == (27, "s3://b/8.jpg", None)
    assert paper.notes[-1].startswith("protocol paper: the best epoch is chosen on the test split (test of labels.csv)")


def test_unusable_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"labels\.csv: no image is in the split train; put the images to train on in it"
    ):
        splits_of(hundred(tmp_path, ("val", "test")))
    config = ExperimentConfig().with_overrides(
        {"data.dataset": "manifest", "data.root": str(hundred(tmp_path, ("train", "val"))), "protocol": "paper"}
    )
    with pytest.raises(UserError, match=r"there is no test split, which protocol=paper scores; use protocol=honest"):
        load_splits(config)
    everything = splits_of(hundred(tmp_path, ("train",)), keep_unlabelled_train=True)
    assert [len(everything.named(name)) for name in ("train", "val", "test")] == [81, 9, 10]


def test_too_few_images_for_val_are_refused(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,dog\nb.jpg,cat\nc.jpg,dog\n")
    with pytest.raises(
        UserError, match=r"data\.val_fraction=0\.1 of its 3 train images is no image; add images, raise"
    ):
        splits_of(place)
    assert len(splits_of(place, val_fraction=0.4).val) == 1


def test_root_is_required() -> None:
    with pytest.raises(UserError, match=r"data\.root is needed: the file of the manifest \(--data\.root FILE\)"):
        load_splits(ExperimentConfig().with_overrides({"data.dataset": "manifest"}))


def test_rows_keep_their_numbers_across_blocks(tmp_path: Path) -> None:
    """Rows keep their place over the blocks that a file is read in, and the row of an error is right in a later one."""
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


@pytest.mark.parametrize("column", ["image", "labels"])
def test_parquet_with_invalid_text_is_refused(tmp_path: Path, column: str) -> None:
    place = make(tmp_path, b"", "labels.parquet")
    broken = pa.array([b"\xff.jpg", b"b.jpg"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "labels": ["dog", "cat"]} | {column: broken}), place.text)
    with pytest.raises(UserError, match=r"labels\.parquet: cannot be read \(.*UTF8.*\); write it again"):
        read_manifest(place)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        (
            "labels.jsonl",
            '{"image": "a.jpg", "labels": ["a"]}\n{"image": "b.jpg", "labels": ' + "[" * 100_000,
            "line 2",
        ),
        ("labels.csv", "image,labels\na.jpg,[]\nb.jpg," + "[" * 100_000, "row 2"),
    ],
)
def test_deeply_nested_lists_are_refused(tmp_path: Path, name: str, text: str, where: str) -> None:
    with pytest.raises(UserError, match=where):
        read_manifest(make(tmp_path, text, name))


def test_too_few_images_for_test_are_refused(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,dog\n")
    with pytest.raises(UserError, match=r"data\.test_fraction=0\.9 of 1 images leaves none to train on"):
        splits_of(place, test_fraction=0.9)
