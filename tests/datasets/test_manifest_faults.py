"""Every fault of a manifest gives a message of one line."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msrn_ray.datasets.manifest import NamedColumns, read_manifest
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from tests.datasets.manifest_files import (
    make,
    write_parquet,
)


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
        ("image,labels\na.jpg,dog\nb.jpg,dog\na.jpg,cat\n", r"'a\.jpg' in column 'image' is in rows 1 and 3 \(.* rows: 1\); write one row"),
        ("image,labels,id\na.jpg,dog,1\nb.jpg,dog,1\n", r"'1' in column 'id' is in rows 1 and 2"),
        ("image,labels,split\na.jpg,dog,train\nb.jpg,dog,tset\n", r"row 2: 'tset' in column 'split' is none of train, training, val"),
        ("image,labels,split\na.jpg,dog,train\nb.jpg,dog,\n", r"row 2: column 'split' is empty; fill it in"),
        ("image,labels\na.jpg,;\nb.jpg,\n", r"no row has a label in column 'labels'; name the column"),
        ('image,labels\na.jpg,"dog;cat,x"\n', r"holds ';' and ','; choose the separator of the labels \(--data\.label-separator ';'\)"),
        ("image,labels\na.jpg,\"['dog'\"\n", r"row 1: \"\['dog'\" is not a JSON list of labels; write it as \[\"dog\", \"person\"\]"),
        ('image,labels\na.jpg,"[""dog""]"\nb.jpg,[x\n', r"row 2: '\[x' is not a JSON list"),
        ('image,labels\na.jpg,"[""dog""]"\nb.jpg,cat\n', r"row 2: 'cat' in column 'labels' is no JSON list, but other rows hold one"),
        ('image,labels\na.jpg,"[""dog""]"\nb.jpg,[1]\n', r"its JSON lists hold values of different types; write each label as a text"),
        ('image,labels\na.jpg,"[""a""]} {""labels"":[""b""]"\n', r"row 1: .* is not a JSON list"),
        ("image,labels\na.jpg,[1.5]\n", r"column 'labels' holds double, but text is needed"),
        ("image,dog\na.jpg,1\nb.jpg,maybe\n", r"row 2: 'maybe' in column 'dog' is not 1, 0, -1 or empty; correct it, or say what"),
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
        ("labels.xlsx", b"PK", r"is a spreadsheet; save the sheet as .CSV UTF-8., then give a file that ends in \.csv, \.tsv"),
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
        read_manifest(place, named=NamedColumns(image="photo"))


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
