"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from msrn_ray.io.storage import Location

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small networks run much faster on one thread than on threads that wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of test material beside the project: photographs, weights, golden numbers."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' with test photographs and golden numbers is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def s3_keys() -> Iterator[None]:
    """Set keys for the S3 server on this machine: pyarrow needs some."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield


@pytest.fixture(scope="session")
def s3_bucket(s3_keys: None) -> Iterator[Location]:
    """Yield an empty bucket of an S3 server on this machine."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    options = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
    pafs.S3FileSystem(**options, allow_bucket_creation=True).create_dir("fixtures")
    yield Location.of(f"s3://fixtures?{'&'.join(f'{name}={value}' for name, value in options.items())}")
    running.stop()


@pytest.fixture(scope="session")
def local_ray(s3_keys: None) -> Iterator[None]:
    """Start a Ray cluster on this machine for all tests that need one, with enough logical CPUs for three workers."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()
