"""What the row kernel promises: the naive sampler's pixels and the network's conditionals, in one launch a row.

On a machine without a GPU it runs in Triton's interpreter, watched for races (`tests.races`); `bench.compile` compiles
it.

Legend: b batch · n images · c channel (colour) · h w rows, columns · v levels.
"""

import pytest
import torch

import kernels.draw_row
from kernels.draw_row import Form, form_for
from models.features import Stretch, places
from models.sampling import PixelLoop, sample
from models.sampling.cached import Cached
from models.sampling.rules import Given, Keep, Record, Rule
from tests.cases import (
    CASES,
    assert_cached_equals_forward,
    build,
    every,
    every_case,
    every_net,
    given,
    images,
    noises,
    plain,
)

triton = pytest.importorskip("triton", reason="Triton is for Linux")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("no_hazards")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Large blocks for small models: the interpreter takes its time for each."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels.draw_row, "form_for", lambda *_, **__: Form(16, 64, 64, 1, 4))


def small(case, **arguments):
    return build(case, **{"channels": 3, "levels": 5, "height": 2, "width": 2, "hidden": 7, **arguments}).to(DEVICE)


def assert_as_naive(model, n=2, **arguments):
    arguments = {**given(model, n), **arguments}
    drawn, naive = (sample(model, n, **how, **arguments) for how in ({"backend": "triton"}, {"method": "naive"}))
    assert torch.equal(drawn, naive), f"differ first at (n c h w) {(drawn != naive).nonzero()[0].tolist()}"
    return drawn


@pytest.mark.slow
@every_case
def test_it_draws_the_pixels_of_the_naive_sampler(case):
    assert assert_as_naive(small(case)).unique().numel() > 1


@pytest.mark.slow
@every(lambda case: plain(case) and "classes" not in case.extra)
@pytest.mark.parametrize("channels, width", [(1, 2), (3, 1)])
def test_its_conditionals_are_the_network_s(case, channels, width):
    assert_cached_equals_forward(small(case, channels=channels, width=width), b=2, backend="triton")


@pytest.mark.slow
@every_net
@pytest.mark.parametrize("height, width", [(1, 1), (4, 1), (1, 5)], ids=str)
def test_images_of_one_row_or_column(case, height, width):
    assert_as_naive(small(case, channels=1, height=height, width=width))


@pytest.mark.slow
@every_net
def test_many_layers_of_many_blocks(case):
    """More features than one block of any form has, in groups that are not equal."""
    model = small(case, hidden=101, layers=3, head_features=70, std=0.02)
    assert_as_naive(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixel_cnn", "diag_bilstm-mixture-embedding"])
def test_more_images_than_a_program_has(name):
    model = small(CASES[name], channels=1)
    drawn = assert_as_naive(model, 18)
    assert len(drawn.flatten(1).unique(dim=0)) > 9


# In the interpreter also those of bfloat16, which it has not: on a GPU their blocks are too large for float32.
FORMS = sorted({form_for(b, size, 132) for b in (1, 9999) for size in ((2, 4) if DEVICE.type == "cpu" else (4,))})


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
@every_net
def test_every_form(case, form, monkeypatch):
    monkeypatch.setattr(kernels.draw_row, "form_for", lambda *_, **__: form)
    assert_as_naive(small(case, channels=2, height=2, width=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixel_cnn", "row_lstm-mixture-embedding"])
@pytest.mark.parametrize("temperature", [0.3, 1e-39, 0])
def test_temperatures(name, temperature):
    assert_as_naive(small(CASES[name]), 3, temperature=temperature)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_pixel_cnn", "multi_scale", "multi_scale-mixture"])
def test_known_sub_pixels_are_kept(name):
    """Those of the caller, and those that a smaller image shows."""
    model = small(CASES[name])
    x = images(model, 2, seed=5)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    drawn = assert_as_naive(model, uniforms=[u.to(DEVICE) for u in noises(model, 2, 2)], known=(x, known)).long()
    assert torch.equal(drawn[known], x[known]) and not torch.equal(drawn, x)


@pytest.mark.parametrize("levels", [2, 300])
def test_numbers_of_levels(levels):
    uniforms = torch.full((2, 1, 1, 2), 1 - 2**-24)
    drawn = assert_as_naive(small(CASES["pixel_cnn"], channels=1, levels=levels, height=1, width=2), uniforms=uniforms)
    assert drawn.max() > 0.9 * (levels - 1)


def test_a_value_of_probability_zero_is_never_drawn():
    """Least noise takes the first value that can be, most noise the last."""
    model = small(CASES["pixel_cnn"], channels=1, levels=8, height=1, width=2)
    with torch.no_grad():
        model.head.last.bias[[0, 1, 4, 6, 7]] = -1e30
    for number, value in ((0.0, 2), (1 - 2**-24, 5)):
        drawn = sample(model, 2, backend="triton", uniforms=torch.full((2, 1, 1, 2), number))
        assert (drawn == value).all()


@pytest.mark.slow
def test_it_scores_what_is_drawn():
    model = small(CASES["pixel_cnn"])
    rule = Keep(
        images(model, 2).to(DEVICE), torch.zeros(2, *model.shape, device=DEVICE), Given(images(model, 2).to(DEVICE))
    )
    with pytest.raises(ValueError, match="backend='triton': expected torch with Keep"):
        PixelLoop(model, "cached", rule, 2, backend="triton").run()
    record = Record(model, Given(images(model, 2).to(DEVICE)), 2)
    x = PixelLoop(model, "cached", record, 2, backend="triton").run()
    torch.testing.assert_close(record.log_prob, model.log_prob(x).detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter has no bfloat16")
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(
        ValueError, match="backend='triton': expected torch with bfloat16: Triton's interpreter has none"
    ):
        sample(small(CASES["pixel_cnn"]), 1, backend="triton", bf16=True)


def test_a_rule_of_the_caller_s_own_is_refused():
    """Where the kernel is asked for; where nothing is said, torch computes the rows."""

    class Own(Rule):
        def __call__(self, j, g, logits):
            return logits.argmax(1)

    model = small(CASES["pixel_cnn"])
    with pytest.raises(ValueError, match="backend='triton': expected torch with Own: the kernel has no such rule"):
        PixelLoop(model, "cached", Own(), 1, backend="triton")
    assert PixelLoop(model, "cached", Own(), 1).run().shape == (1, *model.shape)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it is for this device")
def test_without_the_interpreter_it_is_for_cuda(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="backend='triton': expected torch or cpu on cpu: Triton's kernels are"):
        sample(small(CASES["pixel_cnn"]), 1, backend="triton")


# --------------------------------------------------------------------------------------------- room for sixteen


@every_case
@pytest.mark.parametrize("channels", [1, 3])
def test_an_aligned_network_is_the_network(case, channels):
    for net in small(case, channels=channels, hidden=35).nets:
        x, b = images(net, 3).to(DEVICE), 3
        condition = net.condition(**{name: value.to(DEVICE) for name, value in given(net, b).items()})
        aligned = net.in_row().aligned()
        assert aligned.up.inputs[0].size == 48
        kept = []
        with torch.inference_mode():
            for network in (net.in_row(), aligned):
                evaluator, rule = Cached(net, b, condition, network=network), Given(x)
                record = Record(net, rule, b, conditionals=True)
                for i in range(net.height):
                    evaluator.load(i)
                    record.load(i)
                    evaluator.row(record, torch.empty(b, net.channels, net.width, dtype=torch.long), first=i == 0)
                    record.store(i)
                kept.append(record.conditionals)
        torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-4)


def test_where_features_go():
    assert [Stretch(*of).aligned().size for of in ((128, 3), (128, 1), (7, 2))] == [144, 128, 32]
    for old, expected in (
        ([Stretch(5, 2)], [0, 1, 2, 16, 17]),
        ([Stretch(3), Stretch(3)], [0, 1, 2, 16, 17, 18]),
    ):
        assert places(old, [stretch.aligned() for stretch in old]).tolist() == expected
