"""The subcommands of `msrn` around a cluster: `runs`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder: state, epoch, best val mAP, when started and when seen last; what stopped them."""

    storage: tyro.conf.Positional[Path] = Path("runs")
    """Folder of the runs (`train.storage`)."""

    def run(self) -> None:
        """Prints the list, the run seen last first."""
        from .run_state import describe_runs, list_runs

        for line in describe_runs(list_runs(self.storage.expanduser()), time.time()):
            print(line)
