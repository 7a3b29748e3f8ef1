"""What holds of launches and captures, checked on the fake GPU: see `tests/test_launches.py`, which runs this file."""

import copy

import pytest
import torch

import kernels
import models
from bench.stand_in import StandIn
from kernels.gate import gate_fwd_kernel
from kernels.jit import tl
from kernels.lstm_scan import lstm_scan
from models.optimizers import build_optimizer, load_state
from models.sampling import PixelLoop, noise, sample
from models.sampling.loop import backend_of_rows
from models.sampling.rules import Draw
from models.training_step import TrainingStep
from tests.fake_gpu import fake_cuda
from tests.fake_gpu.fake_cuda import INDEX, state


def small(name="PixelCNN", **others):
    sizes = {"channels": 1, "levels": 4, "height": 4, "width": 3, "hidden": 16, "layers": 2}
    return models.build({"_target_": f"models.{name}", **sizes, **others}).cuda().eval()


def test_a_launch_is_on_the_device_of_its_tensors():
    u = torch.randn(3, 8)
    assert u.device == torch.device("cuda", INDEX) and state["device"] == 0
    kernels.gate(u)
    arguments = u, torch.empty(3, 4), 12, 4
    if INDEX:
        with pytest.raises(AssertionError, match=f"a launch on cuda:{INDEX} while cuda:0 is the current device"):
            gate_fwd_kernel[(1,)](*arguments, BLOCK=1024, SUM=tl.float32, enable_fp_fusion=True)
    assert state["device"] == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_are_captured_on_the_device_of_the_model(backend):
    before = dict(state)
    sample(small(), 6, backend=backend, batch_size=3)
    assert state["graphs"] == before["graphs"] + 2 and state["replays"] > before["replays"] and state["device"] == 0


def test_triton_draws_but_in_float64_or_where_torch_is_asked_to():
    rule = Draw(noise(0, range(2), small().shape))
    for asked, in_use, dtype, expected in (
        (None, None, torch.bfloat16, "triton"),
        (None, None, torch.float32, "triton"),
        (None, None, torch.float64, "torch"),
        ("triton", None, torch.float64, "triton"),
        (None, "triton", torch.float64, "triton"),
        (None, "torch", torch.bfloat16, "torch"),
        ("torch", None, torch.bfloat16, "torch"),
    ):
        with kernels.use(in_use):
            assert backend_of_rows(small().to(dtype), rule, asked) == expected, (asked, in_use, dtype)


def test_a_row_is_captured_once_its_kind_has_run():
    """The first row of an image in the second batch, any other at the second of them; each runs as it is before."""
    model, done = small(), []
    loop = PixelLoop(model, "cached", Draw(noise(0, range(2), model.shape)), 2)
    row = loop.evaluator.row

    def watched(rule, values, first):
        done.append(("captured" if state["capturing"] else "run", "first" if first else "other"))
        row(rule, values, first)

    loop.evaluator.row = watched
    loop.run()
    assert done == [("run", "first"), ("run", "other"), ("captured", "other")]
    loop.again(Draw(noise(1, range(2), model.shape)), None)
    assert done[3:] == [("captured", "first")]
    loop.again(Draw(noise(2, range(2), model.shape)), None)
    assert len(done) == 4


ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1}
RMSPROP = {"name": "rmsprop", "lr": 1e-3, "alpha": 0.95}
MUON = {"name": "muon", "lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"])
def test_a_training_step_is_captured_at_the_third_of_its_kind(name):
    """All of it, on the model's device; so are steps on another number of images."""
    model, x = small(name, dropout=0.5).train(), torch.zeros(3, 1, 4, 3).long()
    step = TrainingStep(model, build_optimizer(ADAMW, model), copy.deepcopy(model), clip=1, bf16=True)
    before, done = dict(state), []
    for n in (3, 3, 3, 3, 2, 2, 2, 2):
        step(x[:n], lr=1e-2, decay=0.9)
        done.append((state["graphs"] - before["graphs"], state["replays"] - before["replays"]))
    assert done == [(0, 0), (0, 0), (1, 1), (1, 2), (1, 2), (1, 2), (2, 3), (2, 4)]
    assert state["device"] == 0


@pytest.mark.parametrize(
    ("name", "bf16", "optimizer", "clip"),
    [
        ("PixelCNN", True, ADAMW, None),
        ("GatedPixelCNN", False, ADAMW, 0.1),
        ("GatedPixelCNN", False, MUON, None),
        ("RowLSTM", False, RMSPROP, None),
        ("DiagBiLSTM", True, {**RMSPROP, "momentum": 0.9}, 0.1),
        ("MultiScale", False, ADAMW, None),
    ],
)
def test_fifty_captured_training_steps_are_those_of_no_graph(name, bf16, optimizer, clip):
    """Losses and all weights, bit for bit, dropout and a rate that falls included."""
    torch.manual_seed(0)
    others = {"layers": 1} if name == "MultiScale" else {"dropout": 0.3, "classes": 3}
    captured = small(name, width=4, **others).train()
    eager, losses, averages = copy.deepcopy(captured), [], []
    with kernels.use("torch"), fake_cuda.replaying():
        for model in (captured, eager):
            averages.append(copy.deepcopy(model))
            made = build_optimizer(optimizer, model)
            step = TrainingStep(model, made, averages[-1], clip, bf16=bf16, graph=model is captured)
            numbers = torch.Generator().manual_seed(0)
            torch.manual_seed(1)
            for n in range(50):
                x = torch.randint(0, 4, (6, *captured.shape), generator=numbers)
                label = torch.randint(0, 3, (6,), generator=numbers) if model.classes else None
                losses.append(step(x, label, lr=optimizer["lr"] * (1 - n / 50), decay=min(0.9, n / 10)))
            counted = made.param_groups[-1]["params"]  # of Muon's, AdamW's
            assert counted and all(made.state[parameter]["step"] == 50 for parameter in counted)
    assert state["graphs"] > 0 and losses[:50] == losses[50:] and len(set(losses)) > 40
    for sides in ((captured, eager), averages):
        assert all((x == y).all() for x, y in zip(*(model.parameters() for model in sides), strict=True))


def test_a_state_of_the_cpu_goes_on_on_a_gpu_and_back():
    """There, the rate and the count of steps are tensors: a CUDA graph reads them."""
    model = small()
    here, there = build_optimizer(ADAMW, model), build_optimizer(ADAMW, model)
    for group in there.param_groups:
        there.defaults |= {"capturable": False, "lr": 1e-2}
        group |= there.defaults
    for parameter in model.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    for source, target in ((there, here), (here, there)):
        source.step()
        load_state(target, source.state_dict())
        assert [group["capturable"] for group in target.param_groups] == [target is here]
        assert isinstance(target.param_groups[0]["lr"], torch.Tensor) == (target is here)


@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"])
def test_captured_rows_draw_what_the_network_says(name):
    model = small(name, levels=8)
    with kernels.use("torch"), fake_cuda.replaying():
        before = state["replays"]
        drawn = sample(model, 6, batch_size=2)
        naive = sample(model, 6, method="naive")
    assert state["replays"] == before + 10 and (drawn == naive).all()


def test_what_a_capture_may_not_do_is_refused():
    said = "a synchronisation while a CUDA graph is captured"
    with pytest.raises(AssertionError, match=said), torch.cuda.device(INDEX), torch.cuda.graph(fake_cuda.Graph()):
        torch.cuda.synchronize()
    state["capturing"] = False
    if INDEX:
        with pytest.raises(AssertionError, match="a capture on cuda"), torch.cuda.graph(fake_cuda.Graph()):
            pass


def test_what_differs_from_launch_to_launch_compiles_nothing_anew():
    """Images, rows, columns and steps: one variant of each kernel serves them all, also where they are 1 or 16."""
    with StandIn() as gpu:
        for b, h, w in ((1, 9, 1), (2, 16, 32), (16, 12, 17), (5, 11, 16)):
            pre = torch.randn(b, h, w, 2, 64, requires_grad=True)
            lstm_scan(pre, torch.randn(2, 64, 32), True, "launches").sum().backward()
            u = torch.randn(b, h, w, 16, requires_grad=True)
            weight = torch.randn(16, 16, 2, 3, requires_grad=True)
            kernels.masked_conv(u, weight, torch.randn(16), live=5).sum().backward()
            logits = torch.randn(b, h, w, 4, requires_grad=True)
            kernels.cross_entropy(logits, torch.zeros(b, h, w, dtype=torch.long)).sum().backward()
        assert sorted(variant.kernel for variant in gpu.variants) == [
            "cross_entropy_bwd_kernel",
            "cross_entropy_fwd_kernel",
            "lstm_scan_bwd_kernel",
            "lstm_scan_fwd_kernel",
            "masked_conv_kernel",  # the product,
            "masked_conv_kernel",  # and the gradient of the map
            "masked_conv_weight_kernel",
        ]
        assert sum(variant.launches for variant in gpu.variants) > 100


def test_a_last_batch_compiles_no_row_anew():
    with StandIn() as gpu:
        for n in (1, 2, 16, 18):
            sample(small(), n, backend="triton")
        of_stem_and_layers = ["row_product_kernel"] * 2
        found = sorted(variant.kernel for variant in gpu.variants)
        assert found == ["draw_row_kernel", "philox_kernel", *of_stem_and_layers]


def test_amd_gpus_are_not_asked_for_what_their_compiler_has_not(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    u = torch.randn(1, 3, 4, 2, 64)
    assert kernels.backend_for(u) == "torch"
    with StandIn("gfx942") as gpu:
        lstm_scan(u, torch.randn(2, 64, 32), True)
        sample(small(), 1, backend="triton")
        assert {"lstm_scan_fwd_kernel", "draw_row_kernel", "row_product_kernel"} == {
            variant.kernel for variant in gpu.variants
        }
        assert not any("maxnreg" in variant.options for variant in gpu.variants)
        monkeypatch.setattr(torch.version, "hip", None)
        with pytest.raises(KeyError, match="maxnreg was specified but unrecognised"):
            lstm_scan(u, torch.randn(2, 64, 32), True)


def test_the_fake_counts_its_devices():
    assert torch.cuda.device_count() == INDEX + 1
    assert fake_cuda.on_cpu("cuda:1") == "cpu" and fake_cuda.on_cpu("cudnn") == "cudnn"
