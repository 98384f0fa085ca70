"""Locations: local paths and URIs are joined, listed, read and written in the same way."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msrn_ray.errors import UserError
from msrn_ray.io.byte_ranges import parquet_uris, range_uris, read_bytes
from msrn_ray.io.storage import Location, filesystem_of


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Return a folder of three files, one of them hidden, behind each kind of file system."""
    base = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]
    for name in ("a.txt", "inner/b c.txt", ".hidden"):
        with fsspec.open(f"{base}/{name}", "wb", auto_mkdir=True) as file:
            file.write(name.encode())
    return Location.of(base)


def test_read_bytes(folder: Location) -> None:
    assert (folder / "a.txt").read_bytes() == b"a.txt"
    assert read_bytes(str(folder / "inner" / "b c.txt")) == b"inner/b c.txt"
    for missing in ("none.txt", "inner"):
        with pytest.raises(OSError, match=missing):
            read_bytes(str(folder / missing))


def test_read_byte_range_of_a_file(folder: Location) -> None:
    inner = folder / "inner" / "b c.txt"  # its content is "inner/b c.txt"
    whole = b"inner/b c.txt"
    inside = ((0, 13), (0, 1), (6, 3), (12, 1), (3, 0))
    parts = [read_bytes(uri) for uri in range_uris(inner, *zip(*inside, strict=True)).to_pylist()]
    assert parts == [whole[offset : offset + length] for offset, length in inside]
    for uri in range_uris(inner, [0, 12, 13, 99], [14, 2, 1, 1]).to_pylist():
        with pytest.raises(OSError, match=r"b c\.txt: ends within the"):
            read_bytes(uri)
    with pytest.raises(OSError, match="none"):
        read_bytes(range_uris(folder / "none.txt", [0], [1])[0].as_py())
    assert range_uris(Location.of("s3://b/a.tar?region=x"), [], []).to_pylist() == []
    assert range_uris(Location.of("s3://b/a.tar?region=x"), [5], [7]).to_pylist() == ["s3://b/a.tar?region=x#bytes=5+7"]


def test_byte_ranges_of_several_files() -> None:
    index = pa.table({"file": ["/a", "/b"], "offset": [1, 2], "length": [3, 4]})
    uris = range_uris(index["file"], index["offset"], index["length"])
    assert uris.to_pylist() == ["/a#bytes=1+3", "/b#bytes=2+4"]


def test_fragment_mark_in_a_file_name_is_kept(tmp_path: Path) -> None:
    for name in ("a#b.jpg", "a#bytes=1.jpg", "a#bytes=1+2.jpg"):
        (tmp_path / name).write_bytes(b"whole")
        assert read_bytes(str(tmp_path / name)) == b"whole"
        assert read_bytes(range_uris(Location.of(tmp_path / name), [1], [2])[0].as_py()) == b"ho"


def test_read_value_of_a_parquet_file(folder: Location) -> None:
    images = [{"bytes": b"one", "path": "a"}, {"bytes": b"two", "path": "b"}, {"bytes": b"three", "path": "c"}, {}]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": images, "plain": [b"x", b"y", b"z", None]}), sink, row_group_size=2)
    place = folder / "rows.parquet"
    place.write_bytes(sink.getvalue())
    first, second = (parquet_uris(place, group, 2, "image.bytes").to_pylist() for group in (0, 1))
    assert [read_bytes(uri) for uri in (*first, second[0])] == [b"one", b"two", b"three"]
    present, empty = parquet_uris(place, 1, 2, "plain").to_pylist()
    assert read_bytes(present) == b"z"
    with pytest.raises(OSError, match=r"parquet=1,1,plain: holds no bytes"):
        read_bytes(empty)


def test_write_creates_folders_replaces_and_cleans_up(folder: Location) -> None:
    place = folder / "new" / "deep" / "file.bin"
    for content in (b"first", b"second, longer", b""):
        place.write_bytes(content)
        assert place.read_bytes() == content
    assert place.parent.sizes() == {"file.bin": 0}
    assert folder.sizes() == {"a.txt": 5}
    assert (folder / "none").sizes() == {}
    assert [name for name in folder.names(recursive=True) if "file" in name] == ["new/deep/file.bin"]


def test_remove(folder: Location) -> None:
    (folder / "a.txt").remove()
    (folder / "none.txt").remove()
    assert folder.names() == ["inner/"]


def test_failed_write_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "below", Path("/proc/none/file")):
        with pytest.raises(UserError, match="cannot be written"):
            Location.of(place).write_bytes(b"x")


def test_list_files_and_folders(folder: Location) -> None:
    assert (folder.is_dir(), folder.is_file()) == (True, False)
    assert ((folder / "a.txt").is_dir(), (folder / "a.txt").is_file()) == (False, True)
    assert ((folder / "none").is_dir(), (folder / "none").is_file()) == (False, False)
    assert folder.names() == ["a.txt", "inner/"]
    assert [name for name in folder.names(recursive=True) if name[-1] != "/"] == ["a.txt", "inner/b c.txt"]
    with pytest.raises(UserError, match="none: cannot be reached"):
        (folder / "none").names()


def test_join_name_and_parent() -> None:
    place = Location.of("s3://bucket/data/?endpoint_override=localhost:9000&scheme=http")
    inner = place / "train" / "a.jpg"
    assert str(inner) == "s3://bucket/data/train/a.jpg?endpoint_override=localhost:9000&scheme=http"
    assert (inner.name, inner.parent, inner.is_local) == ("a.jpg", place / "train", False)
    local = Location.of(Path("data"))
    assert str(local / "a?b.jpg") == f"{Path.cwd()}/data/a?b.jpg"
    assert (local / "a?b.jpg").name == "a?b.jpg"
    assert local.parent == Location.of(Path.cwd())
    assert local.is_local


def test_question_mark_in_a_uri_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"memory://x: the name 'a\?\.jpg' has a '\?', which ends the path of a URI; rename it"
    ):
        Location.of("memory://x") / "a?.jpg"


def test_missing_folder_may_count_as_empty(folder: Location) -> None:
    assert (folder / "none").names(missing_ok=True) == []


def test_public_google_bucket() -> None:
    assert filesystem_of("gs://anonymous@bucket/a/b.jpg")[1] == "bucket/a/b.jpg"


def test_unknown_scheme_is_an_error() -> None:
    with pytest.raises(UserError, match=r"zzz://place: neither pyarrow nor fsspec"):
        Location.of("zzz://place/a").is_dir()
    with pytest.raises(OSError, match="neither pyarrow nor fsspec"):
        read_bytes("zzz://place/a.jpg")


def test_unknown_s3_option_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown options zone; allowed: region, scheme"):
        Location.of("s3://bucket/a?zone=3").is_dir()


@pytest.mark.parametrize("place", ["s3://bucket/a?region=us-east-1&", "gs://anonymous@bucket/a?"])
def test_silent_bucket_is_an_error_soon(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr("msrn_ray.io.filesystems._REQUEST_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"bucket/a.*cannot be reached .*[Cc]ould not connect to server"):
        Location.of(f"{place}endpoint_override=127.0.0.1:9&scheme=http").is_dir()
    assert time.monotonic() - start < 60, "an error, not a hang"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a web server with a file; everything under /closed answers 403."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/closed"):
                self.send_error(403)
            else:
                super().do_GET()

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "set").mkdir()
    (tmp_path / "set/a b.jpg").write_bytes(b"0123456789")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_read_over_http(web: str) -> None:
    place = Location.of(f"{web}/set") / "a%20b.jpg"
    assert read_bytes(str(place)) == b"0123456789"
    assert place.is_file()
    assert read_bytes(f"{web}/set/a%20b.jpg?token=1") == b"0123456789", "the options of an address are the server's"
    for missing, error in (("set/none.jpg", FileNotFoundError), ("closed/a.jpg", OSError)):
        with pytest.raises(error):
            read_bytes(f"{web}/{missing}")
    with pytest.raises(UserError, match="closed: cannot be reached"):
        Location.of(f"{web}/closed").names()


def test_unreachable_web_server_is_an_os_error() -> None:
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        read_bytes("http://127.0.0.1:9/a.jpg")


def test_fsspec_decides_what_the_path_is() -> None:
    class Odd(fsspec.implementations.memory.MemoryFileSystem):
        protocol = "odd"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/at" + path.removeprefix("odd:/")

    fsspec.register_implementation("odd", Odd)
    assert filesystem_of("odd://host/a/b.jpg")[1] == "/at/host/a/b.jpg"
