"""A made cluster that works: who gets in, what it refuses, what the job list and Prometheus show."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.cluster_run import EPOCHS, Epoch, Run
from tests.hosts import ROOT
from tests.made_cluster import BAD_TOKEN, JOBS, NO_TOKEN, NOT_SHARED, RUNS, TOO_MANY_WORKERS, TRAIN, Cluster, wait

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("no_leftover_run"),
]


def test_job_list_needs_the_token(cluster: Cluster) -> None:
    listing = f"ray job list {JOBS}"
    assert "submission_id" not in cluster.on_laptop(listing), "the first test of the cluster: it has no job yet"
    for attempt in ("RAY_AUTH_TOKEN=wrong", "RAY_AUTH_MODE=disabled"):
        printed = cluster.on_laptop(f"export {attempt}; {listing}", check=False)
        assert re.search("Unauthorized|Forbidden|401|403", printed), printed


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong", BAD_TOKEN),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/missing", NO_TOKEN),
        ("RAY_AUTH_MODE=disabled", r"\(401\)"),
    ],
)
def test_training_needs_the_token(cluster: Cluster, environment: str, message: str) -> None:
    join = f"export RAY_ADDRESS={cluster.head.address}:6379; {TRAIN} --train.storage {RUNS}"
    printed = cluster.head.run(f"cd {ROOT}; export {environment}; {join}", check=False).stdout
    assert "msrn: error: RAY_ADDRESS 10.77.0.2:6379: " in printed, printed
    assert re.search(message, printed), printed
    assert "Traceback" not in printed
    assert not (cluster.hosts.shared / "runs").exists()


def test_too_many_workers_are_refused_at_once(cluster: Cluster) -> None:
    assert re.search(TOO_MANY_WORKERS, refusal(cluster, f"--resources.num-workers 4 --train.storage {RUNS}"))


def test_storage_that_is_not_shared_is_refused(cluster: Cluster) -> None:
    """Each node has this folder for itself."""
    assert re.search(NOT_SHARED, refusal(cluster, "--train.storage /root/runs --train.run-name lost"))
    assert cluster.head.run("ls -A /root/runs").stdout == ""


def refusal(cluster: Cluster, options: str) -> str:
    """Return what a run prints that cannot work."""
    begin = f"cd {ROOT}; export RAY_AUTH_MODE=token RAY_ADDRESS=auto; {TRAIN}"
    refused = cluster.head.run(f"{begin} {options}", check=False)
    assert refused.returncode == 2
    return refused.stdout


def test_job_list_shows_the_job_name(cluster: Cluster, quiet_run: Run) -> None:
    """The README's command gives the job its name; the dashboard's page makes its list from this answer, through `ray dashboard`."""

    def is_listed() -> bool:
        (job,) = [job for job in cluster.jobs(cluster.laptop) if job.name == "quiet"]
        assert "--train.run-name quiet" in job.command
        return job.status == "SUCCEEDED"

    wait(is_listed, lambda: f"it did not end: {cluster.jobs()}", every=0.5)


def test_prometheus_on_the_head_sees_both_nodes(cluster: Cluster, quiet: list[Epoch]) -> None:
    """The figures of each rank come from the node on which the rank ran, with the name of the run."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    samples = cluster.ask_prometheus('last_over_time(ray_msrn_images_per_second{run="quiet"}[1h])')
    addresses = {sample.labels["rank"]: sample.labels["instance"].split(":")[0] for sample in samples}
    assert sorted(addresses) == ["0", "1"]
    assert set(addresses.values()) == {cluster.head.address, cluster.worker.address}
    (epoch,) = cluster.ask_prometheus('max(last_over_time(ray_msrn_epoch{run="quiet"}[1h]))')
    assert 1 <= epoch.value <= EPOCHS, "Ray exports figures every 10 s; it may miss the last ones"
