"""Fixtures of the doctor's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from msrn_ray.ray_data import inspect_images as inspection
from tests.doctor.coco_set import HELD_OUT, TRAIN, inspect_in_tens
from tests.tiny import make_coco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound data set: 23 train, 4 val, 4 test images, 3 labels."""
    return make_coco(tmp_path / "set", {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT})


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "connect", lambda settings: None)
    monkeypatch.setattr(inspection, "inspect_images", inspect_in_tens)
