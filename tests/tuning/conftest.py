"""Fixtures that the tests of the search share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Storage of a study."""
    return f"sqlite:///{tmp_path}/study.db"
