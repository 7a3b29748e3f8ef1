"""A fifth architecture, told here and nowhere else: a forward and an `in_row`. All proofs of sampling hold for it."""

import pytest
import torch
from torch import nn

import kernels
import models
import models.sampling
from models.base import AutoregressiveModel
from models.body import Body
from models.in_row import InRow
from models.layers import MaskedConv, MaskedLinear, in_rows, side_by_side
from tests.cases import (
    MIXTURE,
    Case,
    assert_cached_equals_forward,
    assert_methods_agree,
    build,
    changes,
    convolutions,
    images,
    independent,
    noises,
)


class GatedBlocks(Body):
    """A PixelCNN's block with a gate in it: u ← u + up(gate(conv(ReLU(down(ReLU(u))))))."""

    def make_layers(self):
        self.down = nn.ModuleList(MaskedLinear([self.wide], [self.narrow]) for _ in range(self.layers))
        self.conv = nn.ModuleList(MaskedConv("B", 3, self.narrow, [self.narrow] * 2) for _ in range(self.layers))

    def layer(self, k, u, condition):
        return kernels.gate(self.conv[k](self.down[k](u.relu()), relu=True))

    def in_row(self):
        return InRow("gate", *in_rows(self.conv), "here", down=side_by_side(self.down))


class Own(AutoregressiveModel):
    architecture = GatedBlocks


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setattr(models, "Own", Own, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "Own"])


EXTRAS = {"": {}, "-skip": {"skip": True}, "-only_skip": {"skip": True, "residual": False}, "-mixture": MIXTURE}
every_extra = pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())


def small(extra, **arguments):
    return build(
        Case("Own", extra, None), **{"channels": 3, "levels": 5, "height": 2, "width": 3, "hidden": 7, **arguments}
    )


@every_extra
@pytest.mark.parametrize("channels, height, width", [(1, 4, 7), (3, 3, 2), (3, 1, 1)])
def test_the_cached_sampler_is_the_network(extra, channels, height, width):
    assert_cached_equals_forward(small(extra, channels=channels, height=height, width=width))


@every_extra
def test_cached_and_naive_draw_the_same(extra):
    model = small(extra)
    drawn = assert_methods_agree(model, uniforms=noises(model, 0, 3))
    assert torch.equal(drawn.long(), independent(model, noises(model, 0, 3)))


@every_extra
def test_known_sub_pixels_are_kept(extra):
    model = small(extra)
    x = images(model, 3)
    drawn = assert_methods_agree(model, known=(x, x < 2)).long()
    assert torch.equal(drawn[x < 2], x[x < 2])


@pytest.mark.slow
@every_extra
@pytest.mark.usefixtures("no_hazards")
def test_the_row_kernel_draws_the_same(extra):
    pytest.importorskip("triton", reason="Triton is for Linux")
    model = small(extra, height=2, width=2)
    assert_cached_equals_forward(model, b=2, backend="triton")
    assert torch.equal(
        *(models.sampling.sample(model, 2, **how) for how in ({"backend": "triton"}, {"method": "naive"}))
    )


def test_no_conditional_sees_what_comes_after():
    model = small({}, height=3, width=4)
    changed = changes(model)
    assert not changed.tril().any()
    assert not (changed.T & ~convolutions(3, 4, 3, 2)).any()


def test_its_multiply_adds_are_counted():
    stem, block, head = 24 * 14, 14 * 7 + 5 * 7 * 14 + 7 * 14, 14 * 32 + 32 * 5
    model = Own(1, 5, 2, 3, 7, 2)
    assert model.in_row().multiply_adds() == (stem + 2 * block, head)
