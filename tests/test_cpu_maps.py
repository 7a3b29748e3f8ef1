"""Maps of Multi-Scale and of clips by compiled products: torch's but for rounding, the same bits however computed.

Legend: b batch · n images · c channel (colour) · h w rows, columns · v levels.
"""

import pytest
import torch

import models.sampling
from models.multi_scale import Upsample
from models.sampling import sample
from models.sampling.cpu_maps import compiled
from models.video import convolution
from tests.cases import CASES, build, given, images, scored

FLOAT, DOUBLE = torch.float32, torch.float64
every_way = pytest.mark.parametrize("b, threads, cpu, dtype", [
    (1, 1, "", FLOAT), (3, 2, "", FLOAT), (16, 1, "", FLOAT), (33, 2, "", FLOAT), (3, 2, "generic", FLOAT),
    (33, 1, "generic", FLOAT), (1, 2, "", DOUBLE), (3, 1, "", DOUBLE), (16, 2, "", DOUBLE),
])  # fmt: skip


@pytest.fixture
def set_up(monkeypatch):
    """`set_up(threads, cpu)`: compute by so many threads, as compiled for a CPU; "" is this one."""
    before = torch.get_num_threads()

    def set_up(threads, cpu):
        torch.set_num_threads(threads)
        monkeypatch.setenv("PIXELRNN_CPU", cpu)

    yield set_up
    torch.set_num_threads(before)


MODULES = {"upsample": Upsample, "convolution": convolution}
every_module = pytest.mark.parametrize("module", MODULES)


def made(module, b, c, h, w, d, dtype):
    """A module that makes d features, and scaled images."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODULES[module](c, d).to(dtype), 2 * torch.rand(b, c, h, w, generator=generator, dtype=dtype) - 1


def multi_scale(**arguments):
    """Three sizes, conditioned on classes too."""
    fixed = {"base": "pixel_cnn", "doublings": 2, "classes": 3, "channels": 2, "levels": 5, "layers": 1}
    return build(CASES["multi_scale"], **fixed, **{"conditional": "row_lstm", "height": 4, "width": 8, **arguments})


def video(**arguments):
    """Three frames, conditioned on classes too."""
    fixed = {"net": "row_lstm", "frames": 3, "classes": 3, "channels": 2, "levels": 5, "layers": 1}
    return build(CASES["video"], **fixed, **{"height": 4, "width": 5, **arguments})


def in_batches(b, n, of):
    """of(slice) for images in batches of b, joined."""
    return torch.cat([of(slice(k, k + b)) for k in range(0, n, b)])


@pytest.mark.parametrize("dtype, limit", [(FLOAT, 1e-5), (DOUBLE, 1e-12)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 6), (3, 3, 2, 5, 7), (2, 2, 7, 3, 9), (33, 3, 5, 1, 17)], ids=str)
@every_module
def test_maps_are_torch_s_but_for_rounding(module, shape, dtype, limit):
    module, x = made(module, *shape, dtype)
    maps = compiled(module, x)
    assert maps.dtype == dtype and (maps > 0).any()
    torch.testing.assert_close(maps, module(x).detach(), rtol=0, atol=limit)


@every_way
@every_module
def test_maps_are_the_same_bits(module, b, threads, cpu, dtype, set_up):
    """In any batch, by any number of threads, compiled for any CPU."""
    module, x = made(module, 33, 3, 5, 3, 9, dtype)
    expected = compiled(module, x)
    set_up(threads, cpu)
    assert torch.equal(in_batches(b, 33, lambda batch: compiled(module, x[batch])), expected)


@every_way
@pytest.mark.parametrize("of", [multi_scale, video])
def test_conditionals_and_draws_of_all_stages_are_the_same_bits(of, b, threads, cpu, dtype, set_up):
    model = of().to(dtype)
    x, label = images(model, 33), given(model, 33)["label"]

    def conditionals(batch):
        return scored(model, x[batch], {"label": label[batch]}, "cpu", compiled)[0]

    expected, drawn = conditionals(slice(None)), sample(model, 33, label=label, backend="cpu")
    set_up(threads, cpu)
    assert torch.equal(in_batches(b, 33, conditionals), expected)
    assert torch.equal(sample(model, 33, label=label, backend="cpu", batch_size=b), drawn)


@pytest.mark.parametrize("arguments, dtype, by_cpu", [
    ({}, FLOAT, True),
    ({"backend": "cpu"}, DOUBLE, True),
    ({}, DOUBLE, False),
    ({"backend": "torch"}, FLOAT, False),
    ({"method": "naive"}, FLOAT, False),
], ids=str)  # fmt: skip
def test_who_makes_the_maps_of_a_draw(arguments, dtype, by_cpu, monkeypatch):
    """Whoever computes the rows: compiled products for compiled rows, else torch. A draw is of the maps made."""
    model, shapes = multi_scale(conditional="pixel_cnn", width=4).to(dtype), []
    label = given(model, 3)["label"]

    def brighter(module, x):
        shapes.append(tuple(x.shape))
        return compiled(module, x) + 3

    drawn = sample(model, 3, label=label, **arguments)
    monkeypatch.setattr(models.sampling, "compiled", brighter)
    assert torch.equal(sample(model, 3, label=label, **arguments), drawn) != by_cpu
    assert shapes == ([(3, 2, 1, 1), (3, 2, 2, 2)] if by_cpu else [])
