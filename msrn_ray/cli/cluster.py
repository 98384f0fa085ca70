"""The subcommands of `msrn` around a cluster: `runs`, `cluster` and `plan`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..errors import UserError
from ..presets import PRESETS, PresetName


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder: state, epoch, best val mAP, when started and when seen last; what stopped them."""

    storage: tyro.conf.Positional[Path] = Path("runs")
    """Folder of the runs (`train.storage`)."""

    def run(self) -> None:
        """Prints the list, the run seen last first."""
        from ..runs.listing import describe_runs, list_runs

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
        from ..ray_cluster.check import check_cluster, check_preset

        findings = check_cluster(self.file)
        for line in findings:
            print(f"{self.file}: {line}")
        if findings:
            raise SystemExit(1)
        print(f"{self.file}: nothing wrong is seen")
        if self.preset is not None:
            config = PRESETS[self.preset].config.with_overrides({"resources.num_workers": self.num_workers})
            print(check_preset(self.file, config))


@dataclass(frozen=True)
class Plan:
    """Say how long a preset takes on so many GPUs: step, exchange of gradients with either head, CPUs that decode, epoch, cost."""

    preset: tyro.conf.Positional[PresetName]
    """Preset to plan."""
    gpus: int
    """GPUs, a worker each."""
    gpu_tflops: float
    """Peak of one GPU in the precision that it trains in, 10^12 operations a second (bf16: A10G 70, A100 312, H100 989)."""
    network_gbps: float
    """Slowest link between two of them, Gbit/s."""
    memory_gbs: float = 600.0
    """Memory of one GPU, GB/s (A10G 600, A100 2000, H100 3350)."""
    efficiency: float = 0.2
    """Part of the peak that is reached; ResNets in mixed precision reach about a fifth on an A100."""
    decode_rate: float = 230.0
    """Images that a CPU reads, decodes and augments in a second; 230 were measured with COCO photographs and 448 pixels."""
    batch_size: int | None = None
    """Images of a step (`train.batch_size`). None: the preset's."""
    images: int | None = None
    """Images of an epoch. None: those of the benchmark, less what the protocol takes for val."""
    labels: int | None = None
    """Labels. None: those of the benchmark."""
    dollars: float | None = None
    """Price of a GPU with its machine, dollars an hour."""

    def run(self) -> None:
        """Prints the plan."""
        from ..ray_cluster.estimate import Request, describe_plan

        for option in (
            "gpus",
            "gpu_tflops",
            "network_gbps",
            "memory_gbs",
            "efficiency",
            "decode_rate",
            "images",
            "labels",
            "dollars",
        ):
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{option.replace('_', '-')} {value:g}: must be greater than 0, and finite")
        if self.efficiency > 1:
            raise UserError(f"--efficiency {self.efficiency:g}: a part of the peak, 1 at most")
        config = PRESETS[self.preset].config
        if self.batch_size is not None:
            config = config.with_overrides({"train.batch_size": self.batch_size})
        request = Request(
            config, self.gpus, self.gpu_tflops, self.network_gbps, self.memory_gbs, self.efficiency, self.decode_rate,
            self.images, self.labels, self.dollars,
        )  # fmt: skip
        for line in describe_plan(request):
            print(line)
