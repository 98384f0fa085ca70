"""The private parts of Ray that this project uses. No other file may name one.

Each entry says why we need it and which public way we tried. tests/ray_cluster/test_private_api.py fails with the name of a part that
Ray changes; pyproject.toml therefore bounds Ray from above. A part is imported when it is first used: some processes, like Ray's
autoscaler and the controllers of Ray Train and Tune, must start without the others.

One private name is a parameter, so it stands where it is used: `connect` passes `_node_ip_address` to `ray.init`. Without it Ray listens on
the machine's outer address. Ray has no public parameter for it.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.autoscaler._private.node_provider_availability_tracker import (
        NodeAvailabilitySummary as NodeAvailabilitySummary,
    )
    from ray.data._internal.execution.execution_callback import ExecutionCallback as ExecutionCallback

# Name that this module exports -> module of Ray, or module:attribute
PRIVATE_NAMES = {
    # `msrn cluster check` reports what `ray up` would refuse. `ray.autoscaler.sdk.fillout_defaults` leaves out the steps for
    # provider local and for set-up commands. Nothing public validates a file: the rest of the SDK starts or stops nodes.
    "prepare_config": "ray.autoscaler._private.util:prepare_config",
    "validate_config": "ray.autoscaler._private.util:validate_config",
    # `spot_scorer` only breaks the ties that Ray's own score leaves. Ray offers the environment variable for another score
    # (RAY_AUTOSCALER_UTILIZATION_SCORER), but neither its own score nor its argument's type as a public name.
    "default_utilization_scorer": "ray.autoscaler._private.resource_demand_scheduler:_default_utilization_scorer",
    "NodeAvailabilitySummary": "ray.autoscaler._private.node_provider_availability_tracker:NodeAvailabilitySummary",
    # Ray Data's scheduling loop must not spin while training is the slower side. No field of DataContext or ExecutionOptions sets its
    # pace; the field `custom_execution_callback_classes` expects subclasses of this class.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback:ExecutionCallback",
    # Ray Data's statistics actor must lie on the driver's node. Executing a data set of one row from the driver creates it too, but costs
    # 0.6 s instead of 0.06 s, prints two lines, and would fail silently if Ray created the actor elsewhere.
    "get_or_create_stats_actor": "ray.data._internal.stats:get_or_create_stats_actor",
    # A run without room for its workers must say so, with their number. The public ControllerError only wraps this error; nothing else
    # tells it from other errors of the controller.
    "WorkerGroupStartupTimeoutError": "ray.train.v2._internal.exceptions:WorkerGroupStartupTimeoutError",
    # `max_cluster_resources`, `request_drain` and `ObjectStoreReader` below say why they need these.
    "global_state": "ray._private.state:state",
    "global_worker": "ray._private.worker:global_worker",
    "autoscaler_pb2": "ray.core.generated.autoscaler_pb2",
    "init_grpc_channel": "ray._private.grpc_utils:init_grpc_channel",
    "node_manager_pb2": "ray.core.generated.node_manager_pb2",
    "node_manager_pb2_grpc": "ray.core.generated.node_manager_pb2_grpc",
    # For tests alone: what Ray itself does with our cluster files, its packaging of a job's folder, and its error for a lost
    # worker. Ray offers none of them in public.
    "NodeProviderAvailabilityTracker": (
        "ray.autoscaler._private.node_provider_availability_tracker:NodeProviderAvailabilityTracker"
    ),
    "WorkerHealthCheckFailedError": "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
    "create_package": "ray._private.runtime_env.packaging:create_package",
    "get_nodes_for": "ray.autoscaler._private.resource_demand_scheduler:get_nodes_for",
    "load_function_or_class": "ray.autoscaler._private.loader:load_function_or_class",
}


def __getattr__(name: str) -> Any:
    """Import a private part of Ray at its first use."""
    if name not in PRIVATE_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def _load(name: str) -> Any:
    return resolve_name(PRIVATE_NAMES[name])


def max_cluster_resources() -> dict[str, int] | None:
    """Return the resources of the cluster at its largest, or None if no autoscaler has reported them.

    `ray.cluster_resources()` counts only the nodes that are up. No public call returns the limits that, for example, KubeRay reports.
    """
    resources: dict[str, int] | None = _load("global_state").get_max_resources_from_cluster_config()
    return resources


def request_drain(node_id: str, reason: str) -> tuple[bool, str]:
    """Ask Ray to start nothing new on a node. What runs there continues, without a deadline.

    Ray Train treats the request as a preemption, so runs save a checkpoint. The command `ray drain-node` does the same in 2.2 s instead
    of 1 ms: meanwhile Ray Train may start a worker on the node. Ray's API promises do not cover that command either.

    Returns:
        Whether Ray accepts, and why not.
    """
    preemption = _load("autoscaler_pb2").DRAIN_NODE_REASON_PREEMPTION
    no_deadline = 0
    accepted, refusal = _load("global_worker").gcs_client.drain_node(node_id, preemption, reason, no_deadline)
    return bool(accepted), str(refusal)


class ObjectStoreReader:
    """Reads how many bytes the object stores of all nodes hold and have spilled.

    One read is one gRPC call of 1 to 2 ms. Ray's Prometheus metrics are up to 10 s old, so they would miss a peak of one second; the
    state API lists objects one by one.

    Args:
        address: host and port of any node's raylet.
    """

    def __init__(self, address: str) -> None:
        self._request = _load("node_manager_pb2").FormatGlobalMemoryInfoRequest(include_memory_info=False)
        self._channel = _load("init_grpc_channel")(address)
        self._service = _load("node_manager_pb2_grpc").NodeManagerServiceStub(self._channel)

    def read(self, timeout: float) -> tuple[int, int]:
        """Return the bytes in use, and the bytes spilled to disk since the cluster started.

        Args:
            timeout: seconds.

        Raises:
            OSError: if a node does not answer.
        """
        import grpc

        try:
            stats = self._service.FormatGlobalMemoryInfo(self._request, timeout=timeout).store_stats
        except grpc.RpcError as error:
            raise OSError(f"Ray does not report its object stores: {error}") from None
        return int(stats.object_store_bytes_used), int(stats.spilled_bytes_total)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()
