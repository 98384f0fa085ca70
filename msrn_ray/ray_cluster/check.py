"""Whether a file for `ray up` will give the cluster that a run needs; what it finds wrong is told before a machine is paid for."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..config import ExperimentConfig
from ..errors import UserError
from .allocation import fit
from .cluster_yaml import FAMILIES, machine_resources, most_resources, read_cluster
from .private_api import prepare_config, validate_config
from .spot_scorer import SPOT, score

PLACEHOLDER = "CHANGE-ME"
_PINNED = (
    "ray",
    "torch",
    "torchvision",
    "numpy",
    "pyarrow",
)  # what machines that join later must have in the same version
_EXCLUDED = (".git", ".venv", "runs")  # gigabytes that no machine needs
_SECRET = (".ssh", ".aws")
_PIN = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.]+)")
_OPEN_TO_ALL = ("0.0.0.0/0", "::/0")


def check_cluster(path: Path) -> list[str]:
    """What is wrong with a cluster file, a line for each finding with its field and the mend; none: `ray up` can be tried.

    Raises:
        UserError: if the file is missing or not YAML.
    """
    raw = read_cluster(path)
    findings = list(_placeholders(raw))
    try:
        config = _prepared(raw)
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path))
        return [*findings, f"{place or 'the file'}: {error.message.splitlines()[0]}"]
    except (ValueError, click.ClickException) as error:
        return [*findings, f"Ray refuses it: {error}"]
    except (AttributeError, KeyError, NotImplementedError, TypeError) as error:  # Ray's schema lets such through
        return [*findings, f"Ray cannot read it, a field has a value of another kind than it should ({error})"]
    checks = (_versions, _starts, _openings, _files, _own_machines, _machines)
    return [*findings, *(finding for check in checks for finding in check(config))]


def check_preset(path: Path, config: ExperimentConfig) -> str:
    """What an experiment gets of the cluster at its largest, in words.

    Raises:
        UserError: if that is not enough, with both numbers, or if the file does not say.
    """
    most = most_resources(_prepared(read_cluster(path)))
    if most is None:
        raise UserError(
            "machines of your own do not say in the file what they have; the run itself says when it is not enough"
        )
    cpus, gpus = most["CPU"], most["GPU"]
    allocation = fit(config.resources, cpus, gpus, owner=f"{path} at its largest has")
    if allocation.num_workers > config.train.batch_size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} leaves some of {allocation.num_workers} workers without an image; raise it"
        )
    device = "a GPU" if allocation.use_gpu else f"{allocation.cpus_per_worker} CPUs"
    left = (cpus - allocation.num_workers * allocation.cpus_per_worker) / allocation.num_workers
    return (
        f"{config.preset}: {allocation.num_workers} workers with {device} each, {config.train.batch_size / allocation.num_workers:g} images"
        f" a step each, and {left:g} CPUs a worker that decode"
    )


def _prepared(raw: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults, checked by Ray, which prints what it raises, and a word on files in Docker: that is left out."""
    logging.disable()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            config: dict[str, Any] = prepare_config(raw)
            validate_config(config)
    finally:
        logging.disable(logging.NOTSET)
    return config


def _placeholders(tree: Any, place: str = "") -> Iterator[str]:
    """Every value that still has to be changed, under the first name that it stands for."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _placeholders(value, f"{place}.{key}" if place else str(key))
            if key == "metadata" and any(True for _ in _placeholders(value)):
                return  # the rest of the file only refers to it
    elif isinstance(tree, list):
        for value in tree:
            yield from _placeholders(value, place)
    elif PLACEHOLDER in str(tree):
        yield f"{place}: still says {next(word for word in str(tree).split() if PLACEHOLDER in word)}; put your own there"


def _commands(config: Mapping[str, Any], *kinds: str) -> str:
    return "\n".join(line for kind in kinds for line in config.get(kind) or [])


def _versions(config: Mapping[str, Any]) -> Iterator[str]:
    said = _commands(config, "setup_commands", "head_setup_commands", "worker_setup_commands")
    pins: dict[str, str] = {canonicalize_name(name): version for name, version in _PIN.findall(said)}
    if "pip install" not in said:
        return  # the machines have an environment already; it is asked for its versions by nobody here
    for requirement in map(Requirement, requires("msrn-ray") or []):
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None or name not in {*_PINNED, *pins}:
            continue
        if name not in pins:
            yield f"setup_commands: install {name} in one version (==), so that a machine that joins later has the same"
        elif not requirement.specifier.contains(pins[name]):
            yield f"setup_commands: {name}=={pins[name]}, but the project needs {requirement.specifier}"
    if pins.get("ray", ray.__version__) != ray.__version__:
        yield f"setup_commands: ray=={pins['ray']}, but `ray up` here is {ray.__version__}; both must be the same"


def _starts(config: Mapping[str, Any]) -> Iterator[str]:
    """The commands that start Ray."""
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        # an entry of its own would set nothing for the next one
        starts = [line for line in config[field] if "ray start" in line]
        if not starts or not all("RAY_AUTH_MODE=token" in line for line in starts):
            yield f"{field}: add `export RAY_AUTH_MODE=token;` before ray start, or whoever reaches the machine may run code on it"
    head = "\n".join(line for line in config["head_start_ray_commands"] if "ray start" in line)
    if "--autoscaling-config" not in head:
        yield "head_start_ray_commands: add --autoscaling-config=~/ray_bootstrap_config.yaml, or no other machine is started"
    if config["provider"]["type"] == "local" and "RAY_enable_autoscaler_v2=0" not in head:
        yield (
            "head_start_ray_commands: add `export RAY_enable_autoscaler_v2=0;` before ray start; Ray's newer autoscaler never starts the"
            " workers of provider local"
        )
    rule = f"RAY_AUTOSCALER_UTILIZATION_SCORER={score.__module__}.{score.__name__}"
    spot = any(_is_spot(kind) for kind in config["available_node_types"].values())
    if spot and not (rule in head and "RAY_enable_autoscaler_v2=0" in head):
        yield (
            f"head_start_ray_commands: add `export RAY_enable_autoscaler_v2=0 {rule};` before ray start; else Ray asks for spot machines"
            " for ever where AWS has none left"
        )


def _openings(config: Mapping[str, Any]) -> Iterator[str]:
    host = re.search(r"--dashboard-host[= ](\S+)", _commands(config, "head_start_ray_commands"))
    if host is not None and host[1] not in ("127.0.0.1", "localhost"):
        yield f"head_start_ray_commands: --dashboard-host={host[1]} shows the dashboard to others; say 127.0.0.1 and use `ray dashboard`"
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        ranges = [
            one.get("CidrIp", one.get("CidrIpv6")) for key in ("IpRanges", "Ipv6Ranges") for one in rule.get(key, [])
        ]
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        if set(ranges) & set(_OPEN_TO_ALL) and ports != (22, 22):
            yield f"provider.security_group: ports {ports[0]} to {ports[1]} are open to everyone; only SSH (22) may be"


def _files(config: Mapping[str, Any]) -> Iterator[str]:
    key = config["auth"].get("ssh_private_key")
    if key is not None and not Path(key).expanduser().exists():
        yield f"auth.ssh_private_key: {key} is not there; `ray up` would wait for SSH for 15 minutes"
    if not any(target.endswith(".ray/auth_token") for target in config["file_mounts"]):
        yield "file_mounts: add `~/.ray/auth_token: ~/.ray/auth_token`, or the machines refuse each other"
    for target, source in config["file_mounts"].items():
        place = Path(source).expanduser()
        if not place.exists():
            mend = "make it with `ray get-auth-token --generate`"
            mend = mend if target.endswith("auth_token") else "call `ray up` in the project's folder"
            yield f"file_mounts.{target}: {source} is not there; {mend}"
        secrets = [name for name in _SECRET if (place / name).exists()]
        if secrets:
            yield f"file_mounts.{target}: {', '.join(secrets)} would be copied to every machine; name what is needed instead of {source}"
    folders = [source for source in config["file_mounts"].values() if Path(source).expanduser().is_dir()]
    missing = [name for name in _EXCLUDED if name not in config["rsync_exclude"]] if folders else []
    if missing:
        yield f"rsync_exclude: add {', '.join(missing)}, or they are copied to every machine"


def _machines(config: Mapping[str, Any]) -> Iterator[str]:
    if config["provider"]["type"] != "aws":
        return
    if "boto3" not in _commands(config, "setup_commands", "head_setup_commands"):
        yield "head_setup_commands: install boto3, with which Ray on the head asks AWS for the other machines"
    for region in re.findall(r"\.efs\.([\w-]+)\.amazonaws", _commands(config, "setup_commands")):
        if region != config["provider"]["region"]:
            yield f"setup_commands: the file system is in {region}, the cluster in {config['provider']['region']}; both must be the same"
    head = config["head_node_type"]
    for name, kind in config["available_node_types"].items():
        machine = kind["node_config"]
        place = f"available_node_types.{name}"
        for limit in ("min_workers", "max_workers"):
            if kind.get(limit, 0) < 0:
                yield f"{place}: {limit} {kind[limit]} is below 0"
        if not isinstance(machine.get("BlockDeviceMappings", []), list):
            yield f"{place}: node_config.BlockDeviceMappings must be a list"
        if not isinstance(machine.get("InstanceMarketOptions", {}), dict):
            yield f"{place}: node_config.InstanceMarketOptions must be {{MarketType: spot}}"
        spot = _is_spot(kind)
        if spot and name == head:
            yield f"{place}: the head must not be a spot machine, a run ends with it"
        if spot and name != head and not name.endswith(SPOT):
            yield f"{place}: name it {name}{SPOT}, so that it is asked for before the same machine on demand"
        if spot and config["provider"].get("cache_stopped_nodes", True):
            yield "provider.cache_stopped_nodes: must be false with spot machines, which cannot be stopped"
        if not machine.get("ImageId"):
            yield f"{place}: add node_config.ImageId; Ray's default image is too old for torch"
        known = machine_resources(str(machine.get("InstanceType")))
        said = {resource: kind["resources"].get(resource, 0) for resource in ("CPU", "GPU")}
        if known is None and str(machine.get("InstanceType")).partition(".")[0] in FAMILIES:
            yield f"{place}: AWS has no machine {machine['InstanceType']}"
        if name != head and known is not None and known != said:
            numbers = f"{said['CPU']} CPUs and {said['GPU']} GPUs"
            yield f"{place}: resources say {numbers}, a {machine['InstanceType']} has {known['CPU']} and {known['GPU']}"


def _own_machines(config: Mapping[str, Any]) -> Iterator[str]:
    """Of provider local: their addresses."""
    if config["provider"]["type"] != "local":
        return
    # there are none where Ray's coordinator of machines gives them out
    head, workers = config["provider"].get("head_ip"), config["provider"].get("worker_ips") or []
    if head in workers or len(set(workers)) < len(workers):
        yield "provider.worker_ips: an address stands there twice, or is the head's; each machine runs Ray once"
    for address in [head, *workers]:
        if str(address) == "localhost" or str(address).startswith("127."):
            yield f"provider: {address} means the machine itself on each machine; give the address by which the others reach it"


def _is_spot(kind: Mapping[str, Any]) -> bool:
    market = kind["node_config"].get("InstanceMarketOptions")
    return isinstance(market, dict) and market.get("MarketType") == "spot"
