"""A Ray cluster as a user makes it, on test hosts: `ray up cluster/local.yaml`, jobs, the dashboard, Prometheus."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import yaml

from msrn_ray.datasets.scenes.generate import generate_scenes

from . import hosts
from .hosts import PATIENCE, ROOT, SHARED, Host, Hosts

NUM_IMAGES = 50  # of train; val has as many, since one swapped pair of its images must not move a score far
FILE = f"{SHARED}/local.yaml"
RUNS = f"{SHARED}/runs"
# A constant rate and frozen statistics: an epoch ends in the same weights with any number of workers and any length of the whole run
TRAIN = (
    f"python -m msrn_ray train scenes --data.dataset coco --data.root {SHARED}/scenes --data.image-size 64 --model.embed-dim 32"
    " --model.compile off --model.frozen-batchnorm --optim.name sgd --optim.lr 0.01 --optim.schedule constant --train.amp off"
    " --train.batch-size 10 --train.log-every 1 --resources.cpus-per-worker 2"
)
JOBS = "--address http://localhost:8265"

# What tests look for in the program's messages, as regular expressions
WORKERS_START = "training on {workers} x cpu in float32"
EPOCHS_LEFT = "epochs {first} to {last}"
EPOCH_END = "epoch {epoch}/{last}  train/loss"
WORKER_FAILED = r"worker \d failed: "
RESULT = r"val mAP \d"
DISK_FULL = (
    r"node {address}: the disk of /tmp/ray/.* is full; Ray starts nothing there until it is restarted on that node"
)
NO_HEARTBEAT = r"no heartbeat"
BAD_TOKEN = r"the cluster refuses this machine's token \(401\)"
NO_TOKEN = r"no token for the cluster on this machine"
TOO_MANY_WORKERS = r"num_workers=4 x 2 CPUs, and one for decoding, .* has 6 CPUs"
NOT_SHARED = r"train\.storage /root/runs: not the same folder on 10\.77\.0\.3 as where the run was started"

_RAY = "/raylet/raylet |gcs_server|ray::|ray/_private|ray/dashboard"  # command lines
T = TypeVar("T")


class Job(NamedTuple):
    """A job in the dashboard's list."""

    id: str
    status: str
    name: str | None
    command: str

    @property
    def is_active(self) -> bool:
        """Whether it may still train."""
        return self.status in ("PENDING", "RUNNING")


class Sample(NamedTuple):
    """A time series of Prometheus, and its value at present."""

    labels: dict[str, str]
    value: float


@dataclass
class Cluster:
    """Two nodes, with room for one train worker on each, and the laptop on which the user called `ray up`."""

    hosts: Hosts

    @property
    def head(self) -> Host:
        """The node that drives the runs."""
        return self.hosts[0]

    @property
    def worker(self) -> Host:
        """The other node."""
        return self.hosts[1]

    @property
    def laptop(self) -> Host:
        """Where the user works."""
        return self.hosts[2]

    def on_laptop(self, command: str, check: bool = True) -> str:
        """Return what a user's command prints, in the project's folder, with the token."""
        return self.laptop.run(f"cd {ROOT}; export RAY_AUTH_MODE=token; {command}", check=check).stdout

    def submit(self, name: str, command: str) -> str:
        """Submit a command as the README does, as soon as both nodes are up; return the job's id."""
        self.wait_for_nodes()
        metadata = shlex.quote(json.dumps({"job_name": name}))
        printed = self.on_laptop(
            f"ray job submit {JOBS} --working-dir . --no-wait --metadata-json {metadata} -- {command}"
        )
        return re.findall(r"Job '(raysubmit_\w+)' submitted", printed)[0]

    def stop(self, job: str) -> None:
        """Run `ray job stop`, which waits for the job's end."""
        self.on_laptop(f"ray job stop {JOBS} {job}")

    def job_log(self, job: str) -> str:
        """Return what a job has printed so far."""
        logs = self.head.from_here("/tmp/ray").glob(f"session_2*/logs/job-driver-{job}.log")
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)

    def nodes(self) -> dict[str, str]:
        """Return Ray's id of each node that is alive, by address; `ray status` still counts a lost one.

        The server that `ray list nodes` asks: that command takes a CPU for seconds, and tests ask often.
        """
        query = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        listed = self.ask_dashboard(f"api/v0/nodes?{query}")["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in listed}

    def jobs(self, asked_from: Host | None = None) -> list[Job]:
        """Return the dashboard's list of jobs; asked on the head, or from another host."""
        return [
            Job(job["submission_id"], job["status"], job["metadata"].get("job_name"), job["entrypoint"])
            for job in self.ask_dashboard("api/jobs/", asked_from)
        ]

    def ask_dashboard(self, path: str, asked_from: Host | None = None) -> Any:
        """Return what the dashboard answers with the token; asked on the head, or from another host."""
        ask = (
            'curl -sSf --retry 9 --retry-delay 1 --retry-all-errors -H "Authorization: Bearer $(cat ~/.ray/auth_token)"'
        )
        printed = (asked_from or self.head).run(f"{ask} 'http://localhost:8265/{path}'").stdout
        return json.loads(printed.splitlines()[-1])  # the lines before report retries

    def wait_for_nodes(self) -> None:
        """Wait until both nodes are up: Ray restarts a lost one by itself."""
        wait(lambda: len(self.nodes()) == 2, lambda: f"2 nodes were never up, only {self.nodes()}", every=0.5)

    def wait_for_new_node(self, old: str) -> None:
        """Wait until the worker node is up under another id than the old one."""
        address = self.worker.address
        wait(lambda: self.nodes().get(address, old) != old, lambda: f"{address} never came back", every=0.5)

    def start_prometheus(self) -> None:
        """Start Prometheus on the head, with the project's file, as the README does."""
        options = "--config.file=cluster/monitoring/prometheus.yml --web.listen-address=127.0.0.1:9091"
        self.head.run(
            f"cd {ROOT}; nohup prometheus {options} --storage.tsdb.path=/root/prometheus >/root/prometheus.log 2>&1 </dev/null &"
        )

    def ask_prometheus(self, query: str) -> list[Sample]:
        """Return what Prometheus answers to a query."""
        ask = f"curl -sS --data-urlencode {shlex.quote(f'query={query}')} http://127.0.0.1:9091/api/v1/query"
        found = json.loads(self.head.run(ask).stdout)["data"]["result"]
        return [Sample(series["metric"], float(series["value"][1])) for series in found]

    def kill_ray(self) -> None:
        """Send SIGKILL to every process of Ray on the worker node."""
        self.worker.kill(_RAY)

    def restart_ray(self) -> None:
        """End Ray on the worker node, if it has not ended by itself, and wait until Ray has restarted it."""
        address = self.worker.address
        node = self.nodes().get(address, "")
        if node:  # else Ray is restarting it already
            if self.worker.processes(_RAY):
                self.kill_ray()
            # a node that came up in between was killed too, and counts as alive for some seconds
            node = self.nodes().get(address, node)
        self.wait_for_new_node(node)

    def wait_for_no_ray(self, *nodes: Host) -> None:
        """Wait until nothing of Ray is on the nodes."""
        wait(
            lambda: not any(has_ray(node) for node in nodes),
            lambda: f"still running: {[node.run('ps -ewwo args=').stdout for node in nodes]}",
            every=1,
        )


def has_ray(host: Host) -> bool:
    """Return whether a process of Ray is on a host, or one that starts or stops Ray."""
    return bool(host.processes(f"raylet|{_RAY}|ray start|ray stop"))


def wait(look: Callable[[], T | None], complaint: Callable[[], str], every: float) -> T:
    """Return what `look` returns as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < end, complaint()
        time.sleep(every)
    return found


@contextmanager
def brought_up() -> Iterator[Cluster]:
    """Bring a cluster up from the project's own file; three logical CPUs per node, so that workers with two lie on different nodes."""
    with hosts.started(3) as made:
        cluster = Cluster(made)
        generate_scenes(made.shared / "scenes", num_train=NUM_IMAGES, num_val=51, num_test=10)
        text = (ROOT / "cluster/local.yaml").read_text(encoding="utf-8")
        for place, value in (("HEAD", cluster.head.address), ("WORKER", cluster.worker.address), ("USER", "root")):
            text = text.replace(f"{place}-CHANGE-ME", value)
        text = text.replace("ray start", "ray start --num-cpus=3 --object-store-memory=300000000")
        content = yaml.safe_load(text)
        # a busy machine starts Ray slowly; the worker node's commands try again by themselves
        content["head_start_ray_commands"] = [
            line.replace("export RAY_AUTH_MODE", "export RAY_raylet_start_wait_time_s=60 RAY_AUTH_MODE")
            for line in content["head_start_ray_commands"]
        ]
        install = content["metadata"]["install"]
        content["setup_commands"] = ["true" if line == install else line for line in content["setup_commands"]]
        content["auth"]["ssh_private_key"] = "~/.ssh/id"
        (made.shared / "local.yaml").write_text(yaml.safe_dump(content))
        cluster.on_laptop("ray get-auth-token --generate")
        cluster.on_laptop(f"python -m msrn_ray cluster check {FILE}")
        cluster.on_laptop(f"ray up -y {FILE}")
        cluster.on_laptop(f"nohup ray dashboard {FILE} >/dev/null 2>&1 </dev/null &")
        cluster.wait_for_nodes()
        yield cluster
