"""Checks that every node of a cluster file gets the same versions, and versions that this project supports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import ray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .cluster_yaml import commands

# What a node that joins later must have in the same version
_PINNED = ("ray", "torch", "torchvision", "numpy", "pyarrow")
_PIN = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.]+)")
_PIP = re.compile(r"pip install[^;&|\n]*")
_PINS_FILE = re.compile(r"\s(?:-[cr]|--constraint|--requirement)[ =]?(\S+)")


def check_versions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a finding per package that is not pinned, or pinned to a version that does not fit."""
    text = commands(config, "setup_commands", "head_setup_commands", "worker_setup_commands")
    pip = "\n".join(_PIP.findall(text))
    if not pip:
        return  # the nodes have an environment already; its versions are out of reach here
    pins: dict[str, str] = {}
    for target in _PINS_FILE.findall(pip):
        path = _find_source(target, config["file_mounts"])
        if path is None or not path.is_file():
            yield f"setup_commands: pip reads {target}, which file_mounts does not copy; add it there"
            return
        pins |= _read_pins(path.read_text(encoding="utf-8"))
    pins |= _read_pins(text)
    for requirement in map(Requirement, requires("msrn-ray") or []):
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None or name not in {*_PINNED, *pins}:
            continue
        if name not in pins:
            yield f"setup_commands: install {name} in one version (==), so that a node that joins later has the same"
        elif name == "ray" and pins[name] != ray.__version__:
            yield f"setup_commands: ray=={pins[name]}, but `ray up` here is {ray.__version__}; both must be the same"
        elif not requirement.specifier.contains(pins[name]):
            yield f"setup_commands: {name}=={pins[name]}, but the project needs {requirement.specifier}"


def _read_pins(text: str) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in _PIN.findall(text)}


def _find_source(target: str, file_mounts: Mapping[str, str]) -> Path | None:
    """Return the local file that `file_mounts` copies to a path on the nodes, or None."""
    for mount, source in file_mounts.items():
        if target == mount or target.startswith(f"{mount.rstrip('/')}/"):
            return Path(source).expanduser() / target[len(mount) :].lstrip("/")
    return None
