"""Locations: local paths and URIs are joined, listed and read alike."""

from __future__ import annotations

import time
from pathlib import Path

import fsspec
import pytest

from msrn_ray.errors import UserError
from msrn_ray.storage import Location, filesystem_of, read_bytes


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A folder of three files, one of them hidden, behind each kind of file system."""
    base = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]
    for name in ("a.txt", "inner/b c.txt", ".hidden"):
        with fsspec.open(f"{base}/{name}", "wb", auto_mkdir=True) as file:
            file.write(name.encode())
    return Location.of(base)


def test_reading(folder: Location) -> None:
    assert (folder / "a.txt").read_bytes() == b"a.txt"
    assert read_bytes(str(folder / "inner" / "b c.txt")) == b"inner/b c.txt"
    for missing in ("none.txt", "inner"):
        with pytest.raises(OSError, match=missing):
            read_bytes(str(folder / missing))


def test_what_is_there(folder: Location) -> None:
    assert (folder.is_dir(), folder.is_file()) == (True, False)
    assert ((folder / "a.txt").is_dir(), (folder / "a.txt").is_file()) == (False, True)
    assert ((folder / "none").is_dir(), (folder / "none").is_file()) == (False, False)
    assert folder.names() == ["a.txt", "inner/"]
    assert [name for name in folder.names(recursive=True) if name[-1] != "/"] == ["a.txt", "inner/b c.txt"]
    with pytest.raises(UserError, match="none: cannot be reached"):
        (folder / "none").names()


def test_parts() -> None:
    place = Location.of("s3://bucket/data/?endpoint_override=localhost:9000&scheme=http")
    inner = place / "train" / "a.jpg"
    assert str(inner) == "s3://bucket/data/train/a.jpg?endpoint_override=localhost:9000&scheme=http"
    assert (inner.name, inner.parent, inner.is_local) == ("a.jpg", place / "train", False)
    local = Location.of(Path("data"))
    assert str(local / "a?b.jpg") == f"{Path.cwd()}/data/a?b.jpg"
    assert (local / "a?b.jpg").name == "a?b.jpg"
    assert local.parent == Location.of(Path.cwd())
    assert local.is_local


def test_names_that_a_uri_cannot_hold() -> None:
    with pytest.raises(
        UserError, match=r"memory://x: the name 'a\?\.jpg' has a '\?', which ends the path of a URI; rename it"
    ):
        Location.of("memory://x") / "a?.jpg"


def test_a_missing_folder_may_count_as_empty(folder: Location) -> None:
    assert (folder / "none").names(missing_ok=True) == []


def test_a_public_bucket_of_google() -> None:
    assert filesystem_of("gs://anonymous@bucket/a/b.jpg")[1] == "bucket/a/b.jpg"


def test_a_uri_of_no_kind() -> None:
    with pytest.raises(UserError, match=r"zzz://place: neither pyarrow nor fsspec"):
        Location.of("zzz://place/a").is_dir()
    with pytest.raises(OSError, match="neither pyarrow nor fsspec"):
        read_bytes("zzz://place/a.jpg")


def test_s3_options_are_checked() -> None:
    with pytest.raises(UserError, match="unknown options zone; allowed: region, scheme"):
        Location.of("s3://bucket/a?zone=3").is_dir()


@pytest.mark.parametrize("place", ["s3://bucket/a?region=us-east-1&", "gs://anonymous@bucket/a?"])
def test_a_bucket_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr("msrn_ray.storage._REQUEST_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"bucket/a.*cannot be reached .*[Cc]ould not connect to server"):
        Location.of(f"{place}endpoint_override=127.0.0.1:9&scheme=http").is_dir()
    assert time.monotonic() - start < 60, "an error, not a hang"
