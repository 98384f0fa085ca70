"""A cluster as a user makes it, of machines that the test makes: `ray up cluster/local.yaml`, jobs, faults, `ray down`.

What must be true of a run after a fault: it ends by itself, and each of its epochs trained on every image once (the run checks that against
the order of the epoch, see `accounting`, and stops where it is not so).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from msrn_ray.datasets.scenes import generate_scenes

from . import hosts
from .hosts import ROOT, SHARED, Hosts

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_IMAGES, EPOCHS = 50, 8
PATIENCE = 400.0  # seconds until something that takes some on a quiet machine
FILE = f"{SHARED}/local.yaml"
RUN = (
    f"python -m msrn_ray train scenes --data.dataset coco --data.root {SHARED}/scenes --data.image-size 64 --model.embed-dim 32"
    f" --model.compile off --train.amp off --train.epochs {EPOCHS} --train.batch-size 10 --train.log-every 1"
    " --train.checkpoint-every '1000 steps' --resources.cpus-per-worker 2"
)


@dataclass
class Cluster:
    """Head and worker are `hosts[0]` and `hosts[1]`; `ray up` was called on `hosts[2]`."""

    hosts: Hosts

    def on_laptop(self, command: str, check: bool = True) -> str:
        """What a user's command prints, in the project's folder, with the token."""
        return (
            self.hosts[2].run(f"cd {ROOT}; export RAY_AUTH_MODE=token; {command}", timeout=PATIENCE, check=check).stdout
        )

    def submit(self, options: str) -> str:
        """Submits a training run as the README does; its job's name."""
        metadata = json.dumps({"job_name": "test"})
        told = self.on_laptop(
            f"ray job submit --address http://localhost:8265 --working-dir . --metadata-json '{metadata}' --no-wait -- {RUN} {options}"
        )
        return re.findall(r"Job '(raysubmit_\w+)' submitted", told)[0]

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        return self.hosts[0].run(f"cat /tmp/ray/session_latest/logs/job-driver-{job}.log || true").stdout

    def wait_for(self, job: str, pattern: str) -> str:
        """The job's log, once it has the pattern."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, log := self.log(job)):
            assert time.monotonic() < end, f"{pattern} never came:\n{log}"
            assert "Traceback" not in log, log
            time.sleep(0.5)
        return log

    def state(self, run: str) -> list[str]:
        """The line of `msrn runs` for a run."""
        lines = self.hosts[0].run(f"cd {ROOT}; python -m msrn_ray runs {SHARED}/runs").stdout.splitlines()
        return next(line.split() for line in lines if line.startswith(f"{run} "))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Up from the project's own file, filled in; three logical CPUs a machine, so that workers with two each lie on different ones."""
    reason = hosts.missing()
    if reason:
        pytest.skip(reason)
    with hosts.started(3) as machines:
        generate_scenes(machines.shared / "scenes", num_train=NUM_IMAGES, num_val=13, num_test=10)
        text = (ROOT / "cluster/local.yaml").read_text(encoding="utf-8")
        for place, value in (("HEAD", machines[0].address), ("WORKER", machines[1].address), ("USER", "root")):
            text = text.replace(f"{place}-CHANGE-ME", value)
        text = text.replace("ray start", "ray start --num-cpus=3 --object-store-memory=300000000")
        content = yaml.safe_load(
            text.replace("export RAY_AUTH_MODE", "export RAY_raylet_start_wait_time_s=200 RAY_AUTH_MODE")
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
        end = time.monotonic() + PATIENCE
        while "2 local.cluster.node" not in made.hosts[0].run("RAY_AUTH_MODE=token ray status", check=False).stdout:
            assert time.monotonic() < end, "the worker never came"
            time.sleep(1)
        yield made


def test_only_who_has_the_token_gets_in(cluster: Cluster) -> None:
    listing = "ray job list --address http://localhost:8265"
    assert "SubmissionStatus" not in cluster.on_laptop(listing), "there is no job yet"
    for attempt in ("RAY_AUTH_TOKEN=wrong", "RAY_AUTH_MODE=disabled"):
        told = cluster.on_laptop(f"export {attempt}; {listing}", check=False)
        assert re.search("Unauthorized|Forbidden|401|403", told), told
    join = (
        f"export RAY_AUTH_TOKEN=wrong RAY_ADDRESS={cluster.hosts[0].address}:6379; {RUN} --train.storage {SHARED}/runs"
    )
    told = cluster.hosts[0].run(f"cd {ROOT}; export RAY_AUTH_MODE=token; {join}", check=False).stdout
    assert "msrn: error: RAY_ADDRESS 10.77.0.2:6379: the cluster refuses this machine's token (401)" in told
    assert "Traceback" not in told
    assert not (cluster.hosts.shared / "runs").exists()


def test_what_cannot_work_is_refused_at_once(cluster: Cluster) -> None:
    """More workers than there can be, and a folder that each machine has for itself."""
    head = cluster.hosts[0]
    start = f"cd {ROOT}; export RAY_AUTH_MODE=token RAY_ADDRESS=auto; {RUN}"
    told = head.run(f"{start} --resources.num-workers 4 --train.storage {SHARED}/runs", check=False)
    assert told.returncode == 2
    assert re.search(r"num_workers=4 x 2 CPUs, and one for decoding, .* has 6 CPUs", told.stdout), told.stdout
    told = head.run(f"{start} --train.storage /root/runs --train.run-name lost", check=False)
    assert told.returncode == 2
    assert "train.storage /root/runs: not the same folder on 10.77.0.3 as where the run was started" in told.stdout
    assert head.run("ls -A /root/runs").stdout == ""


def test_a_notice_a_lost_machine_a_stopped_job_and_the_same_job_again(cluster: Cluster) -> None:
    worker = cluster.hosts[1]
    options = f"--train.storage {SHARED}/runs --train.run-name faults --or-resume --resources.num-workers 1..2"
    job = cluster.submit(options)
    cluster.wait_for(job, r"training on 2 x cpu in float32")
    cluster.wait_for(job, r"epoch 1/8  train/loss")
    assert cluster.state("faults")[1] == "running"

    # the machine is told that it will be taken away: a checkpoint at once, and the run goes on without it
    worker.run(
        f"cd {ROOT}; RAY_AUTH_MODE=token NOTICE_SERVER=http://127.0.0.1:9 NOTICE_SECONDS=20 nohup cluster/watch_for_notice.sh"
        " >/tmp/notice.log 2>&1 </dev/null & sleep 1; pkill -TERM -f '^/bin/bash cluster/watch_for_notice'"
    )
    cluster.wait_for(job, r"(?s)training on 2 x.*training on \d x cpu")

    # and it is taken away
    worker.run("pkill -KILL -x raylet; pkill -KILL -f 'ray::|ray/_private|ray/dashboard'", check=False)
    cluster.wait_for(job, r"epoch 4/8  train/loss")

    cluster.on_laptop(f"ray job stop --address http://localhost:8265 {job}")
    assert cluster.state("faults")[1] == "interrupted"
    job = cluster.submit(options)
    cluster.wait_for(job, r"val mAP \d")
    lines = [json.loads(line) for line in (cluster.hosts.shared / "runs/faults/metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["train/images"]) for line in lines] == [
        (epoch, NUM_IMAGES) for epoch in range(1, EPOCHS + 1)
    ]
    assert cluster.state("faults")[1:3] == ["finished", "8/8"]
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"], "it learned"


def test_down_leaves_no_process(cluster: Cluster) -> None:
    """Last of this file: it ends the cluster. Workers notice that the head is gone within a minute."""
    cluster.on_laptop(f"ray down -y {FILE}")
    end = time.monotonic() + PATIENCE
    while any(host.processes("raylet|gcs_server|ray::") for host in cluster.hosts.machines[:2]):
        assert time.monotonic() < end, "something of Ray is still there"
        time.sleep(1)
