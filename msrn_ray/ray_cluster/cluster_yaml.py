"""What a file for `ray up` says of the cluster: its machines, and how many there can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.files import read_yaml

ON_HEAD = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the file on the head, for its autoscaler
_CPUS = {"large": 2, "xlarge": 4} | {f"{factor}xlarge": 4 * factor for factor in (2, 4, 8, 12, 16, 24, 32, 48)}
_SMALL = dict.fromkeys(("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge"), 1) | {"12xlarge": 4}
_GPUS = {  # machines of AWS with GPUs: how many each size has
    "g4dn": _SMALL,
    "g5": _SMALL | {"24xlarge": 4, "48xlarge": 8},
    "g6": _SMALL | {"24xlarge": 4, "48xlarge": 8},
    "p4d": {"24xlarge": 8},
    "p5": {"48xlarge": 8},
}
_CPU_FAMILIES = ("c5", "c6i", "c7i", "m5", "m6i", "m7i", "r5", "r6i")
FAMILIES = (*_GPUS, *_CPU_FAMILIES)  # those of which `machine_resources` knows every size


def read_cluster(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        UserError: if it is missing, not YAML, or not a mapping with a provider.
    """
    content = read_yaml(path, str(path))
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("provider"), dict)
        or "type" not in content["provider"]
    ):
        raise UserError(f"{path}: not a file for `ray up`, it names no provider.type")
    return content


def machine_resources(name: str) -> dict[str, int] | None:
    """CPUs and GPUs of a machine of AWS; None where it is not one of the usual ones."""
    family, _, size = name.partition(".")
    if family in _CPU_FAMILIES and size in _CPUS:
        return {"CPU": _CPUS[size], "GPU": 0}
    if size not in _GPUS.get(family, {}):
        return None
    return {"CPU": _CPUS[size], "GPU": _GPUS[family][size]}


def most_resources(raw: Mapping[str, Any]) -> dict[str, int] | None:
    """CPUs and GPUs of the cluster when all its machines are there; None if the file does not say, as for machines of one's own.

    Each is the most that there can be of it: as many of the machines with most as `max_workers` and their own limits allow, beside those
    that are always there.
    """
    if raw["provider"]["type"] != "aws":
        return None
    head = raw["head_node_type"]
    kinds = {name: kind for name, kind in raw["available_node_types"].items() if name != head}
    most = {}
    for resource in ("CPU", "GPU"):
        sizes = {name: int(kind["resources"].get(resource, 0)) for name, kind in kinds.items()}
        total = int(raw["available_node_types"][head]["resources"].get(resource, 0))
        left = int(raw["max_workers"])
        for name, kind in kinds.items():
            total += kind.get("min_workers", 0) * sizes[name]
            left -= kind.get("min_workers", 0)
        for name in sorted(kinds, key=sizes.__getitem__, reverse=True):
            more = min(left, kinds[name].get("max_workers", left) - kinds[name].get("min_workers", 0))
            total += more * sizes[name]
            left -= more
        most[resource] = total
    return most


def can_grow_to(file: Path = ON_HEAD) -> dict[str, int] | None:
    """CPUs and GPUs of the cluster whose head this machine is, when all its machines are there; None if it does not grow.

    Ray itself tells a run only what is there now.
    """
    path = file.expanduser()
    return most_resources(read_cluster(path)) if path.exists() else None
