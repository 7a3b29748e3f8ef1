"""What compiled rows on a CPU promise: the network's conditionals, and the same bits for any batch, threads and CPU.

`python -m tests.test_cpu_row` prints `DIGESTS`.

Legend: b batch · n images · c channel (colour) · h w rows, columns · v levels.
"""

import hashlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import models
from kernels import native
from models.logistic_mixture import LogisticMixtureHead
from models.sampling import PixelLoop, noise, sample
from models.sampling.cpu_maps import compiled
from models.sampling.rules import Draw, Given, Keep, Record, Rule
from tests.cases import ARCHITECTURES, CASES, MIXTURE, build, config, every_case, every_net, given, images, of_stages

every_way = pytest.mark.parametrize("called", [False, True], ids=["whole", "called"])


class Called(Record):
    """A rule that can only be called, so that each sub-pixel's logits come back from the compiled functions."""

    def choice(self, whole=False):
        return None


class Drawn(NamedTuple):
    x: Tensor  # (b c h w)
    conditionals: Tensor  # (b c h w v)
    log_prob: Tensor  # (b,)


def drawn(net, rule: Rule, b: int, condition: Tensor | None, called: bool = False, backend: str = "cpu") -> Drawn:
    """The images that a rule chooses, and what the sampler says of them."""
    record = (Called if called else Record)(net, rule, b, conditionals=True)
    x = PixelLoop(net, "cached", record, b, condition, backend).run()
    return Drawn(x, record.conditionals, record.log_prob)


def same(one: Drawn, other: Drawn) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------- conditionals of the network


def exact(net, x: Tensor, condition: Tensor | None) -> Tensor:
    """The network's conditionals, of the type of its weights: those of a softmax are otherwise float32."""
    parameters = net.outputs(x, condition)
    if isinstance(net.head, LogisticMixtureHead):
        return net.head.conditionals(parameters, x)
    return parameters.log_softmax(-1).movedim(3, 1)


@every_case
@every_way
def test_conditionals_are_those_of_the_forward_pass(case, called):
    """Of models as they begin, of each of Multi-Scale's nets: within 10⁻⁵, in float64 10⁻¹⁰."""
    for channels, dtype, limit in ((1, torch.float32, 1e-5), (3, torch.float32, 1e-5), (3, torch.float64, 1e-10)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models.build(config(case, channels=channels, levels=5)).to(dtype).eval()
        x, conditions, before = images(model, 5), given(model, 5), []
        for k, (net, of_stage) in enumerate(zip(model.nets, of_stages(model, x), strict=True)):
            with torch.no_grad():
                condition = model.stage(k, 5, before, conditions.get("label"), conditions.get("cond")).condition
                values, conditionals, log_prob = drawn(net, Given(of_stage), 5, condition, called)
                expected = exact(net, of_stage, condition)
            before.append(values)
            assert torch.equal(values, of_stage) and conditionals.dtype == dtype
            assert (conditionals - expected).abs().max() < limit
            of_values = expected.gather(-1, of_stage[..., None]).sum((1, 2, 3, 4))
            assert (log_prob - of_values).abs().max() < limit * of_stage[0].numel()


# ----------------------------------------------------------------------------------------------------- the bits

# Models of which every bit is promised.
PROMISED = {
    f"{name}{switches}": CASES[f"{name}{switches}"]
    for name in (*ARCHITECTURES, "multi_scale", "video")
    for switches in ("", "-mixture-given")
}
every_promised = pytest.mark.parametrize("name", PROMISED)


def with_written_weights(name: str, channels: int, dtype: torch.dtype = torch.float32):
    """A model whose weights are integers over a power of two, from no generator and no function of a library."""
    case = PROMISED[name]
    sizes = {"channels": channels, "levels": 5, "height": 4, "width": 5, "hidden": 7, "layers": 2, "head_features": 9}
    model, begin = models.build(config(case, **sizes)).to(dtype).eval(), 0
    with torch.no_grad():
        for parameter in model.parameters():
            k = torch.arange(begin, begin + parameter.numel())
            parameter.copy_(((k * 2654435761 % 2**32 >> 16) - 2**15).view(parameter.shape) / 2**16)
            begin += len(k)
    return model


def draw(model, numbers: list[int]) -> Drawn:
    """Images of these numbers, drawn with noise, labels and maps of their own; what the last stage drew."""
    label = torch.tensor(numbers) % model.classes if model.classes else None
    cond, out, before = None, None, []
    if model.map_features:
        of_maps = noise(1, numbers, (model.map_features, model.height, model.width))
        cond = of_maps.to(model.stem.weight.dtype)
    for k, net in enumerate(model.nets):
        with torch.no_grad():
            stage = model.stage(k, len(numbers), before, label, cond, compiled)
        rule = Draw(noise(0, numbers, net.shape, k))
        rule = rule if stage.known is None else Keep(stage.x, stage.known, rule)
        out = drawn(net, rule, len(numbers), stage.condition)
        before.append(out.x)
    return out


def digest(of: Drawn) -> str:
    """Of values and of conditionals, to the last bit."""
    return hashlib.sha256(of.x.numpy().tobytes() + of.conditionals.numpy().tobytes()).hexdigest()[:16]


def digests(name: str) -> tuple[str, ...]:
    """Of three images: of one colour and of three, in float32; of three in float64."""
    kinds = (1, torch.float32), (3, torch.float32), (3, torch.float64)
    return tuple(digest(draw(with_written_weights(name, *kind), [0, 1, 2])) for kind in kinds)


DIGESTS = {
    "pixel_cnn": ("4845ea8d4d6c637e", "79f5353b27ae1991", "f9bd59430de42309"),
    "pixel_cnn-mixture-given": ("f81c0744b1534249", "0e118367c60814c1", "d8ac0507b87211d8"),
    "gated_pixel_cnn": ("9bef7052fc26b260", "905efefc660dd940", "461e1b23b3770896"),
    "gated_pixel_cnn-mixture-given": ("ccdc4410402634c4", "fc328b963cc60877", "34b70109f00c90c6"),
    "row_lstm": ("94b4d890c6fc45de", "ecd648fdd1e0bd53", "f37d2339059f21ee"),
    "row_lstm-mixture-given": ("9c9f3cc54c6fc33d", "c321b94620bffae6", "6e8c55cdde3f73d5"),
    "diag_bilstm": ("0eaac07f27b45df8", "1df0c1ea1bca5be3", "f5805f038d0ab1f4"),
    "diag_bilstm-mixture-given": ("80a5311ab596af2d", "828c5bf6dbac79ef", "b0d0c59fb57438dc"),
    "multi_scale": ("b95be30cb533f5f3", "fc7dcca05c88e7e5", "8143e0154d5aa563"),
    "multi_scale-mixture-given": ("d4e3908dd336d3d1", "3d00340df933b7e3", "a29c01eee954c8c9"),
    "video": ("17e9bdeabcdf754d", "985be00a024e52b1", "7c35720d49ea8c4c"),
    "video-mixture-given": ("8bccf234a2de46f9", "2d8eb667387dab9d", "f0b751a9a958b683"),
}


@every_promised
def test_every_machine_computes_these_bits(name):
    assert digests(name) == DIGESTS[name]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_promised
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_the_same_bits_in_any_batch_by_any_number_of_threads(name, channels, threads):
    """Tiles of one image and more, full ones, parts of them, and more than there are threads."""
    model = with_written_weights(name, channels)
    threads(2)
    whole = draw(model, list(range(257)))
    assert len(whole.x.flatten(1).unique(dim=0)) > 200
    for b in (1, 2, 3, 8, 9, 16, 17, 64):
        for count in (1, 2):
            threads(count)
            numbers = list(range(240 - 3 * b, 240 - 2 * b))
            assert same(draw(model, numbers), Drawn(*(x[numbers] for x in whole))), f"{b} images, {count} threads"


@pytest.mark.parametrize("cpu", native.CPUS)
def test_an_image_is_the_same_bits_on_any_cpu(cpu, compiled_for):
    """Also on one without fused multiply-adds, whose C library has them."""
    every_model = [with_written_weights(name, channels) for name in PROMISED for channels in (1, 3)]
    every_model += [with_written_weights("diag_bilstm-mixture-given", 3, torch.float64)]
    here = [draw(model, [5, 6, 7, 8, 9]) for model in every_model]
    compiled_for(cpu)
    for model, expected in zip(every_model, here, strict=True):
        assert same(draw(model, [5, 6, 7, 8, 9]), expected)


# ------------------------------------------------------------------------------------------------- what is drawn


def assert_as_torch(model, rule, b: int = 5):
    """Compiled rows draw what torch's do, with the same log-probabilities. In float64: rounding then moves no pixel."""
    model = model.double()
    with torch.no_grad():
        condition = model.condition(**given(model, b))
    found = [drawn(model, rule(), b, condition, backend=backend) for backend in ("cpu", "torch")]
    found += [drawn(model, rule(), b, condition, called=True)]
    for other in found[1:]:
        assert torch.equal(found[0].x, other.x)
        torch.testing.assert_close(found[0][1:], other[1:], rtol=0, atol=1e-8)
    return found[0].x


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1e-39, 3])
@pytest.mark.parametrize("name", ["pixel_cnn", "diag_bilstm-mixture-given"])
def test_temperatures(name, temperature):
    model = build(CASES[name], channels=3, levels=17)
    uniforms = noise(0, range(5), model.shape)
    assert assert_as_torch(model, lambda: Draw(uniforms, temperature)).unique().numel() > 2


@every_net
@pytest.mark.parametrize("head", [{}, MIXTURE], ids=["softmax", "mixture"])
def test_known_sub_pixels_are_kept_and_what_follows_sees_them(case, head):
    model = build(case._replace(extra=head), channels=3, levels=5)
    x, uniforms = images(model, 5), noise(0, range(5), model.shape)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    out = assert_as_torch(model, lambda: Keep(x, known, Draw(uniforms)))
    assert torch.equal(out[known], x[known]) and not torch.equal(out, x)
    of_one = Keep(x, known[:1], Draw(uniforms))  # the same for all
    assert torch.equal(assert_as_torch(model, lambda: of_one)[:1], out[:1])


@every_net
@pytest.mark.parametrize("levels, height, width, channels", [
    (2, 1, 1, 1), (2, 6, 1, 2), (17, 1, 6, 4), (256, 2, 3, 3), (300, 1, 2, 1),
])  # fmt: skip
@pytest.mark.parametrize("head", [{}, MIXTURE], ids=["softmax", "mixture"])
def test_levels_and_sizes(case, head, levels, height, width, channels):
    extra = {**head, "classes": 3, "map_features": 2}
    sizes = {"levels": levels, "height": height, "width": width, "channels": channels}
    model = build(case._replace(extra=extra), **sizes)
    uniforms = noise(0, range(17), model.shape)
    assert_as_torch(model, lambda: Draw(uniforms), b=17)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_a_value_of_probability_zero_is_never_drawn(kind):
    """Least noise takes the first value that can be, most noise the last: that of float64 is 1 in float32."""
    model = build(CASES["pixel_cnn"], levels=8)
    with torch.no_grad():
        model.head.last.bias[[0, 1, 4, 6, 7]] = -1e30
    for number, value in ((0.0, 2), (1 - torch.finfo(kind).eps / 2, 5)):
        x = sample(model, 2, backend="cpu", uniforms=torch.full((2, *model.shape), number, dtype=kind))
        assert (x == value).all()


def test_log_probabilities_alone_are_the_same():
    model, b = build(CASES["row_lstm"], channels=3), 5
    alone = Record(model, Given(images(model, b)), b)
    PixelLoop(model, "cached", alone, b, backend="cpu").run()
    assert torch.equal(alone.log_prob, drawn(model, Given(images(model, b)), b, None).log_prob)


def test_again_follows_the_condition_and_the_noise():
    """Nothing of the images before is left, and the memory is laid out once."""
    model = build(CASES["diag_bilstm-given"], channels=2, levels=5)
    with torch.no_grad():
        conditions = [model.condition(**given(model, 20, seed)) for seed in (0, 1)]
    rules = [Draw(noise(seed, range(20), model.shape)) for seed in (0, 1)]
    expected = [drawn(model, rule, 20, condition).x for rule, condition in zip(rules, conditions, strict=True)]
    loop = PixelLoop(model, "cached", Draw(rules[0].uniforms), 20, conditions[0], backend="cpu")
    arena = loop.evaluator.tiles.arena.data_ptr()
    for k in (0, 1, 0):
        assert torch.equal(loop.again(rules[k], conditions[k]), expected[k])
    assert loop.evaluator.tiles.arena.data_ptr() == arena


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("name", ["gated_pixel_cnn", "diag_bilstm-mixture-embedding"])
def test_weights_that_are_no_numbers_give_values_all_the_same(name, value):
    model = build(CASES[name], channels=3, levels=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[::3] = value
    for temperature in (0, 0.7, 1):
        x = sample(model, 20, temperature=temperature, backend="cpu")
        assert x.max() < 5


def test_values_outside_the_levels_reach_no_other_memory():
    model = build(CASES["pixel_cnn-mixture-embedding"], channels=3, levels=5)
    x = images(model, 3)
    expected = drawn(model, Given(x), 3, None)
    x[0, 0, 1, 1], x[1, 1, 1, 1] = -(2**40), 2**40
    out = drawn(model, Given(x), 3, None)
    assert same(Drawn(*(part[2:] for part in out)), Drawn(*(part[2:] for part in expected)))


def test_what_is_given_has_the_batch_s_size():
    model = build(CASES["pixel_cnn"])
    for rule in (Given(images(model, 2)), Draw(noise(0, range(2), model.shape))):
        with pytest.raises(RuntimeError, match="expand"):
            PixelLoop(model, "cached", rule, 3, backend="cpu").run()


def main() -> None:
    for name in PROMISED:
        print(f"    {name!r}: {digests(name)!r},".replace("'", '"'))


if __name__ == "__main__":
    main()
