"""Tars, Arrow and Parquet files as data sets: images are found in place, labels and splits as they are written there."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msrn_ray.config import DataSettings, ExperimentConfig
from msrn_ray.datasets.containers import by_split, split_of
from msrn_ray.datasets.huggingface import read_huggingface
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.registry import read_published
from msrn_ray.datasets.webdataset import read_webdataset
from msrn_ray.errors import UserError
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable
from tests.tiny import make_picture

NAMES = ("cat", "dog", "owl")
LABELS = [["dog"], [], ["cat", "owl"], ["owl"], ["dog", "cat"]]
TARGETS = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0]]


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    make_picture(seed).save(file, "JPEG")
    return file.getvalue()


def targets_and_images(table: SampleTable) -> tuple[list[list[int]], list[bytes]]:
    return table.targets.tolist(), [read_bytes(uri) for uri in table.table["uri"].to_pylist()]


# Names


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/validation-0.tar", "val"),
        ("VAL/0001.tar", "val"),
        ("dev.tar", "val"),
        ("valid_3.tar", "val"),
        ("test2017/a.tar", "test"),
        ("training.tar", "train"),
        ("tests/a.tar", None),
        ("part-train.tar", None),
    ],
)
def test_splits_by_name(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_files_by_split() -> None:
    root = Location.of("/set")
    assert by_split(root, ["a.tar", "b.tar"]) == {"train": ["a.tar", "b.tar"]}
    assert by_split(root, ["test.tar", "train/b.tar"]) == {"test": ["test.tar"], "train": ["train/b.tar"]}
    with pytest.raises(UserError, match=r"the name extra\.tar gives no split, but other names do; begin"):
        by_split(root, ["train.tar", "extra.tar"])
    with pytest.raises(UserError, match="no file of the train split"):
        by_split(root, ["val.tar"])


# WebDataset


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def as_json(value: object, name: str = "labels") -> bytes:
    return json.dumps({name: value, "width": 48}).encode()


@pytest.fixture(params=["path", "memory"])
def tars(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Two train tars and a val tar; the second one has a folder inside, names longer than 100 bytes and uncommon files."""
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
        ({"a.jpg": b"x", "a.json": b"[1]"}, r"no field labels.*only nothing"),
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


# Hugging Face


CLASSES = {"feature": {"names": ["owl", "cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}


def arrow_table(
    labels: Any, features: Mapping[str, Any] | None, rows: Sequence[int] = range(5), **more: Any
) -> pa.Table:
    images = pa.array(
        [{"bytes": picture(row), "path": None} for row in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"image": images, "labels": labels, **more})
    if features is None:
        return table
    told = {"info": {"features": {"image": {"_type": "Image"}, "labels": features}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(told)})


def numbers(rows: Sequence[int] = range(5)) -> pa.Array:
    return pa.array([[["owl", "cat", "dog"].index(name) for name in LABELS[row]] for row in rows], pa.list_(pa.int64()))


def save_to_disk(folder: Path, table: pa.Table, batch: int = 2, files: int = 1) -> Path:
    """What `datasets` writes for one split."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    step = -(-len(table) // files)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(number * step, step), max_chunksize=batch)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    return folder


def save_dictionary(root: Path, **splits: pa.Table) -> Path:
    for name, table in splits.items():
        save_to_disk(root / name, table, files=2)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def test_huggingface_rows_of_arrow_files(tmp_path: Path) -> None:
    root = save_dictionary(
        tmp_path / "saved",
        train=arrow_table(numbers(), CLASSES),
        validation=arrow_table(numbers([3]), CLASSES, [3]),
        test=arrow_table(numbers([4, 2]), CLASSES, [4, 2]),
    )
    tables = read_huggingface(Location.of(root))
    assert list(tables) == ["train", "val", "test"]
    order = [1, 2, 0]  # the features' own
    for split, rows in (("train", [0, 1, 2, 3, 4]), ("val", [3]), ("test", [4, 2])):
        assert tables[split].label_names == ("owl", "cat", "dog")
        targets = np.array(TARGETS)[rows][:, [2, 0, 1]].tolist()
        assert targets_and_images(tables[split]) == (targets, [picture(row) for row in rows]), order
    assert tables["train"].table["image_id"].to_pylist() == [f"train/{row:08}" for row in range(5)]
    assert "#bytes=" in tables["train"].table["uri"][0].as_py()


def test_huggingface_remote_folder_with_one_split(tmp_path: Path) -> None:
    root = save_to_disk(tmp_path / "saved", arrow_table(numbers(), CLASSES))
    remote = Location.of(f"memory://{tmp_path.name}-saved")
    for path in root.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    tables = [read_huggingface(place)["train"] for place in (Location.of(root), remote)]
    assert targets_and_images(tables[0]) == targets_and_images(tables[1])
    published = read_published(DataSettings(dataset="huggingface", root=str(root), test_fraction=0.25))
    assert published.held_out is not None
    assert (len(published.train), len(published.held_out)) == (4, 1)
    assert read_published(DataSettings(dataset="huggingface", root=str(root), test_fraction=0)).held_out is None


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_huggingface_rows_of_parquet_files(tmp_path: Path, compression: str) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (
        ("train-00000-of-00002", [0, 1, 2]),
        ("train-00001-of-00002", [3, 4]),
        ("validation-00000-of-00001", [2]),
    ):
        table = arrow_table(numbers(rows), CLASSES, rows)
        pq.write_table(table, tmp_path / f"data/{name}.parquet", row_group_size=2, compression=compression)
    tables = read_huggingface(Location.of(tmp_path), label_names=NAMES)
    assert tables["train"].label_names == NAMES
    assert targets_and_images(tables["train"]) == (TARGETS, [picture(row) for row in range(5)])
    assert targets_and_images(tables["val"]) == (TARGETS[2:3], [picture(2)])
    notes = load_splits(ExperimentConfig(data=DataSettings(dataset="huggingface", root=str(tmp_path)))).notes
    assert any("`msrn prepare` them first" in line for line in notes)


def test_huggingface_labels_as_text_single_numbers_and_nested(tmp_path: Path) -> None:
    text = arrow_table(pa.array(LABELS), None, image_id=[10, 11, 12, 13, 14])
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "text", text)))["train"]
    assert (table.label_names, table.targets.tolist()) == (NAMES, TARGETS)
    assert table.table["image_id"].to_pylist() == ["10", "11", "12", "13", "14"]

    one = arrow_table(pa.array([0, 2, -1, None, 1], pa.int64()), {"names": list(NAMES), "_type": "ClassLabel"})
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "one", one)))["train"]
    assert table.targets.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]

    plain = arrow_table(numbers(), None)
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "plain", plain)), label_names=("owl", "cat", "dog"))[
        "train"
    ]
    assert table.targets[:, [1, 2, 0]].tolist() == TARGETS

    objects = pa.StructArray.from_arrays([numbers(), pa.array([[]] * 5, pa.list_(pa.float32()))], ["category", "area"])
    features = {
        "image": {"_type": "Image"},
        "objects": {"feature": {"category": CLASSES["feature"]}, "_type": "Sequence"},
    }
    nested = arrow_table(numbers(), None).drop_columns("labels").append_column("objects", objects)
    nested = nested.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    root = Location.of(save_to_disk(tmp_path / "nested", nested))
    table = read_huggingface(root, label_column="objects.category")["train"]
    assert table.targets[:, [1, 2, 0]].tolist() == TARGETS


TWO_IMAGES = pa.table({"a": [b"x"], "b": [b"y"], "labels": [["cat"]]})


@pytest.mark.parametrize(
    ("table", "given", "match"),
    [
        (arrow_table(numbers(), None), {}, r"labels holds numbers without names; .*data\.labels"),
        (arrow_table(numbers(), None), {"label_names": ("a",)}, r"labels holds 2, but there are 1 names \(0 to 0\)"),
        (arrow_table(pa.array(LABELS), None), {"label_names": ("cat", "dog")}, r"image train/00000002 has the label 'owl'.*data\.labels"),
        (arrow_table(pa.array([1.5] * 5), None), {}, r"labels is double; it must hold a label or a list of labels"),
        (arrow_table(pa.array(LABELS), None, tags=["a"] * 5), {}, r"2 columns may hold the label; name one of .*data\.label_column"),
        (arrow_table(pa.array(LABELS), None), {"label_column": "tag"}, r"no label column 'tag'; name one of image\.bytes, .*labels"),
        (arrow_table(pa.array(LABELS), None), {"image_column": "photo"}, r"no image column 'photo'.*data\.image_column"),
        (TWO_IMAGES, {}, r"0 columns may hold the image; name one"),
        (arrow_table(pa.array(LABELS), None, id=[1, 1, 2, 3, 4]), {}, r"image id '1' 2 times"),
    ],
)  # fmt: skip
def test_huggingface_ambiguous_columns_are_refused(
    tmp_path: Path, table: pa.Table, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        read_huggingface(Location.of(save_to_disk(tmp_path / "saved", table)), **given)


@pytest.mark.parametrize("given", [".", "saved/images"])
def test_wrong_folder_level_gets_a_suggestion(tmp_path: Path, given: str) -> None:
    (tmp_path / "saved/images").mkdir(parents=True)
    save_dictionary(tmp_path / "saved", train=arrow_table(pa.array(LABELS), None))
    with pytest.raises(UserError, match=rf"\(did you mean {tmp_path}/saved\?\)$"):
        read_huggingface(Location.of(tmp_path / given))
    write_tar(tmp_path / "saved/a.tar", {})
    with pytest.raises(UserError, match=rf"holds no \.tar.*\(did you mean {tmp_path}/saved\?\)$"):
        read_webdataset(Location.of(tmp_path / "saved/images"))


def test_huggingface_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no dataset_dict\.json, state\.json or \.parquet"):
        read_huggingface(Location.of(tmp_path))
    for read in (read_huggingface, read_webdataset):
        with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder"):
            read(Location.of(tmp_path / "nowhere"))
    root = save_to_disk(tmp_path / "saved", arrow_table(pa.array(LABELS), None))
    state = json.loads((root / "state.json").read_text())
    for change, match in (
        ({"_indices_data_files": [{"filename": "x"}]}, "call flatten_indices"),
        ({"_data_files": None}, "has no list of _data_files"),
        ({"_data_files": [{"filename": "../data.arrow"}]}, "leads out of the folder"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow: cannot be read"),
    ):
        (root / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=match):
            read_huggingface(Location.of(root))
    (root / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: damaged \(.*; save the data set again"):
        read_huggingface(Location.of(root))
    (root / "state.json").write_text(json.dumps(state))
    (file,) = root.glob("*.arrow")
    whole = file.read_bytes()
    for content in (whole[:3000], whole[:-8], b"", b"no Arrow file"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"\.arrow: c(ut off|annot be read)"):
            read_huggingface(Location.of(root))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "extra"]}')
    with pytest.raises(UserError, match="splits must be called train, val or test"):
        read_huggingface(Location.of(tmp_path))


def test_huggingface_missing_image_bytes_are_refused(tmp_path: Path) -> None:
    table = arrow_table(pa.array(LABELS), None)
    images = pa.array([{"bytes": None, "path": "a.jpg"}] * 5, table.schema.field("image").type)
    root = save_to_disk(tmp_path / "paths", table.set_column(0, "image", images))
    with pytest.raises(UserError, match=r"row 0 of a batch has no image\.bytes, perhaps only a path"):
        read_huggingface(Location.of(root))
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.set_column(0, "image", images), tmp_path / "parquet/train.parquet")
    with pytest.raises(UserError, match=r"row 0 of a batch has no image\.bytes, perhaps only a path"):
        read_huggingface(Location.of(tmp_path / "parquet"))
    root = save_to_disk(tmp_path / "packed", table)
    (file,) = root.glob("*.arrow")
    with pa.OSFile(str(file), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
            stream.write_table(table)
    with pytest.raises(UserError, match="buffers are compressed"):
        read_huggingface(Location.of(root))


def test_huggingface_missing_ids_are_refused(tmp_path: Path) -> None:
    table = pa.table({"image": [picture(0), picture(1)], "label": ["a", "b"], "image_id": ["x", None]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 1 of a batch has no image_id; fill it in"):
        read_huggingface(Location.of(tmp_path))


def test_huggingface_invalid_text_is_refused(tmp_path: Path) -> None:
    labels = pa.array([b"\xff", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "label": labels}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read \(.*UTF8"):
        read_huggingface(Location.of(tmp_path))


def test_huggingface_lists_beyond_the_file_are_refused(tmp_path: Path) -> None:
    ends = pa.py_buffer(np.array([0, 2**30, 2], np.int32))
    labels = pa.Array.from_buffers(pa.list_(pa.string()), 2, [None, ends], children=[pa.array(["a", "b"])])
    save_to_disk(tmp_path / "saved", pa.table({"image": [picture(0), picture(1)], "labels": labels}))
    with pytest.raises(UserError, match=r"\.arrow: cannot be read"):
        read_huggingface(Location.of(tmp_path / "saved"))


def test_huggingface_blank_labels_are_dropped(tmp_path: Path) -> None:
    labels = [["cat", " cat", ""], ["owl "], [None, " "]]
    pq.write_table(pa.table({"image": [picture(row) for row in range(3)], "labels": labels}), tmp_path / "a.parquet")
    (table,) = read_huggingface(Location.of(tmp_path)).values()
    assert table.label_names == ("cat", "owl")
    assert table.targets.tolist() == [[1, 0], [0, 1], [0, 0]]


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
