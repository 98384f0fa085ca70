"""The subcommands `runs`, `cluster` and `plan`."""

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
    """List the runs of a folder: state, epoch, best val mAP, start, last heartbeat, and what stopped them."""

    storage: tyro.conf.Positional[Path] = Path("runs")
    """Folder of the runs (`train.storage`)."""

    def run(self) -> None:
        """Print the list, the run with the latest heartbeat first."""
        from ..runs.state import describe_runs, list_runs

        for line in describe_runs(list_runs(self.storage.expanduser()), time.time()):
            print(line)


@dataclass(frozen=True)
class Cluster:
    """Check a file for `ray up` before any node starts: Ray's schema, versions, open ports, what a run needs."""

    action: tyro.conf.Positional[Literal["check"]]
    """What to do with it."""
    file: tyro.conf.Positional[Path]
    """The file: cluster/gpu.yaml, cluster/local.yaml or your own."""
    preset: tyro.conf.Positional[PresetName | None] = None
    """Also print what this preset gets of the cluster at its largest."""
    num_workers: str | None = None
    """Workers of the preset (`resources.num_workers`). None: every GPU."""

    def run(self) -> None:
        """Print what is wrong, one finding per line, and exit with 1; else print what the cluster offers."""
        from ..ray_cluster.check import check_cluster, check_preset

        findings = check_cluster(self.file)
        for line in findings:
            print(f"{self.file}: {line}")
        if findings:
            raise SystemExit(1)
        print(f"{self.file}: no problem found")
        if self.preset is not None:
            config = PRESETS[self.preset].config.with_overrides({"resources.num_workers": self.num_workers})
            print(check_preset(self.file, config))


@dataclass(frozen=True)
class Plan:
    """Estimate how long a preset takes on a number of GPUs: step, gradient exchange with either head, decoding CPUs, epoch, cost."""

    preset: tyro.conf.Positional[PresetName]
    """Preset to plan."""
    gpus: int
    """GPUs; each has one worker."""
    gpu_tflops: float
    """Peak of one GPU in its training precision, 10^12 operations per second (bf16: A10G 70, A100 312, H100 989)."""
    network_gbps: float
    """Slowest link between two GPUs, Gbit/s."""
    memory_gbs: float = 600.0
    """Memory bandwidth of one GPU, GB/s (A10G 600, A100 2000, H100 3350)."""
    efficiency: float = 0.2
    """Fraction of the peak that training reaches; ResNets in mixed precision reach about a fifth on an A100."""
    decode_rate: float = 230.0
    """Images that one CPU reads, decodes and augments per second; 230 was measured with COCO photographs at 448 pixels."""
    batch_size: int | None = None
    """Images per step (`train.batch_size`). None: the preset's."""
    images: int | None = None
    """Images per epoch. None: the benchmark's, minus those that the protocol takes for val."""
    labels: int | None = None
    """Number of labels. None: the benchmark's."""
    dollars: float | None = None
    """Price of a GPU with its node, dollars per hour."""

    def run(self) -> None:
        """Print the plan."""
        from ..training.estimate import Hardware, describe_plan

        for option, value in vars(self).items():
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise UserError(f"--{option.replace('_', '-')} {value:g}: must be greater than 0, and finite")
        if self.efficiency > 1:
            raise UserError(f"--efficiency {self.efficiency:g}: a part of the peak, 1 at most")
        config = PRESETS[self.preset].config
        if self.batch_size is not None:
            config = config.with_overrides({"train.batch_size": self.batch_size})
        flops, link, memory = self.gpu_tflops * 1e12, self.network_gbps / 8 * 1e9, self.memory_gbs * 1e9
        hardware = Hardware(self.gpus, flops, link, memory, self.efficiency)
        plan = describe_plan(
            config, hardware, decode_rate=self.decode_rate, images=self.images, labels=self.labels, dollars=self.dollars
        )
        print(*plan, sep="\n")
