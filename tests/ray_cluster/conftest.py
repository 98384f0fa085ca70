"""The made cluster that several test files share, and its undisturbed run.

pytest runs the files in the order of their names: `test_cluster_basics` is the first on the cluster, and `test_cluster_shutdown` the last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests import hosts
from tests.cluster_run import EPOCHS, Epoch, Report, Run, short_run, submit
from tests.made_cluster import RESULT, RUNS, Cluster, brought_up


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster, with Prometheus on its head."""
    reason = hosts.missing()
    if reason:
        pytest.skip(reason)
    with brought_up() as made:
        if shutil.which("prometheus"):
            made.start_prometheus()
        yield made


@pytest.fixture
def no_leftover_run(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[None]:
    """Stop the runs of a test that failed."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        for job in cluster.jobs():
            if job.is_active:
                cluster.stop(job.id)


@pytest.fixture(scope="session")
def quiet_run(cluster: Cluster) -> Run:
    """A finished short run on both nodes that nothing disturbed."""
    run = submit(cluster, "quiet", f"{short_run()} --resources.num-workers 2")
    run.wait_for(RESULT)
    assert run.worker_starts() == [2]
    listed = cluster.head.run(f"cd {hosts.ROOT}; python -m msrn_ray runs {RUNS}").stdout
    assert "quiet finished 6/6" in " ".join(listed.split())
    run.assert_finished(EPOCHS)
    return run


@pytest.fixture(scope="session")
def quiet(quiet_run: Run) -> list[Epoch]:
    """The epochs of the undisturbed short run."""
    epochs = quiet_run.epochs()
    assert epochs[-1].train_loss < 0.9 * epochs[0].train_loss, "it learned"
    return epochs


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Print how many seconds passed, by default from a fault to the first checkpoint of new workers."""

    def line(event: str, seconds: float) -> None:
        with capsys.disabled():
            print(f"\n{event}: {seconds:.1f} s")

    return line
