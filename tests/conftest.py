"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks as small as the tests' are much slower when threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test material beside the project: photographs, weights, golden numbers."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' with test photographs and golden numbers is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray cluster on this machine for all tests that need one; logical CPUs enough for three workers."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()
