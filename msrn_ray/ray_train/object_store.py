"""Samples how many bytes Ray's object stores hold and spill."""

from __future__ import annotations

import threading
from typing import Any

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

from .heartbeat import _own_node

_STORE_SECONDS = 1.0  # between two looks at the object store; a block stays there for longer


class StoreMeter:
    """Watches, from a thread, what the object stores of all nodes hold; use as a context.

    Ray keeps no peak, so the bytes in use are read once a second (one call to a node, 1 to 2 ms); what was spilled is a counter.
    """

    def __init__(self, seconds: float = _STORE_SECONDS) -> None:
        node = _own_node()
        self._channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        self._stub = node_manager_pb2_grpc.NodeManagerServiceStub(self._channel)
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-meter", daemon=True)
        self._peak = 0
        self._spilled: list[int] = []  # at the first and the last look

    def __enter__(self) -> StoreMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at one of the looks so far."""
        return self._peak

    @property
    def spilled_bytes(self) -> int:
        """Bytes written to disk since this meter was made, because the stores were full."""
        return self._spilled[-1] - self._spilled[0] if self._spilled else 0

    def _read(self) -> tuple[int, int]:
        messages: Any = node_manager_pb2
        request = messages.FormatGlobalMemoryInfoRequest(include_memory_info=False)
        stats = self._stub.FormatGlobalMemoryInfo(request, timeout=_STORE_SECONDS * 10).store_stats
        return int(stats.object_store_bytes_used), int(stats.spilled_bytes_total)

    def _run(self) -> None:
        while True:
            try:
                used, spilled = self._read()
                self._peak = max(self._peak, used)
                self._spilled = [*self._spilled[:1], spilled]
            except grpc.RpcError:
                pass  # a node is being lost; the run goes on or ends by other means, and the next look counts again
            if self._stop.wait(self._seconds):
                return
