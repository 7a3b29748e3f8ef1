"""Values without an order, as a codebook has them: read as embeddings, and up to thousands of them."""

import pytest
import torch

import kernels
from kernels.cross_entropy import MOST_LEVELS
from tests.cases import (
    CASES,
    EMBEDDING,
    Case,
    assert_cached_equals_forward,
    assert_methods_agree,
    build,
    every_net,
    given,
    images,
    independent,
    noises,
)


@every_net
def test_thousands_of_levels(case):
    """The network, and both samplers whoever computes the rows, as the definition says it."""
    model = build(case, levels=8192, height=2, width=2, **EMBEDDING)
    assert_cached_equals_forward(model)
    drawn = assert_methods_agree(model, n=3)
    assert torch.equal(drawn, independent(model, noises(model, 0, 3))) and drawn.max() > 255
    p = model.conditionals(images(model, 2)).exp().sum(-1)
    torch.testing.assert_close(p, torch.ones_like(p))


def renamed(model, order):
    """The model in which level k has the name order[k]: rows of the table and of the head's last product are moved."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["value_embedding.weight"][order] = model.state_dict()["value_embedding.weight"]
    for name in ("head.last.weight", "head.last.bias"):
        state[name][order] = model.state_dict()[name]
    other = build(CASES["diag_bilstm"], levels=model.levels, **EMBEDDING)
    other.load_state_dict(state)
    return other


def test_levels_have_no_order():
    """Of a model with embeddings, another model says the same about images whose levels have other names."""
    model = build(CASES["diag_bilstm"], levels=7, **EMBEDDING)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    x = images(model, 5)
    torch.testing.assert_close(renamed(model, order).log_prob(order[x]), model.log_prob(x))


@pytest.mark.parametrize("name", ["gated_pixel_cnn", "multi_scale"])
def test_the_network_reads_nothing_but_the_table(name):
    """Two levels with one row are the same to it, so what follows a value is too."""
    model = build(CASES[name], levels=5, **EMBEDDING)
    with torch.no_grad():
        for net in model.nets:
            net.value_embedding.weight[3] = net.value_embedding.weight[1]
    x = images(model, 6)
    one, other = model.conditionals(x), model.conditionals(torch.where(x == 3, 1, x))
    assert (x == 3).any() and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_many_levels(dtype):
    logits = torch.randn(5, MOST_LEVELS, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([0, 1, 255, 4096, MOST_LEVELS - 1])
    outs, gradients = [], []
    for backend in ("triton", "torch"):
        outs.append(kernels.cross_entropy(logits, target, backend))
        gradients += torch.autograd.grad(outs[-1].square().sum(), logits)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["pixel_cnn", "multi_scale"])
def test_mistakes(name):
    old = build(CASES[name])
    assert not {"input", "input_features"} & old.config.keys()  # nor in any older model's
    for wrong, said in (
        ({"input": "onehot"}, "input='onehot': expected scaled or embedding"),
        ({"input": "embeding"}, "did you mean embedding"),
        ({"input": "embedding", "input_features": 0}, "input_features=0: expected an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            build(CASES[name], **wrong)


def test_an_image_of_a_large_codebook_is_compressed():
    pytest.importorskip("constriction")
    from models.compression import compress, decompress

    model = build(Case("GatedPixelCNN", EMBEDDING, None), levels=8192, height=4, width=4)
    x = images(model, 3)
    assert torch.equal(decompress(model, compress(model, x, **given(model, 3))), x)
