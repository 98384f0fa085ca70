"""Conformance of every reader on every kind of root: a path, file://, memory:// and s3:// (moto's server on loopback)."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from msrn_ray.data_settings import Dataset, DataSettings
from msrn_ray.datasets.registry import READERS, PublishedSplits
from msrn_ray.datasets.transforms import decode
from msrn_ray.errors import UserError
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.io.filesystems import filesystem_of
from msrn_ray.io.storage import Location
from msrn_ray.official import LABEL_NAMES
from msrn_ray.types import SampleTable
from tests.datasets.container_files import save_to_disk, write_tar
from tests.tiny import make_coco, make_photo

ROOTS = ("path", "file", "memory", pytest.param("s3", marks=pytest.mark.slow))
KEPT = {"keep_unlabelled_train": True, "keep_unlabelled_eval": True}
CUSTOM = ("cat", "dog", "owl")
# name -> folder of the fixtures or of `make_custom`, settings, labels
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "coco": ("coco_mini", {"dataset": "coco"} | KEPT, LABEL_NAMES["coco"]),
    "voc": ("voc_mini", {"dataset": "voc"}, LABEL_NAMES["voc"]),
    "nuswide": ("nuswide_mini", {"dataset": "nuswide"} | KEPT, LABEL_NAMES["nuswide"]),
    "nuswide csv": ("nuswide_mini", {"dataset": "nuswide", "nuswide_form": "csv"} | KEPT, LABEL_NAMES["nuswide"]),
    "apparel": ("apparel_mini", {"dataset": "apparel"}, LABEL_NAMES["apparel"]),
    "manifest": ("manifest/labels.csv", {"dataset": "manifest"}, CUSTOM),
    "folders": ("folders", {"dataset": "folders"}, CUSTOM),
    "huggingface": ("arrow", {"dataset": "huggingface"}, CUSTOM),
    "huggingface parquet": ("parquet", {"dataset": "huggingface"}, CUSTOM),
    "webdataset": ("tars", {"dataset": "webdataset"}, CUSTOM),
}
Place = Callable[[str, str], str]
Reader = Callable[[str, str], PublishedSplits]


def copy_thinned(source: Path, target: Path) -> None:
    """Copy all label files and one image in eight with its XML; one request per image would take too long."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        kinds = [sorted(name for name in names if name.endswith(kind)) for kind in (".jpg", ".xml")]
        return ["AllLabels", *(name for files in kinds for row, name in enumerate(files) if row % 8)]

    shutil.copytree(source, target, ignore=left_out)


def make_custom(photos: Path, root: Path) -> None:
    """Write the same photographs in each custom form, in three named splits."""
    paths = sorted(photos.glob("*/*.jpg"))[::24]
    labels = [[CUSTOM[row % 3], *(["owl"] if row % 3 == 0 else [])] for row in range(len(paths))]
    lines = ["image,labels,split"]
    for number, split in enumerate(("train", "val", "test")):
        members: dict[str, bytes] = {}
        split_rows = [row for row in range(len(paths)) if row // 3 % 3 == number]
        for row in split_rows:
            data = paths[row].read_bytes()
            (root / "manifest/photos").mkdir(parents=True, exist_ok=True)
            (root / f"manifest/photos/{row}.jpg").write_bytes(data)
            lines.append(f"photos/{row}.jpg,{';'.join(labels[row])},{split}")
            folder = root / "folders" / split / labels[row][0]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.jpg").write_bytes(data)
            members |= {f"{row}.jpg": data, f"{row}.json": json.dumps({"labels": labels[row]}).encode()}
        write_tar(root / f"tars/{split}.tar", members)
        images = pa.array([{"bytes": paths[row].read_bytes(), "path": None} for row in split_rows])
        table = pa.table({"image": images, "labels": [labels[row] for row in split_rows]})
        save_to_disk(root / "arrow" / split, table)
        (root / "parquet").mkdir(exist_ok=True)
        pq.write_table(table, root / f"parquet/{split}.parquet", row_group_size=4)
    (root / "arrow/dataset_dict.json").write_text(json.dumps({"splits": ["train", "val", "test"]}))
    (root / "manifest/labels.csv").write_text("\n".join(lines))


def reference(kind: str) -> str:
    """Return the kind of local root with the same images."""
    return "thinned" if kind == "s3" else "path"


@pytest.fixture(scope="session")
def place(shared: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder of `CASES` on a kind of root; each copy is made once."""
    custom = tmp_path_factory.mktemp("custom")
    make_custom(shared / "data/apparel_mini", custom)

    @lru_cache
    def place(folder: str, kind: str) -> str:
        is_custom = (custom / folder).is_dir()
        local = (custom if is_custom else shared / "data") / folder
        if kind in ("path", "file"):
            return str(local) if kind == "path" else local.as_uri()
        if kind == "thinned":
            if is_custom:
                return str(local)
            thinned = tmp_path_factory.mktemp("thinned") / folder
            copy_thinned(local, thinned)
            return str(thinned)
        if kind == "s3":
            local = Path(place(folder, "thinned"))
        base = Location.of("memory://fixtures") if kind == "memory" else request.getfixturevalue("s3_bucket")
        filesystem, path = filesystem_of(str(base / folder))
        pafs.copy_files(str(local), path, pafs.LocalFileSystem(), filesystem)
        return str(base / folder)

    return place


def read_case(place: Place, case: str, kind: str) -> PublishedSplits:
    name, settings, _ = CASES[case]
    folder, _, file = name.partition("/")
    root = Location.of(place(folder, kind))
    missing = {"missing_images": "skip"} if kind in ("thinned", "s3") else {}
    settings = {"root": str(root / file if file else root), **settings, **missing}
    return READERS[settings["dataset"]](DataSettings.model_validate(settings))


@pytest.fixture(scope="session")
def read(place: Place) -> Reader:
    """Read a case of `CASES` from a kind of root, each once."""
    return lru_cache(partial(read_case, place))


def parts(published: PublishedSplits) -> list[SampleTable]:
    return [part for part in (published.train, published.val, published.held_out) if part is not None]


def test_every_reader_is_a_case() -> None:
    assert {settings["dataset"] for _, settings, _ in CASES.values()} == set(READERS) - {"scenes"}, "scenes are COCO"


def test_every_configured_data_set_has_a_reader() -> None:
    assert set(READERS) == set(get_args(Dataset))


@pytest.mark.parametrize("kind", ROOTS)
@pytest.mark.parametrize("case", CASES)
class TestConformance:
    def test_columns(self, read: Reader, case: str, kind: str) -> None:
        for part in parts(read(case, kind)):
            num_labels = len(part.label_names)
            assert part.table.schema.names == ["image_id", "uri", "target"]
            assert part.table.schema.types == [pa.string(), pa.string(), pa.list_(pa.int8(), num_labels)]
            assert sum(column.null_count for column in part.table.columns) == 0
            assert part.targets.dtype == np.int8
            assert part.targets.shape == (len(part), num_labels)
            assert set(np.unique(part.targets)) <= {-1, 0, 1}
            assert (part.targets == 1).any()

    def test_label_order_matches_the_authors(self, read: Reader, case: str, kind: str) -> None:
        for part in parts(read(case, kind)):
            assert part.label_names == CASES[case][2]

    def test_ids_are_unique_and_splits_disjoint(self, read: Reader, case: str, kind: str) -> None:
        for column in ("image_id", "uri"):
            values = [value for part in parts(read(case, kind)) for value in part.table[column].to_pylist()]
            assert len(set(values)) == len(values)
            assert all(values)

    def test_every_image_opens_and_decodes(self, read: Reader, case: str, kind: str) -> None:
        for table, expected in zip(parts(read(case, kind)), parts(read(case, reference(kind))), strict=True):
            for uri, path in zip(table.table["uri"].to_pylist(), expected.table["uri"].to_pylist(), strict=True):
                image = read_bytes(uri)
                assert image == read_bytes(path)
                assert decode(image, max_pixels=10_000_000).shape[0] == 3

    def test_uris_begin_with_the_root(self, read: Reader, case: str, kind: str) -> None:
        start = {"path": "/", "file": "/", "memory": "memory://fixtures/", "s3": "s3://fixtures/"}[kind]
        for part in parts(read(case, kind)):
            assert all(uri.startswith(start) for uri in part.table["uri"].to_pylist())

    def test_every_kind_of_root_gives_equal_tables(self, read: Reader, case: str, kind: str) -> None:
        for table, expected in zip(parts(read(case, kind)), parts(read(case, reference(kind))), strict=True):
            assert len(table) > 5
            assert table.table.drop("uri").equals(expected.table.drop("uri"))
            assert table.notes == expected.notes
            assert table.source == expected.source

    def test_notes_are_lines(self, read: Reader, case: str, kind: str) -> None:
        for part in parts(read(case, kind)):
            for line in (*part.notes, part.source):
                assert line.strip() == line != ""
                assert "\n" not in line


@pytest.mark.parametrize("case", CASES)
def test_reading_again_gives_an_equal_table(place: Place, read: Reader, case: str) -> None:
    again = read_case(place, case, "path")
    for first, second in zip(parts(read(case, "path")), parts(again), strict=True):
        assert first.table.equals(second.table)
        assert (first.label_names, first.source, first.notes) == (second.label_names, second.source, second.notes)


def labels_of(*tables: SampleTable) -> dict[str, set[str]]:
    """Return the label names of each image id, unknown labels included, since difficult objects are objects."""
    return {
        image_id: {name for name, value in zip(table.label_names, row, strict=True) if value}
        for table in tables
        for image_id, row in zip(table.table["image_id"].to_pylist(), table.targets, strict=True)
    }


def sources(path: Path, column: str) -> dict[str, str]:
    """Return COCO's image id of each id in the copy."""
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    return {row[column]: str(int(row["coco_mini_file"].rpartition("_")[2].removesuffix(".jpg"))) for row in rows}


VOC_NAMES = {
    **{"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "potted plant": "pottedplant"},
    **{"dining table": "diningtable", "tv": "tvmonitor"},
}
NUS_NAMES = {
    **{"person": "person", "car": "cars vehicle", "bus": "vehicle", "truck": "vehicle", "motorcycle": "vehicle"},
    **{name: f"{name} animal" for name in ("dog", "cat", "cow", "bear", "zebra")},
    **{"horse": "horses animal", "bird": "birds animal", "airplane": "plane", "boat": "boats", "train": "train"},
    **dict.fromkeys(("elephant", "giraffe", "sheep"), "animal"),
    **{"book": "book", "laptop": "computer", "stop sign": "sign", "potted plant": "plants", "surfboard": "surf"},
    **dict.fromkeys(
        ("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"), "food"
    ),
    **dict.fromkeys(("sports ball", "skis", "tennis racket", "baseball bat", "baseball glove"), "sports"),
    "teddy bear": "toy",
}


def test_voc_agrees_with_coco(shared: Path, read: Reader) -> None:
    coco, voc = (labels_of(*parts(read(case, "path"))) for case in ("coco", "voc"))
    source = sources(shared / "data/voc_mini/sources.csv", "voc_id")
    assert set(voc) == set(source)
    for image_id, labels in voc.items():
        named = {VOC_NAMES.get(name, name) for name in coco[source[image_id]]}
        assert labels == named & set(LABEL_NAMES["voc"])


@pytest.mark.parametrize("case", ["nuswide", "nuswide csv"])
def test_nuswide_agrees_with_coco(shared: Path, read: Reader, case: str) -> None:
    coco, nuswide = (labels_of(*parts(read(name, "path"))) for name in ("coco", case))
    source = sources(shared / "data/nuswide_mini/sources.csv", "nus_file")
    assert set(nuswide) == set(source)
    for image_id, labels in nuswide.items():
        assert labels == {label for name in coco[source[image_id]] for label in NUS_NAMES.get(name, "").split()}


def test_both_forms_of_nuswide_agree(read: Reader) -> None:
    official, from_csv = (labels_of(*parts(read(case, "path"))) for case in ("nuswide", "nuswide csv"))
    assert official == from_csv
    assert read("nuswide csv", "path").held_out.source == "nus_wid_data.csv val"


def write_with_removable_image(case: str, folder: Path) -> tuple[Path, str]:
    """Write a small data set of two splits; return its second train image, to be deleted, and the reader's name."""
    if case == "coco":
        make_coco(folder, {"train": [[0], [1], [2]], "val": [[0]]})
        return folder / "train2014/train_001.jpg", "coco"
    if case == "voc":
        lists = folder / "VOC2007/ImageSets/Main"
        lists.mkdir(parents=True)
        for split, ids in (("trainval", "abc"), ("test", "d")):
            for label in LABEL_NAMES["voc"]:
                (lists / f"{label}_{split}.txt").write_text("".join(f"{image_id} 1\n" for image_id in ids))
            for image_id in ids:
                make_photo(folder / f"VOC2007/JPEGImages/{image_id}.jpg")
        return folder / "VOC2007/JPEGImages/b.jpg", "voc"
    rows = [("x/a.jpg", "train"), ("y/b.jpg", "train"), ("x/c.jpg", "train"), ("x/d.jpg", "val")]
    for name, _ in rows:
        make_photo(folder / "Flickr" / name)
    if case == "nuswide csv":
        lines = [f"Flickr/{name},['sky'],{split}" for name, split in rows]
        (folder / "nus_wid_data.csv").write_text("\n".join(["filepath,label,split_name", *lines]))
    else:
        (folder / "ImageList").mkdir()
        (folder / "Groundtruth/TrainTestLabels").mkdir(parents=True)
        for split, in_csv in (("Train", "train"), ("Test", "val")):
            names = [name for name, csv_split in rows if csv_split == in_csv]
            (folder / f"ImageList/{split}Imagelist.txt").write_text("\n".join(names))
            (folder / f"Groundtruth/TrainTestLabels/Labels_sky_{split}.txt").write_text("1\n" * len(names))
    return folder / "Flickr/y/b.jpg", "nuswide"


@pytest.mark.parametrize("case", ["coco", "voc", "nuswide", "nuswide csv"])
def test_missing_images_are_refused_or_skipped(tmp_path: Path, case: str) -> None:
    path, dataset = write_with_removable_image(case, tmp_path / "set")
    settings = DataSettings.model_validate({"dataset": dataset, "root": str(tmp_path / "set")})
    assert len(READERS[settings.dataset](settings).train) == 3
    path.unlink()
    with pytest.raises(UserError, match=r"1 of its \d images are missing .*--data\.missing-images skip") as error:
        READERS[settings.dataset](settings)
    assert path.name in str(error.value)
    settings = settings.model_copy(update={"missing_images": "skip"})
    train = READERS[settings.dataset](settings).train
    assert len(train) == 2
    assert all(Path(uri).is_file() for uri in train.table["uri"].to_pylist())
    assert any("1 of 3 listed images are missing and left out" in note for note in train.notes)


def test_skipping_every_image_is_an_error(tmp_path: Path) -> None:
    path, dataset = write_with_removable_image("coco", tmp_path)
    for photo in path.parent.iterdir():
        photo.unlink()
    settings = DataSettings.model_validate({"dataset": dataset, "root": str(tmp_path), "missing_images": "skip"})
    with pytest.raises(
        UserError, match=r"3 of its 3 images .* finish the download or unpacking, or correct the paths$"
    ):
        READERS["coco"](settings)


@pytest.fixture
def refused() -> Callable[[str], dict[str, str]]:
    """Return the error message of each reader for a bad root; in parallel, since connections are retried."""

    def message(dataset: Dataset, root: str) -> str:
        with pytest.raises(UserError) as error:
            READERS[dataset](DataSettings(dataset=dataset, root=root))
        return str(error.value)

    def messages(root: str) -> dict[str, str]:
        names = [name for name in READERS if name != "scenes"]
        roots = [f"{root.replace('?', '/labels.csv?')}" if name == "manifest" else root for name in names]
        with ThreadPoolExecutor(len(names)) as pool:
            return dict(zip(names, pool.map(message, names, roots), strict=True))

    return messages


def test_unreachable_bucket_is_refused(s3_keys: None, refused: Callable[[str], dict[str, str]]) -> None:
    messages = refused("s3://bucket/a?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    assert set(messages) == set(READERS) - {"scenes"}
    for dataset, message in messages.items():
        assert re.search(r"s3://bucket/a.*cannot be reached", message), (dataset, message)
        assert "\n" not in message


def test_missing_bucket_is_refused(s3_bucket: Location, refused: Callable[[str], dict[str, str]]) -> None:
    for dataset, message in refused(str(s3_bucket).replace("fixtures", "nowhere/a")).items():
        wanted = r"no such file; give the manifest" if dataset == "manifest" else r"give the folder"
        assert re.search(rf"s3://nowhere/a.*{wanted}", message), (dataset, message)
        assert "\n" not in message


@pytest.mark.parametrize(("dataset", "inner"), [("coco", "annotations"), ("coco", "val2014"), ("apparel", "red_dress")])
@pytest.mark.parametrize("kind", ["file", "memory", "s3"])
def test_wrong_level_of_a_uri_gets_a_suggestion(
    tmp_path: Path, request: pytest.FixtureRequest, dataset: str, inner: str, kind: str
) -> None:
    root = {"file": f"file://{tmp_path}/set", "memory": f"memory://{tmp_path.name}"}.get(kind)
    place = Location.of(root or str(request.getfixturevalue("s3_bucket") / tmp_path.name))
    photo = make_photo(tmp_path / "a.jpg").read_bytes()
    content = {"images": [], "categories": [], "annotations": []}
    files = {
        "coco": {"annotations/instances_train2014.json": json.dumps(content).encode(), "val2014/a.jpg": photo},
        "apparel": {"red_dress/a.jpg": photo},
    }[dataset]
    for name, data in files.items():
        filesystem, path = filesystem_of(str(place / name))
        filesystem.create_dir(path.rpartition("/")[0])
        with filesystem.open_output_stream(path) as file:
            file.write(data)
    settings = DataSettings.model_validate({"dataset": dataset, "root": str(place / inner)})
    with pytest.raises(UserError) as error:
        READERS[settings.dataset](settings)
    assert f"did you mean {place}?" in str(error.value)
