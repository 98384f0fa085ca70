"""`cluster/gpu.yaml` on an AWS that the test makes: `ray up`, a run for which Ray starts an instance, `ray down`.

moto answers for AWS. Its instances 10.77.0.4, 10.77.0.5, ... are test hosts. These tests cannot show whether the image has a driver,
whether apt and pip find their packages, and whether EFS mounts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from msrn_ray.datasets.scenes.generate import generate_scenes
from tests import hosts
from tests.aws_server import LAUNCHES, NO_SPOT, PORT
from tests.hosts import ROOT, SHARED, Host, Hosts
from tests.made_cluster import WORKERS_START

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE = 600.0  # seconds to wait for what takes some on an idle machine
FILE = f"{SHARED}/gpu.yaml"
NEEDS_INTERNET = ("apt-get", "nfs4", "pip install", "sudo mkdir")  # words of set-up commands that cannot work here
KEY_PAIR = "ray-autoscaler_us-west-2"  # the name that Ray gives to a key pair that it makes
# What tests look for in the program's messages
TOO_MANY_GPUS = "num_workers=5 needs as many GPUs, the cluster at its largest has 4"
WAITING = "waiting for nodes for 1 workers; the cluster has 0 CPUs and 0 GPUs now"
# Makes one network, for the test hosts, and imports their key; prints an image
_ACCOUNT = """
import sys
from pathlib import Path
import boto3
ec2 = boto3.client("ec2")
for subnet in ec2.describe_subnets()["Subnets"]:
    ec2.delete_subnet(SubnetId=subnet["SubnetId"])
network = ec2.create_vpc(CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
ec2.create_subnet(CidrBlock="10.77.0.0/24", VpcId=network)
ec2.import_key_pair(KeyName=sys.argv[1], PublicKeyMaterial=Path("~/.ssh/authorized_keys").expanduser().read_bytes())
print(ec2.describe_images()["Images"][0]["ImageId"])
"""


@dataclass
class Cloud:
    """The laptop, with AWS's server on it, and the hosts that become instances: first the head, then a worker node.

    moto gives its first instance the address of `hosts[2]`.
    """

    hosts: Hosts
    image: str

    @property
    def head(self) -> Host:
        """The first instance."""
        return self.hosts[2]

    @property
    def worker(self) -> Host:
        """The second instance."""
        return self.hosts[3]

    def on_laptop(self, command: str) -> str:
        """Return what a user's command prints, in the project's folder."""
        return self.hosts[0].run(f"cd {ROOT}; export RAY_AUTH_MODE=token; {command}", timeout=PATIENCE).stdout

    def ask(self, service: str, call: str, **arguments: Any) -> Any:
        """Return an answer of AWS."""
        code = f"import boto3, json; print(json.dumps(boto3.client({service!r}).{call}(**{arguments!r}), default=str))"
        return json.loads(self.hosts[0].run(f'python -c "{code}"').stdout)

    def instances(self) -> dict[str, str]:
        """Return the state of every instance, present or past, by its address."""
        reservations = self.ask("ec2", "describe_instances")["Reservations"]
        instances = [instance for reservation in reservations for instance in reservation["Instances"]]
        return {
            instance.get("PrivateIpAddress", instance["InstanceId"]): instance["State"]["Name"]
            for instance in instances
        }

    def launches(self) -> list[dict[str, str]]:
        """Return every request for instances so far."""
        return [json.loads(line) for line in (self.hosts.shared / LAUNCHES).read_text().splitlines()]


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    """An account with one network and one key pair; the cluster is up."""
    reason = hosts.missing()
    if reason:
        pytest.skip(reason)
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    with hosts.started(4) as made:
        laptop, head = made[0], made[2]
        aws = f"AWS_ENDPOINT_URL=http://{laptop.address}:{PORT} AWS_DEFAULT_REGION=us-west-2 AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x"
        for host in (laptop, head):  # on AWS, the head's rights come with its profile
            host.run(f"echo 'export {aws}' >> ~/.bashrc")
        for host in made.hosts[2:]:
            # in place of `pip install`
            host.run(f"ln -s {sys.prefix} ~/venv; echo 'export PYTHONPATH=~/msrn_ray' >> ~/.bashrc")
        laptop.run(
            f"cd {ROOT}; MOTO_IAM_LOAD_MANAGED_POLICIES=true nohup python -m tests.aws_server {laptop.address} {SHARED}"
            f" >{SHARED}/aws.log 2>&1 </dev/null &"
        )
        laptop.run(
            f"until curl -so /dev/null http://{laptop.address}:{PORT}/moto-api/; do sleep 0.2; done", timeout=PATIENCE
        )
        (made.shared / "account.py").write_text(_ACCOUNT)
        image = laptop.run(f"python {SHARED}/account.py {KEY_PAIR}").stdout.strip()
        laptop.run(f"cp ~/.ssh/id ~/.ssh/{KEY_PAIR}.pem")

        text = (ROOT / "cluster/gpu.yaml").read_text(encoding="utf-8")
        text = text.replace("ami-CHANGE-ME", image).replace("fs-CHANGE-ME", "fs-0abc")
        (made.shared / "checked.yaml").write_text(text)
        content = yaml.safe_load(text.replace("ray start", "ray start --object-store-memory=300000000"))
        for field in ("setup_commands", "head_setup_commands"):
            content[field] = [
                "true" if any(word in line for word in NEEDS_INTERNET) else line for line in content[field]
            ]
        content["auth"]["ssh_user"] = "root"
        content["provider"]["use_internal_ips"] = True
        for name in ("gpu_spot", "gpu_on_demand"):
            content["available_node_types"][name]["resources"] = {"CPU": 4, "GPU": 1}  # fewer processes at once
        (made.shared / "gpu.yaml").write_text(yaml.safe_dump(content))
        cloud = Cloud(made, image)
        cloud.on_laptop("ray get-auth-token --generate")
        cloud.on_laptop(f"python -m msrn_ray cluster check {SHARED}/checked.yaml coco2014")
        cloud.on_laptop(f"ray up -y {FILE}")
        yield cloud


def tags(launch: dict[str, str]) -> dict[str, str]:
    """Return the tags of the requested instances."""
    start = "TagSpecification.1."
    assert launch[f"{start}ResourceType"] == "instance"
    assert "TagSpecification.2.ResourceType" not in launch
    count = sum(name.startswith(f"{start}Tag.") and name.endswith(".Key") for name in launch)
    return {launch[f"{start}Tag.{n}.Key"]: launch[f"{start}Tag.{n}.Value"] for n in range(1, count + 1)}


def check_common(launch: dict[str, str], cloud: Cloud) -> None:
    """Assert what every instance of the cluster has."""
    assert launch["ImageId"] == cloud.image
    assert launch["KeyName"] == KEY_PAIR
    assert tags(launch)["ray-cluster-name"] == "msrn"
    disk = {
        name.removeprefix("BlockDeviceMapping.1."): launch[name] for name in launch if name.startswith("BlockDevice")
    }
    assert disk == {
        "DeviceName": "/dev/sda1", "Ebs.DeleteOnTermination": "true", "Ebs.VolumeSize": "200", "Ebs.VolumeType": "gp3",
    }  # fmt: skip
    group = launch["SecurityGroupId.1"]
    assert "SecurityGroupId.2" not in launch
    (found,) = cloud.ask("ec2", "describe_security_groups", GroupIds=[group])["SecurityGroups"]
    opened = {
        (rule.get("FromPort"), rule.get("ToPort"), source["CidrIp"])
        for rule in found["IpPermissions"]
        for source in rule["IpRanges"]
    }
    assert opened == {(22, 22, "0.0.0.0/0")}, "only SSH"
    assert {pair["GroupId"] for rule in found["IpPermissions"] for pair in rule["UserIdGroupPairs"]} == {group}
    assert not any(rule.get("Ipv6Ranges") for rule in found["IpPermissions"])


def test_head_is_as_the_file_says(cloud: Cloud) -> None:
    (launch,) = cloud.launches()
    check_common(launch, cloud)
    assert launch["InstanceType"] == "m6i.2xlarge"
    assert launch["MaxCount"] == "1"
    assert not any(name.startswith("InstanceMarketOptions") for name in launch), "not a spot instance"
    assert {name: tags(launch)[name] for name in ("Name", "ray-node-type", "ray-user-node-type")} == {
        "Name": "ray-msrn-head", "ray-node-type": "head", "ray-user-node-type": "head",
    }  # fmt: skip
    profile = launch["IamInstanceProfile.Arn"].rsplit("/")[-1]
    (role,) = cloud.ask("iam", "get_instance_profile", InstanceProfileName=profile)["InstanceProfile"]["Roles"]
    policies = cloud.ask("iam", "list_attached_role_policies", RoleName=role["RoleName"])["AttachedPolicies"]
    assert "AmazonEC2FullAccess" in {policy["PolicyName"] for policy in policies}, "it may start instances"
    assert cloud.instances() == {cloud.head.address: "running"}


def test_run_larger_than_the_file_allows_is_refused(cloud: Cloud) -> None:
    run = "RAY_AUTH_MODE=token RAY_ADDRESS=auto python -m msrn_ray train scenes --resources.num-workers 5"
    refused = cloud.head.run(f"cd ~/msrn_ray; {run} --train.storage {SHARED}/runs", check=False)
    assert refused.returncode == 2
    assert TOO_MANY_GPUS in refused.stdout
    assert len(cloud.launches()) == 1


def test_run_gets_on_demand_instance_without_spot_capacity(cloud: Cloud) -> None:
    """It trains there to its end. The instance has its GPU in name only, so the run uses none."""
    generate_scenes(cloud.hosts.shared / "scenes", num_train=30, num_val=10, num_test=10)
    (cloud.hosts.shared / NO_SPOT).touch()
    run = (
        f"python -m msrn_ray train scenes --data.dataset coco --data.root {SHARED}/scenes --data.image-size 64 --model.embed-dim 32"
        " --model.compile off --train.amp off --train.epochs 2 --train.batch-size 10 --resources.num-workers 1"
        f" --resources.use-gpu False --train.storage {SHARED}/runs --train.run-name first"
    )
    printed = cloud.head.run(f"cd ~/msrn_ray; RAY_AUTH_MODE=token RAY_ADDRESS=auto {run}", timeout=PATIENCE).stdout
    assert WAITING in printed
    assert WORKERS_START.format(workers=1) in printed
    assert json.loads((cloud.hosts.shared / "runs/first/state.json").read_text())["state"] == "finished"

    _, *spot, on_demand = cloud.launches()
    assert spot, "asked for first"
    for launch in (spot[0], on_demand):
        check_common(launch, cloud)
        assert (launch["InstanceType"], launch["MaxCount"]) == ("g5.4xlarge", "1")
        assert tags(launch)["ray-node-type"] == "worker"
        assert not any(name.startswith("IamInstanceProfile") for name in launch), "it may start no instances"
    assert {launch.get("InstanceMarketOptions.MarketType") for launch in spot} == {"spot"}
    assert "InstanceMarketOptions.MarketType" not in on_demand
    assert tags(spot[0])["ray-user-node-type"] == "gpu_spot"
    assert tags(on_demand)["ray-user-node-type"] == "gpu_on_demand"
    assert cloud.instances() == {cloud.head.address: "running", cloud.worker.address: "running"}


def test_ray_down_ends_all_instances(cloud: Cloud) -> None:
    """Last of this file: it ends the cluster."""
    cloud.on_laptop(f"ray down -y {FILE}")
    end = time.monotonic() + 60
    while set(cloud.instances().values()) != {"terminated"}:
        assert time.monotonic() < end, f"still running: {cloud.instances()}"
        time.sleep(1)
