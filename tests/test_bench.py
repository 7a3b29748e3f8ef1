"""The benchmarks run, say what they measured and on what, and compare like with like."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from bench import sampling, training
from bench.measure import MODELS, interleave, spread, whole
from bench.plain import baseline, live_multiply_adds
from bench.sampling import kept_bytes
from models.sampling.cached import Cached
from models.sampling.cpu_row import CpuRow

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"command", "date", "device", "cpu", "cores", "threads", "python", "torch", "triton", "commit", "rows"}
SPREAD = {"median", "min", "q1", "q3", "repeats"}


def run(command, tmp_path, *arguments: str) -> tuple[dict, str]:
    """What a benchmark writes, read back, and as text."""
    command.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    result = json.loads(text)
    assert result.keys() == KEYS
    assert str(tmp_path) not in text
    assert result["command"].startswith(f"python -m {command.__name__} --quick")
    for row in result["rows"]:
        for name, value in row.items():
            if name == "ms" or name.endswith("_ms"):
                assert value.keys() == SPREAD
                assert 0 < value["min"] <= value["q1"] <= value["median"] <= value["q3"]
    return result, path.name


@pytest.mark.slow
def test_sampling_writes_what_it_measured(tmp_path, capsys):
    result, name = run(sampling, tmp_path)
    assert name == "sampling-cpu-quick.json"
    parts = {part: [r for r in result["rows"] if r["part"] == part] for part in [*sampling.PARTS, "ceilings"]}
    ways = ("cached", "cpu"), ("cached", "torch"), ("naive", None)
    for part, names in (("methods", [*MODELS]), ("colour", [*MODELS, "pixel_cnn"])):
        found = [(r["model"], (r["method"], r["backend"])) for r in parts[part]]
        assert found == [(name, way) for name in names for way in ways]
        for k, row in enumerate(parts[part]):
            cached, naive = (parts[part][k - k % 3 + other]["seconds"] for other in (0, 2))
            assert row["ratio"] == pytest.approx(row["seconds"] / cached)
            assert row["naive_ratio"] == pytest.approx(naive / row["seconds"])
    for row in parts["methods"] + parts["colour"]:
        naive = row["method"] == "naive"
        assert row["extrapolated"] is naive
        assert (row["timed_sub_pixels"] == sampling.TIMED) == naive
    sizes = [(backend, [2, 1, side, side]) for backend in ("cpu", "torch") for side in (3, 4)]
    assert [(r["backend"], r["shape"]) for r in parts["growth"]] == sizes * len(MODELS)
    assert [r["shape"][1] for r in parts["colour"]] == [3] * len(parts["colour"])
    assert [r["model"] for r in parts["products"]] == [*MODELS, "pixel_cnn"]
    for row in parts.pop("products"):
        for share, part in (("share", "products_ms"), ("share_of_calls", "calls_ms")):
            assert row[share] == pytest.approx(row[part]["median"] / row["ms"]["median"])
        assert row["gflop"] > 0
    (ceiling,) = parts.pop("ceilings")
    found = [(r["model"], r["shape"][0], r["backend"]) for r in parts["throughput"]]
    assert found == list(itertools.product(MODELS, (1, 2), ("cpu", "torch")))
    for cpu, by_torch in zip(parts["throughput"][::2], parts["throughput"][1::2], strict=True):
        assert cpu["ratio"] == pytest.approx(cpu["ms"]["median"] / by_torch["ms"]["median"]) and by_torch["ratio"] == 1
    for row in parts.pop("throughput"):
        assert row["floor_seconds"] == pytest.approx(row["gflop"] / ceiling["gflops"]) and row["memory_mb"] > 0
        assert row["share"] == pytest.approx(row["floor_seconds"] / row["ms"]["median"] * 1e3)
        assert row["share_of_peak"] * ceiling["multiply_add_gflops"] == pytest.approx(row["share"] * ceiling["gflops"])
        assert row["images_per_second"] == pytest.approx(row["shape"][0] / row["ms"]["median"] * 1e3)
    compiled, loaded, by_torch = parts.pop("first")
    assert (compiled["code"], loaded["code"], by_torch["backend"]) == ("compiled", "from the disk", "torch")
    assert compiled["code_ms"]["median"] > 4 * loaded["code_ms"]["median"]
    assert compiled["code_ms"]["median"] > 4 * by_torch["code_ms"]["median"]  # of the noise
    for row in (compiled, loaded, by_torch):
        assert row["code_ms"]["median"] <= row["draw_ms"]["median"] < row["ms"]["median"]
    (made,) = (r for r in result["rows"] if r["part"] == "noise")
    assert made["shape"] == [2, 1, 4, 4] and made["images_per_second"] == pytest.approx(2e3 / made["ms"]["median"])
    for row in (row for part in parts.values() for row in part):
        assert row["ratio"] > 0 and row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert "pixel_cnn" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_products_of_a_row_are_the_live_weights_and_what_is_packed_beside_them(name):
    sizes = {"channels": 1, "levels": 2, "height": 5, "width": 6, "hidden": 4, "layers": 3, "skip": True}
    model = models.build({"_target_": MODELS[name][0], **sizes})
    one, two = (sampling.products_of_a_row(model, b) for b in (1, 2))
    assert two.operations == 2 * one.operations and two.weight_bytes == one.weight_bytes
    live = 2 * live_multiply_adds(model) / model.height
    assert live <= one.operations < 1.3 * live  # biases of the join, masked inputs of the stem


def test_a_part_that_there_is_not_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sampling.main(["--quick", "--out", str(tmp_path), "--parts", "methods,speed"])
    assert "--parts=speed: expected " in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_naive_run_is_not_extrapolated(tmp_path):
    result, _ = run(
        sampling, tmp_path, "--full-naive", "--models", "pixel_cnn", "--repeats", "1", "--parts", "methods,colour"
    )
    assert not any(row.get("extrapolated") for row in result["rows"])
    assert {row["model"] for row in result["rows"]} == {"pixel_cnn"}


@pytest.mark.slow
def test_training_writes_what_it_measured(tmp_path, capsys):
    result, name = run(training, tmp_path, "--name", "here")
    assert name == "here.json"
    of_all, of_lstms = ("ours", "baseline", "matmul"), ("ours", "baseline", "torch", "matmul")
    kinds = {name: of_lstms if name in ("row_lstm", "diag_bilstm") else of_all for name in MODELS}
    assert [(r["model"], r["implementation"]) for r in result["rows"]] == [(m, k) for m in MODELS for k in kinds[m]]
    for row in result["rows"]:
        assert row["gflops"] > 0 and row["share_of_matmul"] > 0
        if row["implementation"] != "matmul":
            assert {"forward_ms", "backward_ms", "optimizer_ms", "ratio", "multiply_adds"} <= row.keys()
    assert "diag_bilstm" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels, height, width", [(1, 5, 5), (3, 4, 6), (2, 6, 3)])
def test_a_baseline_computes_what_its_model_does(name, channels, height, width):
    torch.manual_seed(0)
    sizes = {"channels": channels, "levels": 4, "height": height, "width": width, "hidden": 6, "layers": 3}
    model = models.build({"_target_": MODELS[name][0], **sizes})
    with torch.no_grad():
        for parameter in model.parameters():  # biases too: padding must not evolve a state through them
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    plain, x = baseline(model), torch.randint(0, 4, (2, channels, height, width))
    torch.testing.assert_close(plain.outputs(x), model.outputs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(x), model(x), atol=1e-4, rtol=1e-5)
    plain(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(plain.stem.bias.grad, model.stem.bias.grad, atol=1e-3, rtol=1e-4)


def test_multiply_adds_are_those_of_live_weights():
    sizes = {"channels": 1, "levels": 2, "height": 3, "width": 5, "hidden": 4, "layers": 2}
    counts = {
        m: live_multiply_adds(m(**sizes, head_features=7))
        for m in (models.PixelCNN, models.GatedPixelCNN, models.RowLSTM, models.DiagBiLSTM)
    }
    stem, head = 24 * 8, 8 * 7 + 7 * 2  # a 7×7 of mask A has 24 live taps
    block = 8 * 4 + 5 * 4 * 4 + 4 * 8  # a 3×3 of mask B has 5
    assert counts[models.PixelCNN] == 3 * 5 * (stem + 2 * block + head)
    gated = 6 * 4 * 8 + (2 + 1) * 4 * 8 + 4 * 4  # vertical 2×3; left, centre and vertical; up
    gated_stem, gated_head = 21 * 4 + 24 * 4, 4 * 7 + 7 * 2  # the vertical half sees the rows above alone
    assert counts[models.GatedPixelCNN] == 3 * 5 * (gated_stem + 2 * gated + gated_head)
    row = 2 * 8 * 16 + 3 * 4 * 16 + 4 * 8  # left and centre; the row above; up
    assert counts[models.RowLSTM] == 3 * 5 * (stem + 2 * row + head)
    diagonal = 2 * (16 * 8 + 16 * 8) + 4 * 8  # per direction input-to-state and state-to-state; then up
    assert counts[models.DiagBiLSTM] == 3 * (6 * (stem + 2 * diagonal) + 5 * head)


@pytest.mark.slow
def test_the_benchmarks_need_no_hydra():
    """Nor do the tests that `bench.gpu` runs: a GPU may stand in a machine that has little installed."""
    modules = [f"bench.{path.stem}" for path in (ROOT / "bench").glob("*.py")]
    assert {"bench.gpu", "bench.cost", "bench.sweep", "bench.kernels"} <= set(modules)
    modules += [
        "tests.conftest",
        "tests.at_once",
        "tests.test_gpu",
        "tests.test_operations",
        "tests.test_row_kernel",
        "tests.test_row_product",
    ]
    code = "import importlib, sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'hypothesis')))\n"
    code += f"for name in {modules}: importlib.import_module(name)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_things_are_timed_in_turn():
    order = []
    things = {name: whole(lambda name=name: order.append(name)) for name in "ab"}
    times = interleave(things, torch.device("cpu"), repeats=2, warmup=1)
    assert order == list("ababab")
    assert all(len(laps["total"]) == 2 for laps in times.values())
    assert spread([1.0, 2.0, 3.0, 4.0, 9.0], factor=2.0) == dict(median=6.0, min=2.0, q1=4.0, q3=8.0, repeats=5)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--models", "pixel_rnn"], "pixel_cnn, gated_pixel_cnn"),
        (["--repeats", "0"], "at least 1"),
        (["--out", __file__], "is not a folder"),
    ],
)
def test_a_wrong_option_ends_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        training.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"])
def test_what_the_cached_sampler_keeps_does_not_grow_with_the_height(name):
    """A row suffices: it grows with the width, and with the number of images."""
    sizes = {"channels": 1, "levels": 2, "hidden": 4, "layers": 3}

    def kept(b, height, width, **order):
        model = models.build({"_target_": f"models.{name}", **sizes, "height": height, "width": width})
        return kept_bytes(Cached(model, b, **order))

    assert kept(2, 8, 8) == kept(2, 64, 8)
    one, two, three = (kept(2, 8, width) for width in (8, 16, 24))
    f, n = sizes["hidden"], sizes["layers"]
    a_layer = {"PixelCNN": 6 * f, "GatedPixelCNN": 8 * f, "RowLSTM": 15 * f + 1, "DiagBiLSTM": 24 * f}[name]
    stem = 4 * f + 4 + 21  # the rows, and the taps above of each column
    stack = 10 * f if name == "GatedPixelCNN" else 0  # where it begins; the taps and gates of one layer
    assert two - one == three - two == 2 * 8 * 4 * (n * a_layer + stem + stack)
    one, two = (kept(2, 8, width, images_last=False) for width in (8, 16))  # as on a GPU
    copied = {"PixelCNN": f, "GatedPixelCNN": 2 * f, "RowLSTM": 4 * f, "DiagBiLSTM": 8 * f}[name]
    assert two - one == 2 * 8 * 4 * (n * (a_layer - copied) + stem - 2 * f + stack)
    one, two = (kept(2, 8, width, images_last=False, backend="triton") for width in (8, 16))
    side_by_side = {"PixelCNN": 3 * f, "GatedPixelCNN": f, "RowLSTM": 3 * f, "DiagBiLSTM": 4 * f}[name]
    assert two - one == 2 * 8 * 4 * (
        n * (a_layer - copied - side_by_side) + stem - 21 - 2 * f + (stack and stack - 6 * f)
    )
    assert kept(4, 8, 16) - kept(3, 8, 16) == kept(3, 8, 16) - kept(2, 8, 16) > 0


@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"])
def test_what_a_compiled_row_keeps_is_what_a_tile_and_the_weights_take(name):
    sizes = {"channels": 1, "levels": 2, "hidden": 4, "height": 8, "width": 8, "layers": 3}

    def row(b, **others):
        return CpuRow(models.build({"_target_": f"models.{name}", **sizes, **others}), b, None)

    def of_a_column(layers):
        narrow, wide = (row(2, width=width, layers=layers) for width in (8, 16))
        return (kept_bytes(wide) - kept_bytes(narrow)) / 8 / wide.tiles.lanes / 4

    tiles = row(2).tiles
    kept = 4 * (tiles.arena.numel() + tiles.parameters.numel())
    assert kept_bytes(row(2)) == kept_bytes(row(2, height=64)) == kept_bytes(row(tiles.lanes)) == kept
    a_layer = {"PixelCNN": 2, "GatedPixelCNN": 4, "RowLSTM": 8, "DiagBiLSTM": 8}[name] * sizes["hidden"]
    assert of_a_column(4) - of_a_column(3) == a_layer
