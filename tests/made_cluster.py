"""A cluster as a user makes it, of machines that the tests make: `ray up cluster/local.yaml`, and jobs that train on it."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from msrn_ray.datasets.scenes.generate import generate_scenes
from msrn_ray.runs.checkpoint import MODEL_FILE, load_checkpoint, load_train_state

from . import hosts
from .hosts import PATIENCE, ROOT, SHARED, Hosts

NUM_IMAGES = 50
FILE = f"{SHARED}/local.yaml"
RUNS = f"{SHARED}/runs"
# A constant rate and frozen statistics: with any number of workers, and however long the whole run, an epoch ends in the same weights
RUN = (
    f"python -m msrn_ray train scenes --data.dataset coco --data.root {SHARED}/scenes --data.image-size 64 --model.embed-dim 32"
    " --model.compile off --model.frozen-batchnorm --optim.name sgd --optim.lr 0.01 --optim.schedule constant --train.amp off"
    " --train.batch-size 10 --train.log-every 1 --resources.cpus-per-worker 2"
)
T = TypeVar("T")
_RAY = "/raylet/raylet |gcs_server|ray::|ray/_private|ray/dashboard"


@dataclass
class Cluster:
    """Head and worker are `hosts[0]` and `hosts[1]`; `ray up` was called on `hosts[2]`. There is room for one train worker on each."""

    hosts: Hosts

    def on_laptop(self, command: str, check: bool = True) -> str:
        """What a user's command prints, in the project's folder, with the token."""
        words = f"cd {ROOT}; export RAY_AUTH_MODE=token; {command}"
        return self.hosts[2].run(words, check=check).stdout

    def submit(self, run: str, options: str) -> str:
        """Submits a training run as the README does, once both machines are there; its job's name."""
        self.wait_for_machines()
        command = f"{RUN} --train.storage {RUNS} --train.run-name {run} --or-resume {options}"
        told = self.on_laptop(
            "ray job submit --address http://localhost:8265 --working-dir . --no-wait"
            f" --metadata-json '{json.dumps({'job_name': run})}' -- {command}"
        )
        return re.findall(r"Job '(raysubmit_\w+)' submitted", told)[0]

    def stop(self, job: str) -> None:
        """`ray job stop`, which waits for its end."""
        self.on_laptop(f"ray job stop --address http://localhost:8265 {job}")

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        return self.hosts[0].run(f"cat /tmp/ray/session_latest/logs/job-driver-{job}.log || true").stdout

    def wait_for(self, job: str, pattern: str, times: int = 1) -> str:
        """The job's log, once it has the pattern so many times."""

        def found() -> str | None:
            log = self.log(job)
            assert "Traceback" not in log, log
            return log if len(re.findall(pattern, log)) >= times else None

        return wait(found, lambda: f"{pattern} never came:\n{self.log(job)}", every=0.5)

    def nodes(self) -> dict[str, str]:
        """Ray's id of each machine that is there, by address; `ray status` goes on counting one that is lost.

        It is asked of the server that `ray list nodes` asks: that command takes a CPU for seconds, and this is asked often.
        """
        query = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        listed = self.ask_dashboard(f"api/v0/nodes?{query}")["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in listed}

    def jobs(self) -> list[dict[str, Any]]:
        """What the dashboard lists of each job: `submission_id`, `status`, `metadata`, `entrypoint`."""
        listed: list[dict[str, Any]] = self.ask_dashboard("api/jobs/")
        return listed

    def ask_dashboard(self, path: str) -> Any:
        """What the head's dashboard answers to who has the token."""
        ask = (
            'curl -sSf --retry 9 --retry-delay 1 --retry-all-errors -H "Authorization: Bearer $(cat ~/.ray/auth_token)"'
        )
        told = self.hosts[0].run(f"{ask} 'http://localhost:8265/{path}'").stdout
        return json.loads(told.splitlines()[-1])  # before it, what was tried again

    def wait_for_machines(self) -> None:
        """Waits until both are there: Ray starts a lost one again by itself."""
        wait(lambda: len(self.nodes()) == 2, lambda: "there never were 2 machines", every=1)

    def wait_for_another(self, number: int, node: str) -> None:
        """Waits until a machine is there with another id than that."""
        address = self.hosts[number].address
        wait(lambda: self.nodes().get(address, node) != node, lambda: f"{address} never came back", every=1)

    def wait_for_checkpoint(self, run: str, epoch: int, after: float = 0.0, half_way: bool = False) -> float:
        """When there is a checkpoint of the epoch, counted from 1, or of a later one; written `after` that time (seconds since 1970).

        `half_way`: not one of an epoch's end.
        """

        def written() -> float | None:
            for folder in self.checkpoints(run):
                try:
                    right = int(folder.name.split("_")[1]) >= epoch and (not half_way or "_step_" in folder.name)
                    if right and folder.stat().st_mtime > after:
                        return folder.stat().st_mtime
                except FileNotFoundError:  # a later one took its place
                    pass
            return None

        return wait(written, lambda: f"run {run} did not get to epoch {epoch}", every=0.05)

    def checkpoints(self, run: str) -> list[Path]:
        """Folders of a run's checkpoints."""
        return list((self.hosts.shared / "runs" / run).glob("epoch_*"))

    def lines(self, run: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        path = self.hosts.shared / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def state(self, run: str) -> list[str]:
        """The line of `msrn runs` for a run, in words."""
        lines = self.hosts[0].run(f"cd {ROOT}; python -m msrn_ray runs {RUNS}").stdout.splitlines()
        return next(line.split() for line in lines if line.startswith(f"{run} "))

    def watch(self) -> None:
        """Starts Prometheus on the head, with the project's file, as the README does."""
        options = "--config.file=cluster/monitoring/prometheus.yml --web.listen-address=127.0.0.1:9091"
        self.hosts[0].run(
            f"cd {ROOT}; nohup prometheus {options} --storage.tsdb.path=/root/prometheus >/root/prometheus.log 2>&1 </dev/null &"
        )

    def ask_prometheus(self, query: str) -> list[dict[str, Any]]:
        """What it answers: for each line its labels (`metric`) and its value now (`value`)."""
        answer = self.hosts[0].run(
            f"curl -sS --data-urlencode {shlex.quote(f'query={query}')} http://127.0.0.1:9091/api/v1/query"
        )
        found: list[dict[str, Any]] = json.loads(answer.stdout)["data"]["result"]
        return found

    def kill_ray(self, number: int) -> None:
        """SIGKILL of all that Ray has on a machine."""
        self.hosts[number].kill(_RAY)

    def restart(self, number: int) -> None:
        """Ends Ray on a machine, if it has not ended by itself, and waits until Ray has started it again."""
        address = self.hosts[number].address
        node = self.nodes().get(address, "")
        if node:  # else Ray is starting it already
            if self.hosts[number].processes(_RAY):
                self.kill_ray(number)
            # one that had come in between was killed, and counts as there for some seconds
            node = self.nodes().get(address, node)
        self.wait_for_another(number, node)

    def has_ray(self, number: int) -> bool:
        """Whether anything of Ray is on a machine, or starts or stops it."""
        return bool(self.hosts[number].processes(f"raylet|{_RAY}|ray start|ray stop"))

    def assert_whole(self, run: str) -> None:
        """Each epoch so far trained on every image once, and what is kept can be read.

        The run itself compares the rows that it trained on with the order of the epoch, and ends where they differ, see `accounting`.
        """
        lines = self.lines(run)
        assert [(line["epoch"], line["train/images"], line["train/bad_images"]) for line in lines] == [
            (epoch, NUM_IMAGES, 0) for epoch in range(1, len(lines) + 1)
        ]
        kept = self.checkpoints(run)
        assert kept
        for folder in kept:
            load_train_state(folder)
            if (folder / MODEL_FILE).exists():
                load_checkpoint(folder)


def wait(look: Callable[[], T | None], complaint: Callable[[], str], every: float) -> T:
    """What `look` gives once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < end, complaint()
        time.sleep(every)
    return found


@contextmanager
def brought_up() -> Iterator[Cluster]:
    """Up from the project's own file, filled in; three logical CPUs a machine, so that workers with two each lie on different ones."""
    with hosts.started(3) as machines:
        generate_scenes(machines.shared / "scenes", num_train=NUM_IMAGES, num_val=13, num_test=10)
        text = (ROOT / "cluster/local.yaml").read_text(encoding="utf-8")
        for place, value in (("HEAD", machines[0].address), ("WORKER", machines[1].address), ("USER", "root")):
            text = text.replace(f"{place}-CHANGE-ME", value)
        text = text.replace("ray start", "ray start --num-cpus=3 --object-store-memory=300000000")
        content = yaml.safe_load(
            text.replace("export RAY_AUTH_MODE", "export RAY_raylet_start_wait_time_s=60 RAY_AUTH_MODE")
        )
        install = content["metadata"]["install"]
        content["setup_commands"] = ["true" if line == install else line for line in content["setup_commands"]]
        content["auth"]["ssh_private_key"] = "~/.ssh/id"
        (machines.shared / "local.yaml").write_text(yaml.safe_dump(content))
        made = Cluster(machines)
        made.on_laptop("ray get-auth-token --generate")
        made.on_laptop(f"python -m msrn_ray cluster check {FILE}")
        made.on_laptop(f"ray up -y {FILE}")
        made.on_laptop(f"nohup ray dashboard {FILE} >/dev/null 2>&1 </dev/null &")
        made.wait_for_machines()
        yield made
