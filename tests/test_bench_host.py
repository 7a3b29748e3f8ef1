"""What a training step costs the host: `bench.host`."""

import json

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from bench import host
from bench.stand_in import in_processes


@pytest.mark.slow
def test_a_graph_leaves_next_to_nothing_to_the_host(tmp_path):
    assert in_processes(host.main, [["--quick", "--out", str(tmp_path)]]) == [0]
    rows = json.loads((tmp_path / "host-quick.json").read_text())["rows"]
    assert len(rows) == 2 * 5
    for usual, graph in zip(rows[::2], rows[1::2], strict=True):
        assert not usual["graph"] and graph["graph"] and usual["model"] == graph["model"]
        assert usual["launches"] > 3 and graph["launches"] == 0 and graph["operations"] < usual["operations"] / 4
        assert graph["total_ms"]["median"] < usual["passes_ms"]["median"] / 5
