"""The plan of a run: counted operations against those of the real network, and the limits of the formula."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msrn_ray.cli.app import main
from msrn_ray.model import build_model
from msrn_ray.presets import PRESETS
from msrn_ray.training.estimate import ATTENTION, Cost, Hardware, count_cost, predict_step

FAST = Hardware(workers=1, flops=1e12, link=1e9, memory=1e9)


def test_counted_flops_equal_those_of_the_network() -> None:
    config = PRESETS["scenes"].config
    cost = count_cost(config, 16)
    network = build_model(config.model, torch.randn(16, 50), torch.eye(16).bool(), pretrained=False)
    assert cost.weights == sum(weight.numel() for weight in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.backbone(torch.zeros(1, 3, 96, 96))
    head = cost.weights - sum(weight.numel() for weight in network.backbone.parameters())
    assert cost.flops == pytest.approx(counter.get_total_flops() * (1 + ATTENTION) + 2 * head)


@pytest.mark.parametrize(("head", "weights"), [("mlp", 310.6e6), ("elementwise", 46.4e6)])
def test_cost_of_the_papers_network(head: str, weights: float) -> None:
    """ResNet-101 at 448 pixels: 4 x the 7.8 G multiplications at 224."""
    cost = count_cost(PRESETS["coco2014"].config.with_overrides({"model.head": head}), 80)
    assert cost.weights == pytest.approx(weights, rel=1e-3)
    assert cost.flops == pytest.approx(2 * 4 * 7.8e9 * 1.1, rel=0.02)


def test_frozen_weights_are_neither_updated_nor_exchanged() -> None:
    config = PRESETS["folders"].config
    frozen = count_cost(config.with_overrides({"model.frozen_stages": 5}), 10)
    assert frozen.weights < 0.5 * count_cost(config, 10).weights


def test_one_worker_exchanges_nothing() -> None:
    step = predict_step(Cost(1_000_000, 1e9), FAST, images=4)
    assert (step.exchange, step.waiting) == (0, 0)
    assert step.compute == pytest.approx(3 * 4 * 1e9 / 1e12)
    assert step.total == step.compute + step.update


def test_ring_exchange_hides_behind_the_backward_pass() -> None:
    cost = Cost(1_000_000, 1e9)
    machines = [Hardware(workers, 1e12, 1e9, 1e12) for workers in (2, 4, 1000)]
    exchanges = [predict_step(cost, machine, images=4).exchange for machine in machines]
    assert exchanges == pytest.approx([4e-3, 6e-3, 8e-3], rel=1e-2)
    hidden = predict_step(cost, machines[0], images=4)  # 12 ms of computing, 8 of them backwards
    assert hidden.waiting == 0
    seen = predict_step(cost, machines[0], images=1)  # 2 ms backwards
    assert seen.waiting == pytest.approx(2e-3)
    assert predict_step(cost, machines[0], images=1, gradient_bytes=2).waiting == 0


def test_plan_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msrn", "plan", *argv])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    gpus = ("--gpus", "4", "--gpu-tflops", "70", "--network-gbps", "10")
    code, out, _ = run("coco2014", *gpus, "--dollars", "1.5")
    assert code == 0
    mlp, elementwise = (line.split() for line in out.splitlines()[2:4])
    assert (mlp[0], mlp[1], elementwise[0], elementwise[1]) == ("mlp", "310.6", "elementwise", "46.4")
    assert int(mlp[-1]) < int(elementwise[-1]), "images a second: a slow network wants the small head"
    assert "40 epochs" in out
    assert "dollars" in out
    assert "dollars" not in run("coco2014", *gpus)[1]
    assert "say --images and --labels" in run("manifest", *gpus)[2]
    assert run("manifest", *gpus, "--images", "1000", "--labels", "5")[0] == 0
    output = run("manifest", *gpus, "--images", "1000", "--labels", "5", "--dollars", "2", "--decode-rate", "10")[1]
    config = PRESETS["manifest"].config
    rate = float(re.findall(rf"^{config.model.head} .*?([\d.]+)$", output, re.MULTILINE)[0])
    epochs = config.train.epochs
    assert float(re.findall(r"decoding: ([\d.]+) CPUs per GPU", output)[0]) == pytest.approx(rate / 4 / 10, rel=0.1)
    assert float(re.findall(r"an epoch of 1,000 images: (\d+) s", output)[0]) == pytest.approx(1000 / rate, rel=0.1)
    price = float(re.findall(r"([\d,]+) dollars at 2 per GPU", output)[0])
    assert price == pytest.approx(epochs * 1000 / rate / 3600 * 4 * 2, rel=0.1, abs=0.5)
    assert "an epoch of 73,873 images" in out, "a tenth of train is val"
    assert "one GPU alone would do 64 images/s, so more do not pay off (0.2 times)" in out
    assert "one GPU alone" not in run("coco2014", "--gpus", "1", *gpus[2:])[1]
    assert re.search(
        r"alone would do \d+ images/s: 3\.\d times as many with all",
        run("coco2014", *gpus[:4], "--network-gbps", "1000")[1],
    )
    assert "--dollars -1: must be greater than 0" in run("coco2014", *gpus, "--dollars", "-1")[2]
    assert "--network-gbps nan: must be" in run("coco2014", *gpus[:4], "--network-gbps", "nan")[2]
    assert "--efficiency 5: a part of the peak" in run("coco2014", *gpus, "--efficiency", "5")[2]
    assert "train.batch_size=16 leaves some of 17 GPUs" in run("coco2014", "--gpus", "17", *gpus[2:])[2]
    assert "--network-gbps 0: must be greater than 0" in run("coco2014", *gpus[:4], "--network-gbps", "0")[2]
