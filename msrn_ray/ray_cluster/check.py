"""Checks a file for `ray up`: whether it gives the cluster that a run needs. It reports findings before AWS bills a node."""

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
from .cluster_yaml import FAMILIES, commands, instance_resources, most_resources, read_cluster
from .private_api import prepare_config, validate_config
from .spot_scorer import SPOT, score

PLACEHOLDER = "CHANGE-ME"
# What a node that joins later must have in the same version
_PINNED = ("ray", "torch", "torchvision", "numpy", "pyarrow")
_PIN = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.]+)")
_PIP = re.compile(r"pip install[^;&|\n]*")
_PINS_FILE = re.compile(r"\s(?:-[cr]|--constraint|--requirement)[ =]?(\S+)")
_EXCLUDED = (".git", ".venv", "runs")  # gigabytes that no node needs
_SECRET = (".ssh", ".aws")
_OPEN_TO_ALL = {"0.0.0.0/0", "::/0"}
_SCORER = f"{score.__module__}.{score.__name__}"
_MOVED = {"msrn_ray.spot_first.score": _SCORER}  # what older cluster files name


def check_cluster(path: Path) -> list[str]:
    """Return what is wrong with a cluster file: a line per finding, with its field and the fix. None: `ray up` can be tried.

    Raises:
        UserError: if the file is missing or not YAML.
    """
    raw = read_cluster(path)
    findings = list(_check_placeholders(raw))
    try:
        config = _prepare(raw)
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path))
        return [*findings, f"{place or 'the file'}: {error.message.splitlines()[0]}"]
    except (ValueError, click.ClickException) as error:
        return [*findings, f"Ray refuses it: {error}"]
    # Ray's schema does not check every field
    except (AttributeError, KeyError, NotImplementedError, TypeError) as error:
        return [*findings, f"Ray cannot read it, a field has a value of another kind than it should ({error})"]
    checks = (check_versions, _check_starts, _check_openings, _check_files, _check_addresses, _check_aws)
    return [*findings, *(finding for check in checks for finding in check(config))]


def check_preset(path: Path, config: ExperimentConfig) -> str:
    """Return, as a sentence, what an experiment gets of the cluster at its largest.

    Raises:
        UserError: if that is not enough, with both numbers, or if the file does not say how large the cluster is.
    """
    most = most_resources(_prepare(read_cluster(path)))
    if most is None:
        raise UserError(
            f"{path}: provider local does not say what its nodes have; the run itself fails if that is not enough"
        )
    cpus, gpus = most["CPU"], most["GPU"]
    allocation = fit(config.resources, cpus, gpus, f"{path} at its largest")
    workers, batch = allocation.num_workers, config.train.batch_size
    if workers > batch:
        raise UserError(f"train.batch_size={batch} leaves some of {workers} workers without an image; raise it")
    device = "a GPU" if allocation.use_gpu else f"{allocation.cpus_per_worker} CPUs"
    decode_cpus = (cpus - workers * allocation.cpus_per_worker) / workers
    return (
        f"{config.preset}: {workers} workers with {device} each, {batch / workers:g} images per step each, and {decode_cpus:g} CPUs per"
        " worker that decode"
    )


def _prepare(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the file with Ray's defaults, validated by Ray.

    Ray also prints what it raises, and a warning about files in Docker. The check reports the first itself and drops the second.
    """
    logging.disable()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            config: dict[str, Any] = prepare_config(raw)
            validate_config(config)
    finally:
        logging.disable(logging.NOTSET)
    return config


def _check_placeholders(tree: Any, place: str = "") -> Iterator[str]:
    """Yield a finding per value that the user still has to change, under the first field that holds it."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _check_placeholders(value, f"{place}.{key}" if place else str(key))
            if key == "metadata" and any(True for _ in _check_placeholders(value)):
                return  # the rest of the file only refers to it
    elif isinstance(tree, list):
        for value in tree:
            yield from _check_placeholders(value, place)
    elif PLACEHOLDER in str(tree):
        word = next(word for word in str(tree).split() if PLACEHOLDER in word)
        yield f"{place}: still says {word}; put your own there"


def check_versions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a finding per package that is not pinned, or pinned to a version that does not fit."""
    text = commands(config, "setup_commands", "head_setup_commands", "worker_setup_commands")
    pip = "\n".join(_PIP.findall(text))
    if not pip:
        return  # the nodes have an environment already; its versions are out of reach here
    texts = []
    for target in _PINS_FILE.findall(pip):
        path = _find_source(target, config["file_mounts"])
        if path is None or not path.is_file():
            yield f"setup_commands: pip reads {target}, which file_mounts does not copy; add it there"
            return
        texts.append(path.read_text(encoding="utf-8"))
    pins = {canonicalize_name(name): version for name, version in _PIN.findall("\n".join([*texts, text]))}
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


def _find_source(target: str, file_mounts: Mapping[str, str]) -> Path | None:
    """Return the local file that `file_mounts` copies to a path on the nodes, or None."""
    for mount, source in file_mounts.items():
        if target == mount or target.startswith(f"{mount.rstrip('/')}/"):
            return Path(source).expanduser() / target[len(mount) :].lstrip("/")
    return None


def _check_starts(config: Mapping[str, Any]) -> Iterator[str]:
    """Check the commands that start Ray."""
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        # Each entry is a shell of its own: an `export` in another entry has no effect on `ray start`
        starts = [line for line in config[field] if "ray start" in line]
        if not starts or not all("RAY_AUTH_MODE=token" in line for line in starts):
            yield f"{field}: add `export RAY_AUTH_MODE=token;` before ray start, or whoever reaches the node may run code on it"
    head = "\n".join(line for line in config["head_start_ray_commands"] if "ray start" in line)
    if "--autoscaling-config" not in head:
        yield "head_start_ray_commands: add --autoscaling-config=~/ray_bootstrap_config.yaml, or Ray starts no other node"
    old_autoscaler = "RAY_enable_autoscaler_v2=0"
    if config["provider"]["type"] == "local" and old_autoscaler not in head:
        yield (
            f"head_start_ray_commands: add `export {old_autoscaler};` before ray start; Ray's newer autoscaler never starts the workers of"
            " provider local"
        )
    for old, new in _MOVED.items():
        if old in head:
            yield f"head_start_ray_commands: {old} has moved; write {new}"
            head = head.replace(old, new)
    scorer = f"RAY_AUTOSCALER_UTILIZATION_SCORER={_SCORER}"
    spot = any(_is_spot(node_type) for node_type in config["available_node_types"].values())
    if spot and not (scorer in head and old_autoscaler in head):
        yield (
            f"head_start_ray_commands: add `export {old_autoscaler} {scorer};` before ray start; else Ray requests spot instances forever"
            " where AWS has none left"
        )


def _check_openings(config: Mapping[str, Any]) -> Iterator[str]:
    host = re.search(r"--dashboard-host[= ](\S+)", commands(config, "head_start_ray_commands"))
    if host is not None and host[1] not in ("127.0.0.1", "localhost"):
        yield f"head_start_ray_commands: --dashboard-host={host[1]} opens the dashboard to others; write 127.0.0.1 and use `ray dashboard`"
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        sources = [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
        ranges = {source.get("CidrIp", source.get("CidrIpv6")) for source in sources}
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        if ranges & _OPEN_TO_ALL and ports != (22, 22):
            yield f"provider.security_group: ports {ports[0]} to {ports[1]} are open to everyone; open only SSH (22)"


def _check_files(config: Mapping[str, Any]) -> Iterator[str]:
    key = config["auth"].get("ssh_private_key")
    if key is not None and not Path(key).expanduser().exists():
        yield f"auth.ssh_private_key: {key} is not there; `ray up` would wait for SSH for 15 minutes"
    mounts = config["file_mounts"]
    if not any(target.endswith(".ray/auth_token") for target in mounts):
        yield "file_mounts: add `~/.ray/auth_token: ~/.ray/auth_token`, or the nodes refuse each other"
    for target, source in mounts.items():
        place = Path(source).expanduser()
        if not place.exists():
            token = target.endswith("auth_token")
            fix = "make it with `ray get-auth-token --generate`" if token else "call `ray up` in the project's folder"
            yield f"file_mounts.{target}: {source} is not there; {fix}"
        secrets = [name for name in _SECRET if (place / name).exists()]
        if secrets:
            yield (
                f"file_mounts.{target}: Ray would copy {', '.join(secrets)} to every node; name only the needed parts of {source}"
            )
    folders = [source for source in mounts.values() if Path(source).expanduser().is_dir()]
    missing = [name for name in _EXCLUDED if name not in config["rsync_exclude"]] if folders else []
    if missing:
        yield f"rsync_exclude: add {', '.join(missing)}, or Ray copies them to every node"


def _check_aws(config: Mapping[str, Any]) -> Iterator[str]:
    provider = config["provider"]
    if provider["type"] != "aws":
        return
    if "boto3" not in commands(config, "setup_commands", "head_setup_commands"):
        yield "head_setup_commands: install boto3; Ray on the head requests the other nodes from AWS with it"
    for region in re.findall(r"\.efs\.([\w-]+)\.amazonaws", commands(config, "setup_commands")):
        if region != provider["region"]:
            yield f"setup_commands: the file system is in {region}, the cluster in {provider['region']}; both must be the same"
    for name, node_type in config["available_node_types"].items():
        for finding in _check_node_type(name, node_type, is_head=name == config["head_node_type"]):
            yield f"available_node_types.{name}: {finding}"
        if _is_spot(node_type) and provider.get("cache_stopped_nodes", True):
            yield "provider.cache_stopped_nodes: must be false with spot instances, which cannot be stopped"


def _check_node_type(name: str, node_type: Mapping[str, Any], is_head: bool) -> Iterator[str]:
    """Check a node type of AWS."""
    instance = node_type["node_config"]
    for limit in ("min_workers", "max_workers"):
        if node_type.get(limit, 0) < 0:
            yield f"{limit} {node_type[limit]} is below 0"
    if not isinstance(instance.get("BlockDeviceMappings", []), list):
        yield "node_config.BlockDeviceMappings must be a list"
    if not isinstance(instance.get("InstanceMarketOptions", {}), dict):
        yield "node_config.InstanceMarketOptions must be {MarketType: spot}"
    if _is_spot(node_type) and is_head:
        yield "the head must not be a spot instance, a run ends with it"
    elif _is_spot(node_type) and not name.endswith(SPOT):
        yield f"name it {name}{SPOT}, so that Ray requests it before the same instance on demand"
    if not instance.get("ImageId"):
        yield "add node_config.ImageId; Ray's default image is too old for torch"
    kind = str(instance.get("InstanceType"))
    known = instance_resources(kind)
    if known is None:
        if kind.partition(".")[0] in FAMILIES:
            yield f"AWS has no instance type {kind}"
        return
    listed = {resource: node_type["resources"].get(resource, 0) for resource in known}
    if listed != known and not is_head:
        numbers = f"{listed['CPU']} CPUs and {listed['GPU']} GPUs"
        yield f"resources say {numbers}, a {kind} has {known['CPU']} and {known['GPU']}"


def _check_addresses(config: Mapping[str, Any]) -> Iterator[str]:
    """Check the addresses of provider local."""
    provider = config["provider"]
    if provider["type"] != "local":
        return
    # A file that uses Ray's coordinator server has no addresses
    head, workers = provider.get("head_ip"), provider.get("worker_ips") or []
    if head in workers or len(set(workers)) < len(workers):
        yield "provider.worker_ips: an address stands there twice, or is the head's; each node runs Ray once"
    for address in [head, *workers]:
        if str(address) == "localhost" or str(address).startswith("127."):
            yield f"provider: {address} means the node itself on each node; give the address by which the others reach it"


def _is_spot(node_type: Mapping[str, Any]) -> bool:
    market = node_type["node_config"].get("InstanceMarketOptions")
    return isinstance(market, dict) and market.get("MarketType") == "spot"
