"""What `cluster/monitoring` offers, against a real Prometheus that reads a real Ray: every panel shows a line for each run."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from msrn_ray.telemetry import EPOCH_GAUGES, GAUGES, Gauges

MONITORING = Path(__file__).resolve().parents[1] / "cluster/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = {panel["title"]: target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
NAMES = {f"ray_{name}" for name, _ in (GAUGES | EPOCH_GAUGES).values()}


def test_every_gauge_has_a_panel_and_no_panel_shows_what_does_not_exist() -> None:
    shown = {name for expression in EXPRESSIONS.values() for name in re.findall(r"ray_msrn_\w+", expression)}
    assert shown == NAMES
    assert [panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"]] == [True] * len(
        EXPRESSIONS
    )
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(EXPRESSIONS) == len(DASHBOARD["panels"])
    (run,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == "run"]
    assert run["query"]["query"] == "label_values(ray_msrn_epoch, run)"


@ray.remote(num_cpus=0)
class Rank:
    """Sets every gauge of a rank, as a worker does."""

    def __init__(self, run: str, rank: int) -> None:
        values = {metric: 10.0 * rank + place for place, metric in enumerate(GAUGES | EPOCH_GAUGES)}
        self.gauges = Gauges(run, rank)
        self.gauges.set(values)

    def ready(self) -> None:
        """Answers when the gauges are set."""


class Prometheus:
    """A server that has read the project's scrape file."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
        (job,) = settings["scrape_configs"]
        assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
        job["file_sd_configs"][0]["files"] = [str(folder / "machines.json")]  # Ray writes it where it runs a dashboard
        settings["global"]["scrape_interval"] = "1s"
        (folder / "machines.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}/api/v1"
        options = [
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/db",
            f"--web.listen-address={address}",
        ]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)

    def ask(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]


@pytest.fixture(scope="module")
def prometheus(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Two runs, the first with two ranks."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    ranks = [Rank.remote("first", 0), Rank.remote("first", 1), Rank.remote("second", 0)]
    ray.get([rank.ready.remote() for rank in ranks])
    node = ray.nodes()[0]
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), [f"127.0.0.1:{node['MetricsExportPort']}"])
    end = time.monotonic() + 90
    while True:
        try:
            if len(server.ask("query", query='{__name__=~"ray_msrn_.+"}')["result"]) == len(ranks) * len(NAMES):
                break
        except OSError:
            pass  # it does not listen yet
        assert time.monotonic() < end, "the gauges never came"
        assert server.process.poll() is None, "prometheus has ended"
        time.sleep(0.5)
    yield server
    server.process.terminate()
    server.process.wait(timeout=30)
    for rank in ranks:
        ray.kill(rank)


@pytest.mark.ray
@pytest.mark.parametrize("title", EXPRESSIONS)
def test_a_panel_shows_each_run(prometheus: Prometheus, title: str) -> None:
    expression = EXPRESSIONS[title].replace("$run", ".+")
    lines = {
        (line["metric"].get("run"), line["metric"].get("rank")): float(line["value"][1])
        for line in prometheus.ask("query", query=expression)["result"]
    }
    if "ray_msrn" not in expression:
        assert len(lines) == 1, "the one machine"
        return
    place = [f"ray_{name}" for name, _ in (GAUGES | EPOCH_GAUGES).values()].index(
        re.findall(r"ray_msrn_\w+", expression)[0]
    )
    if "rank" in expression:
        assert lines == {("first", "0"): place, ("first", "1"): 10 + place, ("second", "0"): place}
    else:
        assert lines == {("first", None): 10 + place, ("second", None): place}


@pytest.mark.ray
def test_the_runs_to_choose_from(prometheus: Prometheus) -> None:
    """The dashboard's list of runs, and one run alone."""
    assert prometheus.ask("label/run/values", **{"match[]": "ray_msrn_epoch"}) == ["first", "second"]
    expression = EXPRESSIONS["val mAP"].replace("$run", "second")
    assert [line["metric"] for line in prometheus.ask("query", query=expression)["result"]] == [{"run": "second"}]
