"""The files for `ray up`: complete, closed to others, with the project's versions; and what `ray job submit` uploads. No Ray is started."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler.node_launch_exception import NodeLaunchException

from msrn_ray.cli.app import main
from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from msrn_ray.ray_cluster.check import PLACEHOLDER, check_cluster, check_preset
from msrn_ray.ray_cluster.cluster_yaml import can_grow_to, instance_resources, most_resources, read_cluster
from msrn_ray.ray_cluster.private_api import (
    NodeProviderAvailabilityTracker,
    create_package,
    get_nodes_for,
    load_function_or_class,
)

ROOT = Path(__file__).resolve().parents[2]
GPU_YAML, LOCAL_YAML = ROOT / "cluster/gpu.yaml", ROOT / "cluster/local.yaml"
PINS = "-c ~/msrn_ray/cluster/requirements.txt"
OTHER_PINS = "torchvision==0.29.1 numpy==2.4.6 pyarrow==25.0.1"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the project's folder, as `ray up` is called, with a token and a key in the home folder."""
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text("secret")
    (tmp_path / "home/.ssh").mkdir()
    (tmp_path / "home/.ssh/msrn").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)


def filled_in(path: Path, folder: Path, change: Change | None = None) -> Path:
    """A copy of a cluster file as a user leaves it."""
    text = path.read_text(encoding="utf-8")
    for kind, own in (("ami", "0abc"), ("fs", "0def"), ("HEAD", "10.0.0.1"), ("WORKER", "10.0.0.2"), ("USER", "me")):
        prefix = f"{kind}-" if kind.islower() else ""
        text = text.replace(f"{kind}-{PLACEHOLDER}", prefix + own)
    content = yaml.safe_load(text)
    if change is not None:
        change(content)
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(content))
    return copy


@pytest.mark.parametrize(
    ("file", "places"),
    [
        (GPU_YAML, ["metadata.image", "metadata.mount"]),
        (LOCAL_YAML, ["metadata.head", "metadata.workers", "metadata.user"]),
    ],
)
def test_check_reports_the_placeholders_only(file: Path, places: list[str], tmp_path: Path) -> None:
    """Once for each field at the top of the file, though the rest of the file repeats them."""
    findings = check_cluster(file)
    assert [line.split(":")[0] for line in findings] == places
    assert all("still says" in line and PLACEHOLDER in line for line in findings)
    assert check_cluster(filled_in(file, tmp_path)) == []
    text = file.read_text(encoding="utf-8")
    assert text.rindex(PLACEHOLDER) < text.index("\ncluster_name:"), "all at the top"


def test_check_finds_placeholders_further_down(tmp_path: Path) -> None:
    copy = filled_in(GPU_YAML, tmp_path, lambda config: config["setup_commands"].append(f"mount {PLACEHOLDER}:/ /x"))
    assert check_cluster(copy) == [f"setup_commands: still says {PLACEHOLDER}:/; put your own there"]


def in_all(config: dict[str, Any], old: str, new: str) -> None:
    for field in [name for name in config if name.endswith("_commands")]:
        config[field] = [line.replace(old, new) for line in config[field]]


def in_type(name: str, **machine: Any) -> Change:
    return lambda config: config["available_node_types"][name]["node_config"].update(machine)


def open_port(first: int, last: int, source: str) -> Change:
    rule = {"FromPort": first, "ToPort": last, "IpProtocol": "TCP", "IpRanges": [{"CidrIp": source}]}
    return lambda config: config["provider"].update(security_group={"GroupName": "x", "IpPermissions": [rule]})


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (GPU_YAML, lambda c: c.update(max_worker=3), ["max_worker"]),
        (GPU_YAML, lambda c: c.update(max_workers="three"), ["max_workers: 'three' is not of type 'integer'"]),
        (GPU_YAML, lambda c: c.update(head_node_type="hed"), ["head_node_type"]),
        (GPU_YAML, lambda c: c.update(max_workers=0) or c["available_node_types"]["decode"].update(min_workers=1), ["max_workers"]),
        (LOCAL_YAML, lambda c: c["provider"].pop("head_ip"), ["head_ip"]),
        (LOCAL_YAML, lambda c: c["provider"].update(worker_ips=None), ["a value of another kind"]),
        (LOCAL_YAML, lambda c: c["provider"].update(worker_ips="10.0.0.2"), ["worker_ips: '10.0.0.2' is not of type 'array'"]),
        (LOCAL_YAML, lambda c: c["provider"].update(worker_ips=["10.0.0.1"]), ["stands there twice, or is the head's"]),
        (LOCAL_YAML, lambda c: c["provider"].update(head_ip="localhost"), ["localhost means the node itself"]),
        (LOCAL_YAML, lambda c: c["auth"].update(ssh_private_key="~/.ssh/none"), ["~/.ssh/none is not there"]),
        (LOCAL_YAML, lambda c: c["provider"].update(worker_ips=["10.0.0.2", "127.0.0.2"]), ["127.0.0.2 means the node itself"]),
        (GPU_YAML, lambda c: c["provider"].update(type="awss"), ["cannot read it"]),
        (GPU_YAML, lambda c: c.update(head_setup_commands="pip install boto3"), ["a value of another kind"]),
        (GPU_YAML, in_type("gpu_spot", InstanceMarketOptions="spot"), ["InstanceMarketOptions must be {MarketType: spot}"]),
        (GPU_YAML, in_type("gpu_spot", InstanceType="g5.3xlarge"), ["AWS has no instance type g5.3xlarge"]),
        (GPU_YAML, in_type("decode", BlockDeviceMappings=200), ["BlockDeviceMappings must be a list"]),
        (
            GPU_YAML,
            lambda c: c["available_node_types"]["decode"].update(min_workers=-1, max_workers=-1),
            ["min_workers -1 is below 0", "max_workers -1 is below 0"],
        ),
        (LOCAL_YAML, lambda c: in_all(c, "RAY_enable_autoscaler_v2=0", ""), ["RAY_enable_autoscaler_v2=0", "never starts"]),
        (
            GPU_YAML,
            lambda c: in_all(c, "RAY_AUTH_MODE=token", "X=1"),
            ["head_start_ray_commands: add `export RAY_AUTH_MODE=token", "worker_start_ray_commands: add `export RAY_AUTH"],
        ),
        (GPU_YAML, lambda c: c["file_mounts"].pop("~/.ray/auth_token"), ["file_mounts: add `~/.ray/auth_token"]),
        (
            GPU_YAML,
            lambda c: Path("~/.ray/auth_token").expanduser().unlink(),
            ["file_mounts.~/.ray/auth_token: ~/.ray/auth_token is not there; make it with `ray get-auth-token --generate`"],
        ),
        (LOCAL_YAML, lambda c: in_all(c, "127.0.0.1", "0.0.0.0"), ["--dashboard-host=0.0.0.0", "ray dashboard"]),
        (GPU_YAML, lambda c: in_all(c, "--autoscaling-config", "--x"), ["add --autoscaling-config"]),
        (GPU_YAML, open_port(8265, 8265, "0.0.0.0/0"), ["ports 8265 to 8265 are open to everyone"]),
        (GPU_YAML, open_port(0, 65535, "0.0.0.0/0"), ["ports 0 to 65535"]),
        (GPU_YAML, lambda c: in_all(c, PINS, f"torch==2.14.1 {OTHER_PINS}"), ["install ray in one version"]),
        (LOCAL_YAML, lambda c: in_all(c, PINS, f"ray==2.60.0 {OTHER_PINS}"), ["install torch in one version"]),
        (GPU_YAML, lambda c: in_all(c, PINS, f"ray torch==2.14.1 {OTHER_PINS}"), ["install ray in one version"]),
        (LOCAL_YAML, lambda c: in_all(c, PINS, f"ray==2.60.0 torch>=2 {OTHER_PINS}"), ["install torch in one version"]),
        (GPU_YAML, lambda c: in_all(c, PINS, f"{PINS} torch==1.9.0"), ["torch==1.9.0, but the project needs >=2.9"]),
        (GPU_YAML, lambda c: in_all(c, PINS, f"{PINS} ray==2.61.0"), [f"ray==2.61.0, but `ray up` here is {ray.__version__}"]),
        (GPU_YAML, lambda c: c["rsync_exclude"].remove(".venv"), ["rsync_exclude: add .venv"]),
        (
            LOCAL_YAML,
            lambda c: c["file_mounts"].update({"~/all": "~"}),
            ["file_mounts.~/all: Ray would copy .ssh to every node; name only the needed parts of ~"],
        ),
        (
            GPU_YAML,
            lambda c: c.update(worker_start_ray_commands=["start_ray_here"]),
            ["worker_start_ray_commands: add `export RAY_AUTH_MODE=token"],
        ),
        (LOCAL_YAML, lambda c: c["file_mounts"].update({"~/msrn_ray/x": "x"}), ["x is not there; call `ray up` in the project's folder"]),
        (GPU_YAML, lambda c: in_all(c, "boto3", "x"), ["head_setup_commands: install boto3"]),
        (GPU_YAML, lambda c: in_all(c, "efs.us-west-2", "efs.us-east-1"), ["is in us-east-1, the cluster in us-west-2"]),
        (
            GPU_YAML,
            lambda c: c.update(worker_start_ray_commands=["export RAY_AUTH_MODE=token", "ray start --address=$RAY_HEAD_IP:6379"]),
            ["worker_start_ray_commands: add `export RAY_AUTH_MODE=token"],
        ),
        (
            LOCAL_YAML,
            lambda c: c.update(head_start_ray_commands=["export RAY_enable_autoscaler_v2=0", *c["head_start_ray_commands"]])
            or c["head_start_ray_commands"].append(c["head_start_ray_commands"].pop().replace("RAY_enable_autoscaler_v2=0", "")),
            ["RAY_enable_autoscaler_v2=0"],
        ),
        (GPU_YAML, in_type("head", InstanceMarketOptions={"MarketType": "spot"}), ["head must not be a spot"]),
        (GPU_YAML, lambda c: c["provider"].pop("cache_stopped_nodes"), ["cache_stopped_nodes: must be false"]),
        (GPU_YAML, in_type("gpu_spot", ImageId=""), ["gpu_spot: add node_config.ImageId"]),
        (GPU_YAML, lambda c: in_all(c, "RAY_AUTOSCALER", "X"), ["SCORER=msrn_ray.ray_cluster.spot_scorer.score;` before ray start"]),
        (GPU_YAML, lambda c: in_all(c, "RAY_enable_autoscaler_v2=0", ""), ["add `export RAY_enable_autoscaler_v2=0"]),
        (
            GPU_YAML,
            lambda c: c["available_node_types"].update(cheap=c["available_node_types"].pop("gpu_spot")),
            ["available_node_types.cheap: name it cheap_spot"],
        ),
        (
            GPU_YAML,
            in_type("gpu_on_demand", InstanceType="g5.12xlarge"),
            ["gpu_on_demand: resources say 16 CPUs and 1 GPUs, a g5.12xlarge has 48 and 4"],
        ),
    ],
)  # fmt: skip
def test_check_reports_what_would_go_wrong(file: Path, change: Change, words: list[str], tmp_path: Path) -> None:
    findings = check_cluster(filled_in(file, tmp_path, change))
    assert [word for word in words if not any(word in line for line in findings)] == [], findings
    assert len(findings) <= len(words), "nothing else"


@pytest.mark.parametrize(
    "change",
    [open_port(22, 22, "0.0.0.0/0"), open_port(8265, 8265, "192.0.2.7/32"), in_type("decode", InstanceType="x1.new")],
)
def test_check_allows(change: Change, tmp_path: Path) -> None:
    assert check_cluster(filled_in(GPU_YAML, tmp_path, change)) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("a: [", "not YAML"),
        ("- 1", "names no provider"),
        ("provider: aws", "names no provider"),
    ],
)
def test_check_refuses_other_files(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        check_cluster(tmp_path / "x.yaml")


def test_instance_types_match_the_list_of_aws() -> None:
    """moto ships that list."""
    moto = pytest.importorskip("moto", reason="moto[server] is not installed")
    types = json.loads(
        gzip.decompress((Path(moto.__file__).parent / "ec2/resources/instance_types.json.gz").read_bytes())
    )
    compared = 0
    for name, listed in types.items():
        ours = instance_resources(name)
        if ours is not None:
            compared += 1
            gpus = sum(gpu["Count"] for gpu in listed.get("GpuInfo", {}).get("Gpus", []))
            assert ours == {"CPU": listed["VCpuInfo"]["DefaultVCpus"], "GPU": gpus}, name
    assert compared > 50
    assert instance_resources("g5.large") is instance_resources("quantum.2xlarge") is None


def test_spot_and_on_demand_nodes_share_a_limit(tmp_path: Path) -> None:
    """4 nodes at most, not 4 of each type; nodes that decode count too."""
    file = filled_in(GPU_YAML, tmp_path)
    types = read_cluster(file)["available_node_types"]
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == on_demand
    assert most_resources(read_cluster(file)) == can_grow_to(file) == {"CPU": 64, "GPU": 4}
    decoding = lambda c: c["available_node_types"]["decode"].update(min_workers=1, max_workers=1)  # noqa: E731
    assert most_resources(read_cluster(filled_in(GPU_YAML, tmp_path, decoding))) == {"CPU": 64, "GPU": 3}
    fewer = lambda c: [c["available_node_types"][name].update(max_workers=1) for name in ("gpu_spot", "gpu_on_demand")]  # noqa: E731
    assert most_resources(read_cluster(filled_in(GPU_YAML, tmp_path, fewer))) == {"CPU": 32, "GPU": 2}
    assert can_grow_to(tmp_path / "missing.yaml") is can_grow_to(filled_in(LOCAL_YAML, tmp_path)) is None


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ([], {"gpu_spot": 2}),
        (["gpu_spot"], {"gpu_on_demand": 2}),
        (["gpu_on_demand"], {"gpu_spot": 2}),
        (["gpu_spot", "gpu_on_demand"], {"gpu_spot": 2}),
    ],
)
def test_refused_spot_nodes_are_requested_on_demand(refused: list[str], expected: dict[str, int]) -> None:
    """Ray chooses among the file's node types, with the scorer that the file names, for two workers and a CPU that decodes."""
    config = read_cluster(GPU_YAML)
    tracker = NodeProviderAvailabilityTracker()
    for name in refused:
        tracker.update_node_availability(
            name, int(time.time()), NodeLaunchException("InsufficientInstanceCapacity", "", None)
        )
    (scorer,) = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=([\w.]+)", " ".join(config["head_start_ray_commands"]))
    chosen, missing = get_nodes_for(
        config["available_node_types"], {}, config["head_node_type"], 4, [{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 1}],
        partial(load_function_or_class(scorer), node_availability_summary=tracker.summary()),
    )  # fmt: skip
    assert (chosen, missing) == (expected, [])


def test_check_reports_what_a_preset_gets(tmp_path: Path) -> None:
    file, config = filled_in(GPU_YAML, tmp_path), PRESETS["coco2014"].config
    assert check_preset(file, config) == (
        "coco2014: 4 workers with a GPU each, 4 images per step each, and 15 CPUs per worker that decode"
    )
    with pytest.raises(UserError, match=r"num_workers=5 needs as many GPUs, .*gpu\.yaml at its largest has 4"):
        check_preset(file, config.with_overrides({"resources.num_workers": 5}))
    with pytest.raises(UserError, match=r"train\.batch_size=2 leaves some of 4 workers without an image"):
        check_preset(file, config.with_overrides({"train.batch_size": 2}))
    with pytest.raises(UserError, match="provider local does not say"):
        check_preset(filled_in(LOCAL_YAML, tmp_path), config)


def test_check_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["msrn", "cluster", "check", *map(str, argv)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run(GPU_YAML, "coco2014") == 1
    assert f"{GPU_YAML}: metadata.image: still says ami-{PLACEHOLDER}" in capsys.readouterr().out
    good = filled_in(GPU_YAML, tmp_path)
    assert run(good, "coco2014", "--num-workers", "2") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{good}: no problem found"
    assert run(good, "coco2014", "--num-workers", "7") == 2
    assert "at its largest has 4" in capsys.readouterr().err


def test_pinned_versions_are_within_the_project_bounds() -> None:
    """Both cluster files install the pins of requirements.txt, and no other version."""
    needed = [Requirement(line) for line in requires("msrn-ray") or []]
    bounds = {requirement.name: requirement.specifier for requirement in needed if requirement.marker is None}
    pins = dict(re.findall(r"([\w-]+)==([\w.]+)", (ROOT / "cluster/requirements.txt").read_text(encoding="utf-8")))
    assert set(pins) >= {"ray", "torch", "torchvision", "numpy", "pyarrow"}
    assert [name for name in bounds if pins[name.lower()] not in bounds[name]] == []
    assert pins["ray"] == ray.__version__
    for file in (GPU_YAML, LOCAL_YAML):
        text = file.read_text(encoding="utf-8")
        assert PINS in text
        assert "==" not in text


def test_job_uploads_the_code_only(tmp_path: Path) -> None:
    """Ray packs `--working-dir .` of a project's folder that was in use."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    work = tmp_path / "work"
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, work / name)
    heavy = [".venv/lib/big.so", "runs/coco/epoch_0001_a/model.pt", ".git/objects/pack/x.pack", "label_graph.png"]
    heavy += ["msrn_ray/__pycache__/x.pyc", "msrn_ray.egg-info/PKG-INFO", "search/best.db", "coco/train2014/1.jpg"]
    for name in heavy:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(b"\0" * 100)
    (work / "my.yaml").write_text("train: {epochs: 3}")
    package = tmp_path / "package.zip"
    create_package(str(work), package, include_gitignore=True, excludes=[], include_parent_dir=False)
    packed = set(ZipFile(package).namelist())
    assert {
        "msrn_ray/ray_train/worker.py",
        "msrn_ray/doctor/report.html",
        "pyproject.toml",
        "tuning/search.py",
    } <= packed
    assert packed & set(heavy) == set()
    assert {name.split("/")[0] for name in packed} == {
        "msrn_ray",
        "tuning",
        "cluster",
        "pyproject.toml",
        "README.md",
        "my.yaml",
    }
    assert package.stat().st_size < 2_000_000
