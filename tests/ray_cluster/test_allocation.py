"""How many workers a run gets, and which requests are refused. Ray itself never starts."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.allocation import Allocation, allocate, decode_cpus, with_fewer
from msrn_ray.ray_train.torch_trainer import scaling_config
from msrn_ray.settings import ResourceSettings

from .fake_cluster import LARGEST, cluster


@pytest.mark.parametrize(
    ("cores", "cpus", "gpus", "settings", "expected"),
    [
        (1, 2, None, {}, Allocation(1, False, 1)),
        (2, 4, None, {}, Allocation(2, False, 1)),
        (16, 18, None, {}, Allocation(2, False, 1)),
        (16, 2, None, {}, Allocation(1, False, 1)),
        (16, 17, 0, {"cpus_per_worker": 8}, Allocation(2, False, 8)),
        (16, 36, 4, {}, Allocation(4, True, 1)),
        (1, 9, 1, {}, Allocation(1, True, 1)),
        (16, 36, 4, {"num_workers": 2}, Allocation(2, True, 1)),
        (16, 36, 4, {"use_gpu": False}, Allocation(2, False, 1)),
        (16, 36, 4, {"use_gpu": False, "num_workers": 5}, Allocation(5, False, 1)),
        (2, 40, None, {"num_workers": 8, "cpus_per_worker": 2}, Allocation(8, False, 2)),
        (2, 5, None, {"num_workers": 4}, Allocation(4, False, 1)),
        (2, 40, None, {"num_workers": "2..8"}, Allocation(8, False, 1, (2, 8))),
        (2, 6, None, {"num_workers": "2..8"}, Allocation(5, False, 1, (2, 5))),
        (2, 9, None, {"num_workers": "2..8", "cpus_per_worker": 4}, Allocation(2, False, 4, None)),
        (16, 36, 4, {"num_workers": "2..8"}, Allocation(4, True, 1, (2, 8))),
    ],
)
def test_what_a_run_takes(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    cpus: float,
    gpus: float | None,
    settings: dict[str, Any],
    expected: Allocation,
) -> None:
    cluster(monkeypatch, cpus=cpus, gpus=gpus, cores=cores)
    assert allocate(ResourceSettings(**settings)) == expected
    assert expected.num_workers * expected.cpus_per_worker < cpus, "a CPU is left to decode images"


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "words"),
    [
        (4, None, {"num_workers": 5}, ("resources.num_workers=5", "4 CPUs")),
        (4, None, {"num_workers": 4}, ("resources.num_workers=4", "one for decoding", "4 CPUs")),
        (4, None, {"num_workers": 2, "cpus_per_worker": 2}, ("resources.num_workers=2 x 2 CPUs", "4 CPUs")),
        (4.5, None, {"num_workers": 4}, ("resources.num_workers=4", "4.5 CPUs")),
        (64, 4, {"num_workers": 5}, ("resources.num_workers=5", "has 4", "resources.use_gpu")),
        (64, None, {"use_gpu": True, "num_workers": 1}, ("resources.num_workers=1", "has 0")),
        (64, None, {"use_gpu": True}, ("GPUs", "has 0")),
        (64, 4, {"num_workers": "5..8"}, ("resources.num_workers=5..8", "has 4", "resources.use_gpu")),
        (4, None, {"num_workers": "4..8"}, ("resources.num_workers=4..8", "one for decoding", "4 CPUs")),
        (8, 8, {}, ("resources.num_workers=8", "8 CPUs")),
        (1, None, {}, ("one for decoding", "1 CPUs")),
        (0, None, {}, ("0 CPUs",)),
    ],
)
def test_too_large_request_names_both_numbers(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float | None, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    cluster(monkeypatch, cpus=cpus, gpus=gpus)
    with pytest.raises(UserError) as caught:
        allocate(ResourceSettings(**settings))
    assert [word for word in words if word not in str(caught.value)] == []


class Growing:
    """A cluster that starts the requested nodes one by one, each time that somebody looks, up to `most`.

    Attributes:
        requests: all requests in order; the last one counts.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], most: dict[str, int], works: bool = True
    ):
        self.resources, self.most, self.works = dict(resources), most, works
        self.requests: list[list[dict[str, int]]] = []
        self.clock = 0.0
        monkeypatch.setattr(LARGEST, lambda: most)
        monkeypatch.setattr(ray, "cluster_resources", lambda: dict(self.resources))
        monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: self.requests.append(bundles))
        monkeypatch.setattr("msrn_ray.ray_cluster.allocation.time.sleep", self.sleep)
        monkeypatch.setattr("msrn_ray.ray_cluster.allocation.time.monotonic", lambda: self.clock)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        if self.requests and self.requests[-1] and self.works:
            self.resources["GPU"] = min(
                self.resources.get("GPU", 0) + 1, sum(bundle.get("GPU", 0) for bundle in self.requests[-1])
            )
            self.resources["CPU"] = 16 * self.resources["GPU"]


def test_allocate_waits_for_a_growing_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the head alone to three nodes with a GPU each. The request ends then, or the nodes would stay forever."""
    growing = Growing(monkeypatch, {"CPU": 0.0}, {"CPU": 64, "GPU": 4})
    assert allocate(ResourceSettings(num_workers=3)) == Allocation(3, True, 1)
    assert growing.requests == [[{"CPU": 1, "GPU": 1}] * 3 + [{"CPU": 1}], []]
    assert growing.clock == 3
    assert capsys.readouterr().out == "waiting for nodes for 3 workers; the cluster has 0 CPUs and 0 GPUs now\n"
    assert allocate(ResourceSettings(num_workers="2..4")) == Allocation(3, True, 1, (2, 4))
    assert len(growing.requests) == 2, "there are enough nodes already"


def test_overwritten_request_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train and Ray Data request what their runs need, and the last request counts."""

    class Overwritten(Growing):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            self.requests.append([])

    growing = Overwritten(monkeypatch, {"CPU": 0.0}, {"CPU": 64, "GPU": 4})
    assert allocate(ResourceSettings(num_workers=3)) == Allocation(3, True, 1)
    assert growing.clock < 20, "three nodes, each requested within a few seconds"


def test_wait_ends_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = Growing(monkeypatch, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 64, "GPU": 4}, works=False)
    with pytest.raises(
        UserError, match=r"num_workers=2 needs as many GPUs, after resources\.wait_minutes=3 the cluster has 1;"
    ):
        allocate(ResourceSettings(num_workers=2, wait_minutes=3))
    assert 180 <= growing.clock < 190
    assert growing.requests[-1] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_workers": 5}, r"num_workers=5 needs as many GPUs, the cluster at its largest has 4"),
        ({"num_workers": "5..8"}, r"num_workers=5\.\.8 needs as many GPUs, the cluster at its largest has 4"),
        (
            {"num_workers": 4, "cpus_per_worker": 16},
            r"num_workers=4 x 16 CPUs, .* the cluster at its largest has 64 CPUs",
        ),
        ({}, r"has 0 GPUs now and can grow to 4; say with resources\.num_workers"),
    ],
)
def test_request_beyond_growth_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    growing = Growing(monkeypatch, {"CPU": 0.0}, {"CPU": 64, "GPU": 4})
    with pytest.raises(UserError, match=words):
        allocate(ResourceSettings(**settings))
    assert (growing.clock, growing.requests) == (0, [])


def test_only_a_range_is_elastic_in_ray_train() -> None:
    assert scaling_config(Allocation(4, True, 1, (2, 8))).num_workers == (2, 8)
    assert scaling_config(Allocation(4, False, 3)).num_workers == 4
    assert scaling_config(Allocation(4, False, 3)).resources_per_worker == {"CPU": 3}


@pytest.mark.parametrize(
    ("cpus", "workers", "cpus_per_worker", "runs", "expected"),
    [
        (4, 2, 1, 1, 1),
        (9, 2, 1, 1, 3),
        (9, 4, 1, 1, 1),
        (18, 2, 1, 1, 8),
        (40, 8, 2, 1, 3),
        (5, 4, 1, 1, 1),
        (4, 1, 1, 2, 1),
        (16, 2, 1, 3, 1),
        (36, 1, 1, 4, 8),
    ],
)
def test_decode_cpus_per_worker(
    monkeypatch: pytest.MonkeyPatch, cpus: float, workers: int, cpus_per_worker: int, runs: int, expected: float
) -> None:
    """The present workers, whose number may have changed, and the other runs share these CPUs."""
    cluster(monkeypatch, cpus=cpus)
    assert decode_cpus(workers, cpus_per_worker, runs) == expected


def test_workers_that_leave_no_decode_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, cpus=4)
    with pytest.raises(
        UserError, match=r"4 workers x 1 CPUs leave none of the cluster's 4 CPUs.*resources\.num_workers"
    ):
        decode_cpus(4, 1)


def test_worker_may_take_part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, cpus=36, gpus=4)
    allocation = allocate(ResourceSettings(num_workers=1, gpus_per_worker=0.25))
    assert scaling_config(allocation).resources_per_worker == {"CPU": 1, "GPU": 0.25}
    whole = allocate(ResourceSettings(num_workers=1))
    assert scaling_config(whole).resources_per_worker == {"CPU": 1, "GPU": 1}


def test_fewer_workers_stay_elastic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run still takes a node that comes back, and still continues without one more."""
    cluster(monkeypatch, cpus=5.0)
    fewer = with_fewer(Allocation(6, False, 1, (2, 6)), ResourceSettings(num_workers="2..6"))
    assert fewer == Allocation(4, False, 1, (2, 4))
