"""Faults of a made cluster, one after another, during runs that would train for long: no timing depends on this machine's speed.

Each test takes a run over from the test before. In the end, the scores of the runs are those of a run that nothing disturbed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

import pytest

from tests import browser
from tests.cluster_run import Epoch, Report, Run, submit
from tests.hosts import ROOT, SHARED
from tests.made_cluster import EPOCH_END, EPOCHS_LEFT, NO_HEARTBEAT, Cluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("no_leftover_run"),
]

LAST_EPOCH = 1000
OPTIONS = f"--train.epochs {LAST_EPOCH} --train.checkpoint-every '1000 steps'"  # only the ends of epochs are saved
# AWS's metadata server, as far as preemption notices go: it gives a token first, then 404 until there is a notice
_METADATA_SERVER = """
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


def start(cluster: Cluster, name: str, workers: str) -> Run:
    """Submit a run and wait until two workers are in its second epoch or later."""
    run = submit(cluster, name, f"{OPTIONS} --resources.num-workers {workers}")
    run.wait_for_start(0, workers=2)
    run.wait_for_checkpoint(1)
    return run


@pytest.fixture(scope="module")
def long_run(cluster: Cluster) -> Iterator[Run]:
    """A run that loses a node, gets it back, is stopped and resumed, and loses the node again after a notice."""
    run = start(cluster, "long", "1..2")
    yield run
    run.stop()


@pytest.fixture(scope="module")
def warned_run(cluster: Cluster) -> Iterator[Run]:
    """A run that moves to the other node after AWS's notice."""
    run = start(cluster, "warned", "1..2")
    yield run
    run.stop()


@pytest.fixture(scope="module")
def calm_run(cluster: Cluster, quiet: list[Epoch]) -> Iterator[Run]:
    """A run like the other two that nothing disturbs; the quiet run needs both nodes too, and comes before it."""
    run = start(cluster, "calm", "2")
    yield run
    run.stop()


def resume(run: Run) -> str:
    """Resume a stopped run where it stopped, and wait for its next checkpoint; return the log until its first epoch."""
    finished = len(run.epochs())
    run.resume()
    log = run.wait_for(EPOCHS_LEFT.format(first=r"\d+", last=LAST_EPOCH))
    (first,) = re.findall(EPOCHS_LEFT.format(first=r"(\d+)", last=LAST_EPOCH), log)
    assert finished <= int(first) <= finished + 2, "a line may be a little older or newer than its checkpoint"
    run.wait_for_checkpoint(int(first))
    return log


def test_lost_node_leaves_one_worker(cluster: Cluster, long_run: Run, report: Report) -> None:
    assert long_run.summary().state == "running"
    # without the key Ray cannot reach the node, and does not restart it before the run continues with one worker
    cluster.head.run("mv ray_bootstrap_key.pem away.pem")
    try:
        starts, fault = len(long_run.worker_starts()), time.time()
        cluster.kill_ray()
        report("lost node", long_run.recovered(starts, workers=1) - fault)
    finally:
        cluster.head.run("mv away.pem ray_bootstrap_key.pem")


def test_returned_node_gets_a_worker(cluster: Cluster, long_run: Run, report: Report) -> None:
    starts = len(long_run.worker_starts())
    cluster.wait_for_nodes()
    returned = time.time()
    report("returned node", long_run.recovered(starts, workers=2) - returned)
    assert not long_run.checkpoints_within_epochs(), "until a notice, only the ends of epochs are saved"


def test_stopped_job_resumes_where_it_stopped(cluster: Cluster, long_run: Run) -> None:
    long_run.stop()
    assert long_run.summary().state == "interrupted"
    assert len(long_run.epochs()) >= 20
    log = resume(long_run)
    assert long_run.worker_starts() == [2]
    assert not re.search(NO_HEARTBEAT, log), "the cluster had back what the stopped job requested"


def test_sigterm_for_the_watcher_is_a_notice(cluster: Cluster, long_run: Run, report: Report) -> None:
    """Schedulers other than AWS's give notice in this way."""
    starts, fault = len(long_run.worker_starts()), time.time()
    cluster.worker.run(
        f"{watch('http://127.0.0.1:9', seconds=30)} sleep 1; pkill -TERM -f '^/bin/bash cluster/watch_for_notice'"
    )
    saved = long_run.wait_for_checkpoint(1, after=fault, within_epoch=True)
    report("SIGTERM, and saved", saved - fault)
    long_run.recovered(starts, workers=1)
    long_run.stop()
    assert long_run.summary().state == "interrupted"
    cluster.restart_ray()


def test_preemption_notice_saves_within_the_epoch(cluster: Cluster, warned_run: Run, report: Report) -> None:
    """AWS's server announces that it takes the node away; the run continues on the other node."""
    assert not warned_run.checkpoints_within_epochs()
    (cluster.hosts.shared / "metadata.py").write_text(_METADATA_SERVER)
    cluster.worker.run(f"nohup python {SHARED}/metadata.py >/tmp/metadata.log 2>&1 </dev/null &")
    cluster.worker.run(watch("http://127.0.0.1:8123/latest", seconds=40))
    time.sleep(10)
    assert warned_run.worker_starts()[-1] == 2, "there is no notice yet"
    starts, fault = len(warned_run.worker_starts()), time.time()
    cluster.worker.run("touch /tmp/instance-action")
    saved = warned_run.wait_for_checkpoint(1, after=fault, within_epoch=True)
    report("preemption notice, and saved", saved - fault)
    report("preemption notice, and on the other node", warned_run.recovered(starts, workers=1) - fault)
    cluster.worker.run("rm /tmp/instance-action")
    warned_run.stop()
    assert warned_run.summary().state == "interrupted"
    cluster.restart_ray()  # AWS takes the node away, and it comes back
    resume(warned_run)
    warned_run.stop()


def test_browser_shows_the_run_with_the_token_only(cluster: Cluster, calm_run: Run) -> None:
    """Through `ray dashboard`: nothing without the token; with it, the run by its name, and both nodes."""
    reason = browser.missing()
    if reason:
        pytest.skip(reason)
    dashboard, token = "http://localhost:8265", cluster.on_laptop("cat ~/.ray/auth_token").strip()
    asked, refused, jobs, _ = browser.look(
        cluster.laptop,
        {"open": f"{dashboard}/#/jobs", "words": ["Authentication Token Required"]},
        {"type": "wrong", "words": ["Invalid authentication token"]},
        {"type": token, "words": [f" calm {calm_run.job}\n", "RUNNING"]},
        {"open": f"{dashboard}/#/cluster", "words": ["ALIVE\nx 2", cluster.head.address, cluster.worker.address]},
    )
    assert calm_run.job not in asked + refused
    assert "--train.run-name calm" in jobs


@pytest.mark.parametrize("name", ["long_run", "warned_run"])
def test_disturbed_run_scores_like_the_calm_run(
    request: pytest.FixtureRequest, name: str, calm_run: Run, quiet: list[Epoch]
) -> None:
    """Over so many epochs, rounding in another order grows: of later epochs the test compares means over ten."""
    run: Run = request.getfixturevalue(name)
    run.assert_whole()
    run.assert_same_scores(quiet)
    disturbed = run.epochs()
    for epoch in (*range(10, len(disturbed), 10), len(disturbed)):  # patience for ten at a time: a busy machine is slow
        calm_run.wait_for_checkpoint(epoch)
    calm_run.wait_for(EPOCH_END.format(epoch=len(disturbed), last=LAST_EPOCH))
    calm = calm_run.epochs()
    for ours, theirs in list(zip(disturbed, calm, strict=False))[:20]:
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=0.02), ours.number
        assert ours.val_map == pytest.approx(theirs.val_map, abs=0.05), ours.number
    for first in range(0, len(disturbed) - 9, 10):
        mean, expected = (means(epochs[first : first + 10]) for epochs in (disturbed, calm))
        assert mean.train_loss == pytest.approx(expected.train_loss, rel=0.08), first
        assert mean.val_loss == pytest.approx(expected.val_loss, rel=0.05), first
        assert mean.val_map == pytest.approx(expected.val_map, abs=0.02), first


def watch(metadata_server: str, seconds: int) -> str:
    """Return the command that starts the project's watcher for preemption notices in the background."""
    settings = f"RAY_AUTH_MODE=token NOTICE_SERVER={metadata_server} NOTICE_SECONDS={seconds}"
    return f"cd {ROOT}; {settings} nohup cluster/watch_for_notice.sh >/tmp/notice.log 2>&1 </dev/null &"


class Means(NamedTuple):
    """Means over several epochs."""

    train_loss: float
    val_loss: float
    val_map: float


def means(epochs: list[Epoch]) -> Means:
    """Return the means of their losses and scores."""
    return Means(
        fmean(epoch.train_loss for epoch in epochs),
        fmean(epoch.val_loss for epoch in epochs),
        fmean(epoch.val_map for epoch in epochs),
    )
