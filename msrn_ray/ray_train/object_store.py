"""Samples how many bytes Ray's object stores hold and spill."""

from __future__ import annotations

import threading

from ..ray_cluster.connection import this_node
from ..ray_cluster.private_api import ObjectStoreReader

_STORE_SECONDS = 1.0  # between two reads; a block stays in the object store for longer


class StoreMeter:
    """Samples, from a thread, what the object stores of all nodes hold; use as a context.

    Ray keeps no peak, so the meter reads the bytes in use once a second (one call to a node, 1 to 2 ms). Spilled bytes are a counter.
    """

    def __init__(self, seconds: float = _STORE_SECONDS) -> None:
        node = this_node()
        self._reader = ObjectStoreReader(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-meter", daemon=True)
        self._peak = 0
        self._spilled: list[int] = []  # at the first and the last read

    def __enter__(self) -> StoreMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._reader.close()

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at any read so far."""
        return self._peak

    @property
    def spilled_bytes(self) -> int:
        """Bytes that the stores wrote to disk since the meter started, because they were full."""
        return self._spilled[-1] - self._spilled[0] if self._spilled else 0

    def _run(self) -> None:
        while True:
            try:
                used, spilled = self._reader.read(timeout=10 * _STORE_SECONDS)
                self._peak = max(self._peak, used)
                self._spilled = [*self._spilled[:1], spilled]
            except OSError:
                pass  # Ray is losing a node: the run continues or ends by other means, and the next read counts again
            if self._stop.wait(self._seconds):
                return
