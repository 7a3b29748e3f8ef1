"""What only a GPU can show of the Triton kernels: rounding to bfloat16, races, and training in earnest."""

import copy
import itertools

import pytest
import torch

import kernels
import models
from kernels.diagonal_lstm import diagonal_lstm_reference
from kernels.masked_conv import masked_conv_reference
from kernels.row_lstm import row_lstm_reference
from models.sampling import PixelLoop, noise, sample
from models.sampling.rules import Given, Record

pytestmark = pytest.mark.gpu
CLASSES = ("PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM")


def build(name, channels=1, levels=4, height=9, width=7, hidden=16, layers=2, **others):
    torch.manual_seed(0)
    sizes = {"channels": channels, "levels": levels, "height": height, "width": width}
    return models.build({"_target_": f"models.{name}", **sizes, "hidden": hidden, "layers": layers, **others})


def outputs(operation, inputs, d_out):
    given = [x.detach().clone().requires_grad_() for x in inputs]
    out = operation(*given)
    return [out.detach(), *torch.autograd.grad(out, given, d_out.to(out.dtype).expand_as(out))]


def operations():
    """name → (function of tensors and a backend, reference, inputs in float32)."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    for b, h, w, f in ((3, 9, 7, 16), (5, 28, 29, 64), (4, 32, 33, 128), (2, 64, 17, 32), (1, 5, 6, 20)):
        k, state = 2 * f, f**-0.5

        def of_input(gates, b=b, h=h, w=w, k=k):
            """Shapes and scales of u, the input-to-state weights and their bias."""
            return ((b, h, w, k), 1.0), ((*gates, k), k**-0.5), (gates, 1.0)

        yield (
            f"diagonal_lstm f={f}",
            lambda *x, backend: kernels.diagonal_lstm(*x, backend=backend),
            [numbers(*shape, scale=scale) for shape, scale in (*of_input((2, 4 * f)), ((2, 4 * f, k), state / 2))],
        )
        yield (
            f"row_lstm f={f}",
            lambda *x, backend: kernels.row_lstm(*x[:4], x[4], backend=backend),
            [
                numbers(*shape, scale=scale)
                for shape, scale in (*of_input((4 * f,)), ((4 * f, f, 3), state / 2), ((4 * f, k), k**-0.5))
            ],
        )
    for k, f, rows, columns, live in ((128, 128, 2, 3, 5), (3, 64, 4, 7, 25), (16, 40, 2, 3, 6), (48, 32, 1, 1, 1)):
        mask = (torch.arange(rows * columns) < live).view(rows, columns)
        yield (
            f"masked_conv {k} → {f}, {rows}×{columns}",
            lambda u, weight, bias, backend, mask=mask, live=live: kernels.masked_conv(
                u, weight * mask.to(u), bias, True, 0, live, backend=backend
            ),
            [numbers(4, 17, 13, k), numbers(f, k, rows, columns, scale=(k * live) ** -0.5), numbers(f)],
        )
    target = torch.randint(0, 256, (1000,), generator=generator)
    yield (
        "cross_entropy",
        lambda x, backend: kernels.cross_entropy(x, target.to(x.device), backend=backend),
        [numbers(1000, 256, scale=3.0)],
    )
    yield "gate", lambda x, backend: kernels.gate(x, backend=backend), [numbers(999, 64, scale=2.0)]


cases = pytest.mark.parametrize(
    "name, operation, inputs", list(operations()), ids=lambda x: x if isinstance(x, str) else ""
)


def error(got, expected):
    return ((got.double().cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@cases
def test_bfloat16_is_as_near_as_torch_in_bfloat16(name, operation, inputs):
    """Both are compared with float64 on the CPU, from the same rounded numbers."""
    rounded = [x.bfloat16() for x in inputs]
    exact_inputs = [x.double() for x in rounded]
    with torch.no_grad():
        d_out = torch.randn_like(operation(*exact_inputs, backend="torch"))
    exact = outputs(lambda *x: operation(*x, backend="torch"), exact_inputs, d_out)
    here = [x.cuda() for x in rounded]
    triton = outputs(lambda *x: operation(*x, backend="triton"), here, d_out.cuda())
    plain = outputs(lambda *x: operation(*x, backend="torch"), here, d_out.cuda())
    for k, (got, other, expected) in enumerate(zip(triton, plain, exact, strict=True)):
        assert got.isfinite().all()
        assert error(got, expected) < 2 * error(other, expected) + 1e-5, (name, k)


@cases
def test_float32_is_exact_and_two_runs_are_equal(name, operation, inputs):
    with torch.no_grad():
        d_out = torch.randn_like(operation(*inputs, backend="torch"))
    exact = outputs(lambda *x: operation(*x, backend="torch"), [x.double() for x in inputs], d_out.double())
    here = [x.cuda() for x in inputs]
    first, second = (outputs(lambda *x: operation(*x, backend="triton"), here, d_out.cuda()) for _ in range(2))
    for k, (got, again, expected) in enumerate(zip(first, second, exact, strict=True)):
        assert torch.equal(got, again), (name, k)
        assert error(got, expected) < 5e-6, (name, k)


@cases
def test_two_runs_in_bfloat16_are_equal(name, operation, inputs):
    here = [x.cuda().bfloat16() for x in inputs]
    with torch.no_grad():
        d_out = torch.randn_like(operation(*here, backend="triton"))
    first, second = (outputs(lambda *x: operation(*x, backend="triton"), here, d_out) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_references_are_what_the_cpu_computes():
    """The oracle of this file, torch's form, against the written-out equations."""
    for name, operation, inputs in list(operations())[:2]:
        reference = diagonal_lstm_reference if "diagonal" in name else row_lstm_reference
        exact = [x.double() for x in inputs]
        torch.testing.assert_close(operation(*exact, backend="torch"), reference(*exact))
    u, weight, bias = torch.randn(1, 4, 4, 3), torch.randn(2, 3, 2, 3), torch.randn(2)
    torch.testing.assert_close(kernels.masked_conv(u, weight, bias), masked_conv_reference(u, weight, bias))


@pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_the_same_on_the_gpu(name, head):
    model = build(name, channels=3, hidden=18, head=head)
    x = torch.randint(0, 4, (3, 3, 9, 7))
    expected = model.log_prob(x)
    torch.testing.assert_close(model.cuda().log_prob(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_no_leak_in_bfloat16(name):
    """Changing a sub-pixel moves no conditional at or before it, not by one bit."""
    model = build(name, channels=3, hidden=24, height=5, width=6).cuda()
    x = torch.randint(0, 4, (1, 3, 5, 6), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before = model.conditionals(x)
        for k in range(0, 90, 7):
            i, j, c = k // 18, k // 3 % 6, k % 3
            changed = x.clone()
            changed[0, c, i, j] = (changed[0, c, i, j] + 1) % 4
            moved = (model.conditionals(changed) != before).any(-1)[0].permute(1, 2, 0).flatten()
            assert not moved[: k + 1].any()


@pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_cached_sampler_draws_what_the_network_says(name, head):
    """By each backend, in one program and in several, with the row captured in the first batch or in the second."""
    model = build(name, channels=3, hidden=18, height=6, width=5, head=head).cuda().eval()
    uniforms = noise(0, range(60), model.shape).cuda()
    naive = sample(model, 60, method="naive", uniforms=[uniforms])
    for backend, batch_size in itertools.product(kernels.BACKENDS, (15, 20, 60)):
        drawn = sample(model, 60, backend=backend, uniforms=[uniforms], batch_size=batch_size)
        assert torch.equal(drawn, naive), (backend, batch_size)


@pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_moves_conditionals_by_little(name, head):
    model = build(name, channels=3, hidden=18, height=6, width=5, head=head).cuda().eval()
    x = torch.randint(0, 4, (20, 3, 6, 5), device="cuda")
    with torch.no_grad():
        expected = model.conditionals(x).exp()
    for how in ({"method": "naive"}, *({"method": "cached", "backend": name} for name in kernels.BACKENDS)):
        record = Record(copy.deepcopy(model).bfloat16(), Given(x), 20, conditionals=True)
        PixelLoop(copy.deepcopy(model).bfloat16(), rule=record, b=20, **how).run()
        moved = (record.conditionals.exp() - expected).abs().sum(-1) / 2
        assert 0 < moved.mean() < 0.02, how


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_training_in_bfloat16_learns(name, compiled):
    torch._dynamo.reset()
    model = build(name, hidden=32).cuda()
    x = torch.randint(0, 4, (1, 1, 9, 7), device="cuda").expand(8, -1, -1, -1).contiguous()
    step = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
