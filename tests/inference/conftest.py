"""Fixtures of the tests of predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from msrn_ray.inference.predictor import Predictor
from tests.tiny import make_photo, make_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.from_checkpoint(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("photos")
    return [make_photo(place / f"{seed}.{'png' if seed % 2 else 'jpg'}", seed) for seed in range(7)]
