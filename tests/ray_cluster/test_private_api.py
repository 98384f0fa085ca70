"""The contract with the private parts of Ray. Each test fails with the name of the part that Ray changed."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import jsonschema
import pytest
import ray.data

from msrn_ray.ray_cluster import private_api
from msrn_ray.ray_cluster.private_api import PRIVATE_NAMES, ObjectStoreReader, max_cluster_resources, request_drain

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = re.compile(
    r"\bray(\.\w+)*\.(_(?!_)\w+|core\.generated)"  # ray.x._y, also as text
    r"|from ray[\w.]* import [^\n]*\b(_(?!_)\w+|generated)\b"
)


@contextmanager
def contract(name: str) -> Iterator[None]:
    """Fail with the name of a private part if Ray no longer works as the block expects."""
    try:
        yield
    except Exception as error:
        place = PRIVATE_NAMES.get(name, name)
        pytest.fail(f"Ray changed {place}; see ray_cluster/private_api.py ({type(error).__name__}: {error})")


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_part_exists(name: str) -> None:
    with contract(name):
        assert getattr(private_api, name) is not None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("prepare_config", ["config"]),
        ("validate_config", ["config"]),
        (
            "default_utilization_scorer",
            ["node_resources", "resources", "node_type", "node_availability_summary"],
        ),
        ("get_or_create_stats_actor", []),
        ("WorkerGroupStartupTimeoutError", ["num_workers"]),
        ("WorkerHealthCheckFailedError", ["message", "failure"]),
        ("load_function_or_class", ["path"]),
        (
            "get_nodes_for",
            [
                *("node_types", "existing_nodes", "head_node_type", "max_to_add", "resources", "utilization_scorer"),
                "strict_spread",
            ],
        ),
        (
            "create_package",
            ["module_path", "target_path", "include_gitignore", "include_parent_dir", "excludes", "logger"],
        ),
    ],
)
def test_signature(name: str, parameters: list[str]) -> None:
    with contract(name):
        assert list(inspect.signature(getattr(private_api, name)).parameters) == parameters


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="private_api' has no attribute 'nonsense'"):
        _ = private_api.nonsense


def test_import_does_not_load_ray() -> None:
    code = "import sys, msrn_ray.ray_cluster.private_api; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_ray_init_takes_the_node_address() -> None:
    with contract("ray.init(_node_ip_address=...)"):
        assert '"_node_ip_address"' in inspect.getsource(ray.init)


def test_ray_fills_in_and_validates_a_cluster_file() -> None:
    content = {
        "cluster_name": "c",
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]},
        "auth": {"ssh_user": "me"},
    }
    with contract("prepare_config"):
        config = private_api.prepare_config(content)
        assert config["head_node_type"] in config["available_node_types"]
        assert {"setup_commands", "head_start_ray_commands", "worker_start_ray_commands"} <= set(config)
    with contract("validate_config"):
        private_api.validate_config(config)
        with pytest.raises(jsonschema.ValidationError, match="nonsense"):
            private_api.validate_config(config | {"nonsense": 1})


def test_ray_scores_a_node_type_by_what_fits() -> None:
    with contract("NodeAvailabilitySummary"):
        summary = private_api.NodeAvailabilitySummary(node_availabilities={})
    with contract("default_utilization_scorer"):
        score = private_api.default_utilization_scorer
        assert score({"CPU": 4}, [{"GPU": 1}], "small", node_availability_summary=summary) is None
        exact = score({"CPU": 4}, [{"CPU": 4}], "exact", node_availability_summary=summary)
        assert exact > score({"CPU": 8}, [{"CPU": 4}], "large", node_availability_summary=summary)


def test_ray_remembers_which_node_type_was_refused() -> None:
    with contract("NodeProviderAvailabilityTracker"):
        tracker = private_api.NodeProviderAvailabilityTracker()
        tracker.update_node_availability("given", 2**32, None)
        availabilities = tracker.summary().node_availabilities
        assert availabilities["given"].is_available is True
        assert availabilities.get("unknown") is None


def test_ray_data_takes_execution_callbacks() -> None:
    with contract("ExecutionCallback"):
        assert list(inspect.signature(private_api.ExecutionCallback.on_execution_step).parameters) == [
            "self",
            "executor",
        ]
        assert isinstance(ray.data.DataContext.get_current().custom_execution_callback_classes, list)


def test_startup_timeout_keeps_its_workers_when_pickled() -> None:
    with contract("WorkerGroupStartupTimeoutError"):
        error = pickle.loads(pickle.dumps(private_api.WorkerGroupStartupTimeoutError(3)))
        assert error.num_workers == 3


def test_largest_cluster_is_what_the_autoscaler_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    with contract("global_state"):
        config = private_api.autoscaler_pb2.ClusterConfig()
        config.node_group_configs.add(resources={"CPU": 16, "GPU": 1}, max_count=4)
        monkeypatch.setattr(private_api.global_state, "get_cluster_config", lambda: config)
        assert max_cluster_resources() == {"CPU": 64, "GPU": 4}
        monkeypatch.setattr(private_api.global_state, "get_cluster_config", lambda: None)
        assert max_cluster_resources() is None


def test_drain_is_a_preemption_without_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[Any, ...]] = []
    client = SimpleNamespace(drain_node=lambda *request: requests.append(request) or (False, "busy"))
    monkeypatch.setattr(private_api.global_worker, "gcs_client", client, raising=False)
    assert request_drain("node", "the disk is full") == (False, "busy")
    with contract("autoscaler_pb2"):
        assert private_api.autoscaler_pb2.DrainNodeReason.Name(requests[0][1]) == "DRAIN_NODE_REASON_PREEMPTION"
    assert requests[0][0::2] == ("node", "the disk is full")
    assert requests[0][3] == 0


@pytest.fixture
def raylet(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a stand-in for a raylet whose stores hold 5 bytes and have spilled 7."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with contract("node_manager_pb2_grpc"):
        messages, services = private_api.node_manager_pb2, private_api.node_manager_pb2_grpc

        class Raylet(services.NodeManagerServiceServicer):  # type: ignore[misc, name-defined]
            def FormatGlobalMemoryInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
                assert not request.include_memory_info
                reply = messages.FormatGlobalMemoryInfoReply()
                reply.store_stats.object_store_bytes_used = 5
                reply.store_stats.spilled_bytes_total = 7
                return reply

        server = grpc.server(ThreadPoolExecutor(1))
        services.add_NodeManagerServiceServicer_to_server(Raylet(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_object_store_reader_reads_used_and_spilled_bytes(raylet: str) -> None:
    with contract("init_grpc_channel"):
        reader = ObjectStoreReader(raylet)
    with contract("node_manager_pb2"):
        assert reader.read(timeout=10) == (5, 7)
    reader.close()


def test_object_store_reader_raises_when_no_node_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reader = ObjectStoreReader("127.0.0.1:1")
    with pytest.raises(OSError, match="object stores"):
        reader.read(timeout=1)
    reader.close()


@pytest.mark.ray
def test_parts_work_on_a_running_cluster(local_ray: None) -> None:
    with contract("get_or_create_stats_actor"):
        assert private_api.get_or_create_stats_actor() == private_api.get_or_create_stats_actor()
    with contract("global_state"):
        assert max_cluster_resources() is None
    with contract("global_worker"):
        assert request_drain("f" * 56, "no such node") == (True, "")
    (node,) = ray.nodes()
    with contract("node_manager_pb2"):
        reader = ObjectStoreReader(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        assert [value >= 0 for value in reader.read(timeout=10)] == [True, True]
        reader.close()


def test_no_other_file_names_a_private_part() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for package in ("msrn_ray", "tuning", "tests")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name not in ("private_api.py", Path(__file__).name)
        for match in PRIVATE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("import ray._private.state", True),
        ("from ray.data._internal.stats import x", True),
        ("from ray.core.generated import x_pb2", True),
        ("from ray import _private", True),
        ("monkeypatch.setattr('ray.train._internal.storage.x', 1)", True),
        ("from ray.train import ControllerError", False),
        ("ray.__version__", False),
        ("msrn_ray._common", False),
    ],
)
def test_private_names_are_recognized(line: str, private: bool) -> None:
    assert bool(PRIVATE.search(line)) == private
