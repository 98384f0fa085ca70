"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test material beside the project: photographs, weights, golden numbers."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' with test photographs and golden numbers is not beside the project")
    return SHARED
