"""The model of a training step: `bench.step`."""

import json

import pytest
import torch

from bench import step
from bench.step import BYTES, FLOPS, NODE, Launch, Launches, Step


def test_a_launch_takes_the_longest_of_bytes_products_and_a_node():
    assert Launch("", 10**9, 10**9).seconds() == 10**9 / BYTES
    assert Launch("", 1000, 10**12).seconds() == 10**12 / FLOPS
    assert Launch("", 1000, 1000).seconds() == NODE


def test_launches_are_counted_with_their_bytes_and_operations():
    x, y = torch.zeros(6, 8), torch.zeros(8, 3)
    with Launches() as found:
        x.T.relu()
        torch.mm(x, y)
        x[:1].expand(100, 8).add(1)
    assert [(x.name, x.bytes, x.flops) for x in found.launches] == [
        ("relu", 2 * 4 * 48, 0),
        ("mm", 4 * (48 + 24 + 18), 2 * 6 * 8 * 3),
        ("add", 4 * (48 + 800), 0),  # what is expanded is read once
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_each_layer_of_a_step_is_counted(layers):
    found = step.launches_of(Step("diag_bilstm", 4, 1, 2, 4, layers, 8, "", images=2))
    names = [x.name for x in found]
    assert names.count("lstm_scan") == names.count("lstm_scan_backward") == names.count("bmm") == layers
    assert names.count("_foreach_norm") == 1  # clipping is in it, and all weights at once
    scans = [x for x in found if x.name == "bmm"]
    assert scans[0].flops == 2 * (2 * 16 * 8) * (2 * 4 * 5)  # weights, pixels: rows, columns and the extra one


@pytest.mark.slow
def test_a_step_is_its_scans_and_the_rest(tmp_path, capsys, monkeypatch):
    some = [name for name in step.STEPS if "CNN" in name or "h = 16" in name]
    monkeypatch.setattr(step, "STEPS", {name: step.STEPS[name]._replace(layers=2) for name in some})
    assert step.main(["--json", str(tmp_path / "step.json")]) == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    for row in rows:
        for end in ("low", "high"):
            parts = row["products"] + row["memory"] + row["kernels"][end]
            assert row["all"][end] == pytest.approx(parts, rel=0.01)
        assert row["images_per_second"]["low"] <= row["images_per_second"]["high"]
    without_scans = {row["step"] for row in rows if row["kernels"]["high"] == 0}
    assert without_scans == {row["step"] for row in rows if "CNN" in row["step"] and "row" not in row["step"]}
    assert "not a measurement" in capsys.readouterr().out
