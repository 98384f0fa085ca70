"""Faults of a made cluster during short runs.

After each fault, three things must be true of the run: it ends by itself, each of its epochs trained on every image once, and its scores
are those of a run that nothing disturbed.
"""

from __future__ import annotations

import re
import time
from math import ceil

import pytest

from tests.cluster_run import EPOCHS, Epoch, Report, Run, short_run, submit
from tests.made_cluster import DISK_FULL, EPOCHS_LEFT, JOBS, RESULT, WORKER_FAILED, WORKERS_START, Cluster, wait

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("no_leftover_run"),
]


def start(cluster: Cluster, name: str, workers: str, epochs: int = EPOCHS) -> Run:
    """Submit a short run and wait until it is in its second epoch."""
    run = submit(cluster, name, f"{short_run(epochs)} --resources.num-workers {workers}")
    run.wait_for_checkpoint(2)
    return run


# Ray holds what a killed driver requested for three minutes. An elastic run waits for that, so the runs up to then have a fixed size.
def test_killed_driver_resumes_with_the_same_command(cluster: Cluster, quiet: list[Epoch], report: Report) -> None:
    run = start(cluster, "driver", "2")
    fault = time.time()
    cluster.head.kill("msrn_ray train .*--train.run-name driver")
    wait(
        lambda: "exit code -9" in cluster.on_laptop(f"ray job status {JOBS} {run.job}", check=False),
        lambda: "the job lives",
        every=0.2,
    )
    assert len(run.epochs()) < EPOCHS, "the driver was killed half-way"
    run.resume()
    report("killed driver, submitted again at once", run.recovered(starts=0) - fault)
    run.wait_for(RESULT)
    assert 2 in run.worker_starts()
    run.assert_finished(EPOCHS)
    run.assert_same_scores(quiet)


def test_killed_worker_is_replaced(cluster: Cluster, quiet: list[Epoch], report: Report) -> None:
    run = start(cluster, "worker", "2")
    starts, fault = len(run.worker_starts()), time.time()
    cluster.worker.kill("^ray::RayTrainWorker")
    report("killed worker", run.recovered(starts) - fault)
    log = run.wait_for(RESULT)
    restart = f"{WORKERS_START.format(workers=2)}.* {EPOCHS_LEFT.format(first=f'[2-{EPOCHS}]', last=EPOCHS)}"
    assert re.search(f"{WORKER_FAILED}(?s:.*){restart}", log), log
    run.assert_finished(EPOCHS)
    run.assert_same_scores(quiet)


def test_network_cut_for_half_a_minute(cluster: Cluster, quiet: list[Epoch], report: Report) -> None:
    run = start(cluster, "cut", "2")
    fault = time.time()
    cluster.worker.cut_off()
    try:
        time.sleep(30)
        assert len(run.epochs()) < EPOCHS, "it waited"
    finally:
        cluster.worker.reconnect()
    report("network cut for 30 s", run.wait_for_checkpoint(2, after=fault + 30) - fault)
    run.wait_for(RESULT)
    run.assert_finished(EPOCHS)
    run.assert_same_scores(quiet)


@pytest.mark.parametrize("workers", ["2", "1..2"])
def test_full_disk_ends_the_worker_there(cluster: Cluster, quiet: list[Epoch], report: Report, workers: str) -> None:
    """No process can start on that node any more: a run of fixed size waits for room, another continues with one worker."""
    # the run must outlast the seconds until the full disk is noticed, on a fast machine too
    epochs = EPOCHS + ceil(30 * quiet[-1].images_per_second / quiet[-1].images)
    run = start(cluster, f"disk-{workers[0]}", workers, epochs)
    node = cluster.nodes()[cluster.worker.address]
    assert "No space left" in cluster.worker.run("cat /dev/zero > /fills", check=False).stdout
    try:
        starts, fault = len(run.worker_starts()), time.time()
        run.wait_for(DISK_FULL.format(address=cluster.worker.address))
        if workers != "2":
            report("full disk", run.recovered(starts, workers=1) - fault)
            run.wait_for(RESULT)
    finally:
        cluster.worker.run("rm /fills")
    run.wait_for(RESULT)
    run.assert_finished(epochs)
    run.assert_same_scores(quiet)
    cluster.wait_for_new_node(node)


def test_network_cut_for_good(cluster: Cluster, quiet: list[Epoch], report: Report) -> None:
    """After a minute without an answer the node counts as lost, and its Ray gives up too. Reachable again, it comes back."""
    node = cluster.nodes()[cluster.worker.address]
    run = start(cluster, "away", "1..2")
    starts, fault = len(run.worker_starts()), time.time()
    cluster.worker.cut_off()
    try:
        report("network cut for good", run.recovered(starts, workers=1) - fault)
        run.wait_for(RESULT)
        run.assert_finished(EPOCHS)
        cluster.wait_for_no_ray(cluster.worker)
    finally:
        cluster.worker.reconnect()
    run.assert_same_scores(quiet)
    reconnected = time.time()
    cluster.wait_for_new_node(node)
    report("taken in again", time.time() - reconnected)
