"""A cluster as a user makes it, of machines that the test makes: `ray up cluster/local.yaml`, jobs, faults, `ray down`.

What must be true of a run after a fault: it ends by itself, each of its epochs trained on every image once, and its scores are those of a
run that nothing disturbed.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from math import ceil
from statistics import fmean
from typing import Any

import pytest

from tests import browser, hosts
from tests.hosts import ROOT, SHARED
from tests.made_cluster import FILE, RUN, RUNS, Cluster, brought_up, wait

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

EPOCHS = 6
Tell = Callable[[str, float], None]
# AWS's server for metadata, as far as notices go: a token first, then 404 until there is a notice
_NOTICES = """
import http.server, os
class Metadata(http.server.BaseHTTPRequestHandler):
    def answer(self, status, text=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_PUT(self):
        right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, b"secret") if right else self.answer(400)
    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "secret":
            return self.answer(401)
        there = self.path == "/latest/meta-data/spot/instance-action" and os.path.exists("/tmp/instance-action")
        self.answer(200, b'{"action": "terminate"}') if there else self.answer(404)
http.server.HTTPServer(("127.0.0.1", 8123), Metadata).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = hosts.missing()
    if reason:
        pytest.skip(reason)
    with brought_up() as made:
        if shutil.which("prometheus"):
            made.watch()
        yield made


@pytest.fixture(autouse=True)
def no_run_is_left(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[None]:
    """A test that failed leaves no run to the next one."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        for job in cluster.jobs():
            if job["status"] in ("PENDING", "RUNNING"):
                cluster.stop(job["submission_id"])


@pytest.fixture(scope="module")
def quiet(cluster: Cluster) -> list[dict[str, Any]]:
    """Metrics of each epoch of a run on both machines that nothing disturbs."""
    job = cluster.submit("quiet", f"{short()} --resources.num-workers 2")
    assert "training on 2 x cpu in float32" in cluster.wait_for(job, r"val mAP \d")
    assert_finished(cluster, "quiet")
    lines = cluster.lines("quiet")
    assert lines[-1]["train/loss"] < 0.9 * lines[0]["train/loss"], "it learned"
    return lines


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Prints how long it took from a fault, unless it says else, to the first checkpoint of new workers."""

    def line(fault: str, seconds: float) -> None:
        with capsys.disabled():
            print(f"\n{fault}: {seconds:.1f} s")

    return line


def short(epochs: int = EPOCHS) -> str:
    """Options of a run that saves often."""
    return f"--train.epochs {epochs} --train.checkpoint-every '2 steps'"


def assert_finished(cluster: Cluster, run: str, epochs: int = EPOCHS) -> None:
    assert cluster.state(run)[1:3] == ["finished", f"{epochs}/{epochs}"]
    cluster.assert_whole(run)


def assert_as_quiet(cluster: Cluster, run: str, quiet: list[dict[str, Any]]) -> None:
    """Losses and scores of each epoch are those of the quiet run, whatever happened and with however many workers."""
    for line, other in zip(cluster.lines(run), quiet, strict=False):  # a run may go on for longer
        for name in ("train/loss", "val/loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-3), (line["epoch"], name)
        assert line["val/mAP"] == pytest.approx(other["val/mAP"], abs=0.02), line["epoch"]


def start(cluster: Cluster, run: str, options: str, epochs: int = EPOCHS) -> str:
    """Submits a short run and waits until it is in its second epoch; its job."""
    job = cluster.submit(run, f"{short(epochs)} {options}")
    cluster.wait_for_checkpoint(run, 2)
    return job


def recovered(cluster: Cluster, job: str, run: str, workers: str = r"\d", times: int = 1) -> float:
    """When new workers of a job, the `times`th ones that are so many, have saved a checkpoint (seconds since 1970)."""
    cluster.wait_for(job, rf"training on {workers} x cpu", times=times)
    return cluster.wait_for_checkpoint(run, 1, after=time.time())


def test_only_who_has_the_token_gets_in(cluster: Cluster) -> None:
    listing = "ray job list --address http://localhost:8265"
    assert "submission_id" not in cluster.on_laptop(listing), "there is no job yet"
    for attempt in ("RAY_AUTH_TOKEN=wrong", "RAY_AUTH_MODE=disabled"):
        told = cluster.on_laptop(f"export {attempt}; {listing}", check=False)
        assert re.search("Unauthorized|Forbidden|401|403", told), told
    join = f"export RAY_ADDRESS={cluster.hosts[0].address}:6379; {RUN} --train.storage {RUNS}"
    for attempt, words in (
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong", "the cluster refuses this machine's token (401)"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/missing", "no token for the cluster on this machine"),
        ("RAY_AUTH_MODE=disabled", "(401)"),
    ):
        told = cluster.hosts[0].run(f"cd {ROOT}; export {attempt}; {join}", check=False).stdout
        assert "msrn: error: RAY_ADDRESS 10.77.0.2:6379: " in told, told
        assert words in told, told
        assert "Traceback" not in told
    assert not (cluster.hosts.shared / "runs").exists()


def test_what_cannot_work_is_refused_at_once(cluster: Cluster) -> None:
    """More workers than there can be, and a folder that each machine has for itself."""
    head = cluster.hosts[0]
    begin = f"cd {ROOT}; export RAY_AUTH_MODE=token RAY_ADDRESS=auto; {RUN}"
    told = head.run(f"{begin} --resources.num-workers 4 --train.storage {RUNS}", check=False)
    assert told.returncode == 2
    assert re.search(r"num_workers=4 x 2 CPUs, and one for decoding, .* has 6 CPUs", told.stdout), told.stdout
    told = head.run(f"{begin} --train.storage /root/runs --train.run-name lost", check=False)
    assert told.returncode == 2
    assert "train.storage /root/runs: not the same folder on 10.77.0.3 as where the run was started" in told.stdout
    assert head.run("ls -A /root/runs").stdout == ""


def test_a_job_has_a_name_in_the_dashboard(cluster: Cluster, quiet: list[dict[str, Any]]) -> None:
    """The name that the README's command gives it is in what the dashboard's list of jobs is made of."""
    ask = 'curl -sS -H "Authorization: Bearer $(cat ~/.ray/auth_token)" http://localhost:8265/api/jobs/'

    def listed() -> dict[str, Any]:
        (job,) = [each for each in json.loads(cluster.on_laptop(ask)) if each["metadata"].get("job_name") == "quiet"]
        return dict(job)

    wait(lambda: listed()["status"] == "SUCCEEDED", lambda: f"it did not end: {listed()}", every=1)
    assert "--train.run-name quiet" in listed()["entrypoint"]


def test_the_dashboard_in_a_browser_during_a_run(cluster: Cluster) -> None:
    """Through `ray dashboard`: nothing is shown without the token; with it, the run by its name, and both machines."""
    reason = browser.missing()
    if reason:
        pytest.skip(reason)
    job = cluster.submit("seen", "--train.epochs 1000 --resources.num-workers 2")
    cluster.wait_for_checkpoint("seen", 1)
    dashboard, token = "http://localhost:8265", cluster.on_laptop("cat ~/.ray/auth_token").strip()
    addresses = [host.address for host in cluster.hosts.machines[:2]]
    asked, refused, jobs, _ = browser.look(
        cluster.hosts[2],
        {"open": f"{dashboard}/#/jobs", "words": ["Authentication Token Required"]},
        {"type": "wrong", "words": ["Invalid authentication token"]},
        {"type": token, "words": [f" seen {job}\n", "RUNNING"]},
        {"open": f"{dashboard}/#/cluster", "words": ["ALIVE\nx 2", *addresses]},
    )
    cluster.stop(job)
    assert job not in asked + refused
    assert "--train.run-name seen" in jobs


def test_prometheus_on_the_head_sees_both_machines(cluster: Cluster, quiet: list[dict[str, Any]]) -> None:
    """Each rank's figures come from the machine that it ran on, with the name of the run."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    lines = cluster.ask_prometheus('last_over_time(ray_msrn_images_per_second{run="quiet"}[1h])')
    seen = {line["metric"]["rank"]: line["metric"]["instance"].split(":")[0] for line in lines}
    assert sorted(seen) == ["0", "1"]
    assert set(seen.values()) == {cluster.hosts[0].address, cluster.hosts[1].address}
    (epoch,) = cluster.ask_prometheus('max(last_over_time(ray_msrn_epoch{run="quiet"}[1h]))')
    assert 1 <= float(epoch["value"][1]) <= len(quiet), "Ray passes figures on every 10 s; the last ones may be missed"


def test_a_killed_worker_on_the_second_machine(cluster: Cluster, quiet: list[dict[str, Any]], tell: Tell) -> None:
    job = start(cluster, "worker", "--resources.num-workers 2")
    fault = time.time()
    cluster.hosts[1].kill("^ray::RayTrainWorker")
    tell("killed worker", recovered(cluster, job, "worker", times=2) - fault)
    log = cluster.wait_for(job, r"val mAP \d")
    assert re.search(rf"worker \d failed: (?s:.*)training on 2 x cpu in .* epochs [2-{EPOCHS}] to {EPOCHS}", log), log
    assert_finished(cluster, "worker")
    assert_as_quiet(cluster, "worker", quiet)


def test_a_killed_driver_and_the_same_job_again(cluster: Cluster, quiet: list[dict[str, Any]], tell: Tell) -> None:
    options = "--resources.num-workers 2"
    job = start(cluster, "driver", options)
    fault = time.time()
    cluster.hosts[0].kill("msrn_ray train .*--train.run-name driver")
    wait(
        lambda: (
            "exit code -9" in cluster.on_laptop(f"ray job status --address http://localhost:8265 {job}", check=False)
        ),
        lambda: "the job lives",
        every=1,
    )
    assert len(cluster.lines("driver")) < EPOCHS, "it was killed half-way"
    job = cluster.submit("driver", f"{short()} {options}")
    tell("killed driver, submitted again at once", recovered(cluster, job, "driver") - fault)
    assert "training on 2 x cpu" in cluster.wait_for(job, r"val mAP \d")
    assert_finished(cluster, "driver")
    assert_as_quiet(cluster, "driver", quiet)


@pytest.mark.parametrize("workers", ["1..2", "2"])
def test_a_full_disk_on_the_second_machine(
    cluster: Cluster, quiet: list[dict[str, Any]], tell: Tell, workers: str
) -> None:
    """No process can be started there any more, and the worker there ends: the other one goes on, or waits until there is room again."""
    run = f"disk-{workers[0]}"
    # it is noticed within some seconds: the run must go on for longer, however fast this machine is
    epochs = EPOCHS + ceil(30 * quiet[-1]["train/images_per_second"] / quiet[-1]["train/images"])
    job = start(cluster, run, f"--resources.num-workers {workers}", epochs)
    worker = cluster.hosts[1]
    node = cluster.nodes()[worker.address]
    assert "No space left" in worker.run("cat /dev/zero > /fills", check=False).stdout
    try:
        fault = time.time()
        cluster.wait_for(job, f"node {worker.address}: the disk of /tmp/ray/.* is full; nothing more is started there")
        if workers != "2":
            tell("full disk", recovered(cluster, job, run, workers="1") - fault)
            cluster.wait_for(job, r"val mAP \d")
    finally:
        worker.run("rm /fills")
    cluster.wait_for(job, r"val mAP \d")
    assert_finished(cluster, run, epochs)
    assert_as_quiet(cluster, run, quiet)
    cluster.wait_for_another(1, node)


def test_a_network_that_is_cut_for_half_a_minute(cluster: Cluster, quiet: list[dict[str, Any]], tell: Tell) -> None:
    job = start(cluster, "cut", "--resources.num-workers 2")
    fault = time.time()
    cluster.hosts[1].cut_off()
    try:
        time.sleep(30)
        assert len(cluster.lines("cut")) < EPOCHS, "it waited"
    finally:
        cluster.hosts[1].join()
    again = cluster.wait_for_checkpoint("cut", 2, after=fault + 30)
    tell("network cut for 30 s", again - fault)
    cluster.wait_for(job, r"val mAP \d")
    assert_finished(cluster, "cut")
    assert_as_quiet(cluster, "cut", quiet)


def test_a_lost_machine_one_that_joins_a_notice_a_stopped_job_and_the_same_job_again(
    cluster: Cluster, quiet: list[dict[str, Any]], tell: Tell
) -> None:
    """A run that would go on for long: what happens to it does not depend on how fast this machine is."""
    worker = cluster.hosts[1]
    options = "--train.epochs 1000 --train.checkpoint-every '1000 steps' --resources.num-workers 1..2"
    job = cluster.submit("long", options)
    cluster.wait_for(job, r"training on 2 x cpu in float32")
    cluster.wait_for_checkpoint("long", 1)
    assert cluster.state("long")[1] == "running"

    # without the key Ray cannot reach the machine, and does not start it again before the run goes on with one worker
    cluster.hosts[0].run("mv ray_bootstrap_key.pem away.pem")
    fault = time.time()
    cluster.kill_ray(1)
    tell("lost machine", recovered(cluster, job, "long", workers="1") - fault)
    cluster.hosts[0].run("mv away.pem ray_bootstrap_key.pem")
    cluster.wait_for_machines()
    joined = time.time()
    tell("joined machine", recovered(cluster, job, "long", workers="2", times=2) - joined)

    # AWS's server tells that it will be taken away; until then only ends of epochs were saved
    assert not list(cluster.hosts.shared.glob("runs/long/*_step_*"))
    (cluster.hosts.shared / "notices.py").write_text(_NOTICES)
    worker.run(f"nohup python {SHARED}/notices.py >/tmp/notices.log 2>&1 </dev/null &")
    worker.run(
        f"cd {ROOT}; RAY_AUTH_MODE=token NOTICE_SERVER=http://127.0.0.1:8123/latest NOTICE_SECONDS=60 nohup"
        " cluster/watch_for_notice.sh >/tmp/notice.log 2>&1 </dev/null &"
    )
    time.sleep(10)
    assert "training on 1" not in cluster.log(job).rpartition("training on 2")[2], "there is no notice yet"
    fault = time.time()
    worker.run("touch /tmp/instance-action")
    saved = cluster.wait_for_checkpoint("long", 1, after=fault, half_way=True)
    tell("notice, and saved", saved - fault)
    tell("notice, and on the other machine", recovered(cluster, job, "long", workers="1", times=2) - fault)
    worker.run("rm /tmp/instance-action")
    cluster.restart(1)  # it is taken away, and comes back

    cluster.stop(job)
    assert cluster.state("long")[1] == "interrupted"
    done = len(cluster.lines("long"))
    assert done >= 20
    job = cluster.submit("long", options)
    told = cluster.wait_for(job, "training on 2 x cpu")
    (first,) = re.findall(r"epochs (\d+) to 1000", told)
    assert done <= int(first) <= done + 2, "a line may be written a little before or after its checkpoint is listed"
    cluster.wait_for_checkpoint("long", int(first))
    assert "no heartbeat" not in told, "what the stopped job had asked of the cluster was given back"
    cluster.stop(job)
    assert cluster.state("long")[1] == "interrupted"
    cluster.assert_whole("long")
    assert_as_quiet(cluster, "long", quiet)

    # the same epochs, undisturbed; over so many, rounding in another order grows, so of later ones means over ten are compared
    done = len(cluster.lines("long"))
    job = cluster.submit("calm", options.replace("1..2", "2"))
    cluster.wait_for_checkpoint("calm", done)
    cluster.wait_for(job, f"epoch {done}/1000  train/loss")
    cluster.stop(job)
    for line, other in list(zip(cluster.lines("long"), cluster.lines("calm"), strict=False))[:20]:
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=0.02), line["epoch"]
        assert line["val/mAP"] == pytest.approx(other["val/mAP"], abs=0.05), line["epoch"]
    for first in range(0, done - 9, 10):
        for name, noise in (("train/loss", {"rel": 0.08}), ("val/loss", {"rel": 0.05}), ("val/mAP", {"abs": 0.02})):
            long, calm = (
                fmean(line[name] for line in cluster.lines(run)[first : first + 10]) for run in ("long", "calm")
            )
            assert long == pytest.approx(calm, **noise), (first, name)


def test_sigterm_for_the_watcher_is_a_notice_too(cluster: Cluster, tell: Tell) -> None:
    """As schedulers other than AWS's give it."""
    job = cluster.submit(
        "told", "--train.epochs 1000 --train.checkpoint-every '1000 steps' --resources.num-workers 1..2"
    )
    cluster.wait_for(job, r"training on 2 x cpu")
    cluster.wait_for_checkpoint("told", 1)
    fault = time.time()
    cluster.hosts[1].run(
        f"cd {ROOT}; RAY_AUTH_MODE=token NOTICE_SERVER=http://127.0.0.1:9 NOTICE_SECONDS=20 nohup cluster/watch_for_notice.sh"
        " >/tmp/notice.log 2>&1 </dev/null & sleep 1; pkill -TERM -f '^/bin/bash cluster/watch_for_notice'"
    )
    tell("SIGTERM, and saved", cluster.wait_for_checkpoint("told", 1, after=fault, half_way=True) - fault)
    recovered(cluster, job, "told", workers="1")
    cluster.stop(job)
    cluster.assert_whole("told")
    cluster.restart(1)


def test_a_network_that_is_cut_for_good(cluster: Cluster, quiet: list[dict[str, Any]], tell: Tell) -> None:
    """After a minute without an answer the machine counts as lost, and it gives up as well; once it can be reached it is taken in again."""
    worker = cluster.hosts[1]
    node = cluster.nodes()[worker.address]
    job = start(cluster, "away", "--resources.num-workers 1..2")
    fault = time.time()
    worker.cut_off()
    try:
        tell("network cut for good", recovered(cluster, job, "away", workers="1") - fault)
        cluster.wait_for(job, r"val mAP \d")
        assert_finished(cluster, "away")
        wait(lambda: not cluster.has_ray(1), lambda: "something of Ray is still there", 1)
    finally:
        worker.join()
    assert_as_quiet(cluster, "away", quiet)
    joined = time.time()
    cluster.wait_for_another(1, node)
    tell("taken in again", time.time() - joined)


def test_down_leaves_no_process(cluster: Cluster) -> None:
    """Last of this file: it ends the cluster. Workers notice that the head is gone within a minute."""
    cluster.wait_for_machines()
    cluster.on_laptop(f"ray down -y {FILE}")
    wait(lambda: not (cluster.has_ray(0) or cluster.has_ray(1)), lambda: "something of Ray is still there", 1)
    time.sleep(30)
    assert [cluster.has_ray(0), cluster.has_ray(1)] == [False, False], "nothing starts it again"
