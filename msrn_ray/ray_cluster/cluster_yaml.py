"""Reads from a file for `ray up` which nodes the cluster has, and how large it can grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.files import read_yaml

ON_HEAD = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves the file there on the head, for its autoscaler
_CPUS = {"large": 2, "xlarge": 4} | {f"{factor}xlarge": 4 * factor for factor in (2, 4, 8, 12, 16, 24, 32, 48)}
_SMALL = dict.fromkeys(("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge"), 1) | {"12xlarge": 4}
_GPUS = {  # GPUs per size of AWS's GPU instances
    "g4dn": _SMALL,
    "g5": _SMALL | {"24xlarge": 4, "48xlarge": 8},
    "g6": _SMALL | {"24xlarge": 4, "48xlarge": 8},
    "p4d": {"24xlarge": 8},
    "p5": {"48xlarge": 8},
}
_CPU_FAMILIES = ("c5", "c6i", "c7i", "m5", "m6i", "m7i", "r5", "r6i")
FAMILIES = (*_GPUS, *_CPU_FAMILIES)  # `instance_resources` knows every size of these


def read_cluster(path: Path) -> dict[str, Any]:
    """Return the content of a cluster file.

    Raises:
        UserError: if it is missing, not YAML, or not a mapping with a provider.
    """
    content = read_yaml(path, str(path))
    provider = content.get("provider") if isinstance(content, dict) else None
    if not isinstance(provider, dict) or "type" not in provider:
        raise UserError(f"{path}: not a file for `ray up`, it names no provider.type")
    return dict(content)


def commands(config: Mapping[str, Any], *fields: str) -> str:
    """Return the commands in the given fields, one per line."""
    return "\n".join(line for field in fields for line in config.get(field) or [])


def instance_resources(name: str) -> dict[str, int] | None:
    """Return the CPUs and GPUs of an AWS instance type, or None if it is not a common one."""
    family, _, size = name.partition(".")
    if family in _CPU_FAMILIES and size in _CPUS:
        return {"CPU": _CPUS[size], "GPU": 0}
    if size not in _GPUS.get(family, {}):
        return None
    return {"CPU": _CPUS[size], "GPU": _GPUS[family][size]}


def most_resources(config: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the most CPUs and the most GPUs that the cluster can have, or None if the file does not say, as with provider local.

    Each maximum counts the permanent nodes, and as many of the largest node types as `max_workers` and their own limits allow.
    """
    if config["provider"]["type"] != "aws":
        return None
    node_types = dict(config["available_node_types"])
    head = node_types.pop(config["head_node_type"])
    permanent = {name: node_type.get("min_workers", 0) for name, node_type in node_types.items()}
    most = {}
    for resource in ("CPU", "GPU"):
        sizes = {name: int(node_type["resources"].get(resource, 0)) for name, node_type in node_types.items()}
        total = int(head["resources"].get(resource, 0)) + sum(permanent[name] * sizes[name] for name in sizes)
        left = int(config["max_workers"]) - sum(permanent.values())
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            more = min(left, node_types[name].get("max_workers", left) - permanent[name])
            total += more * sizes[name]
            left -= more
        most[resource] = total
    return most


def can_grow_to(file: Path = ON_HEAD) -> dict[str, int] | None:
    """Return the most resources of the cluster whose head this node is, or None if it does not grow.

    Ray itself reports only what is there at the moment.
    """
    path = file.expanduser()
    return most_resources(read_cluster(path)) if path.exists() else None
