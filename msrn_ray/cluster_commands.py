"""The subcommands of `msrn` around a cluster: `runs` and `cluster`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .commands import PresetName
from .presets import PRESETS


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


@dataclass(frozen=True)
class Cluster:
    """Check a file for `ray up` before any machine is started: Ray's schema, versions, what is open to others, what a run needs."""

    action: tyro.conf.Positional[Literal["check"]]
    """What to do with it."""
    file: tyro.conf.Positional[Path]
    """The file: cluster/gpu.yaml, cluster/local.yaml or your own."""
    preset: tyro.conf.Positional[PresetName | None] = None
    """Also say what this preset gets of the cluster at its largest."""
    num_workers: str | None = None
    """Workers of the preset (`resources.num_workers`). None: every GPU."""

    def run(self) -> None:
        """Prints what is wrong, a line each, and exits with 1; else what the cluster gives."""
        from .cluster_check import check_cluster, check_preset

        findings = check_cluster(self.file)
        for line in findings:
            print(f"{self.file}: {line}")
        if findings:
            raise SystemExit(1)
        print(f"{self.file}: nothing wrong is seen")
        if self.preset is not None:
            config = PRESETS[self.preset].config.with_overrides({"resources.num_workers": self.num_workers})
            print(check_preset(self.file, config))
