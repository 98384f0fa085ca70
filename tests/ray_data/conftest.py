"""Fixtures of the tests of prepared data."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from msrn_ray.io.storage import Location
from msrn_ray.ray_data.prepare import prepare
from tests.tiny import make_coco

from .prepared_example import ROWS, raw_settings


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 train images, one without a label, and 3 val images, in COCO's layout."""
    return make_coco(tmp_path_factory.mktemp("raw") / "set", ROWS)


@pytest.fixture(scope="module")
def ready(local_ray: None, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, prepared in shards of two images."""
    out = tmp_path_factory.mktemp("ready") / "out"
    prepare(raw_settings(raw), Location.of(out), rows_per_shard=2, console=Console(file=io.StringIO()))
    return out


@pytest.fixture
def copy(ready: Path, tmp_path: Path) -> Path:
    """A copy of `ready` that a test may damage."""
    return Path(shutil.copytree(ready, tmp_path / "copy"))
