"""Models under torch.compile(fullgraph=True): the same numbers, and they train.

The whole graph is captured, forward and backward, and run operation by operation: what code is generated from it is
torch's affair, and takes minutes.
"""

import pytest
import torch

import kernels
import models

# torch's compiler instantiates autograd functions itself, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
CLASSES = ("PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM")


def build(name, **others):
    torch.manual_seed(0)
    sizes = {"channels": 1, "levels": 3, "height": 3, "width": 4, "hidden": 4, "layers": 1}
    return models.build({"_target_": f"models.{name}", **sizes, **others})


@pytest.mark.slow
@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_model_trains(name, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is for Linux")
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randint(0, 3, (2, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    with kernels.use(backend):
        torch.testing.assert_close(compiled(x), model(x))
        for _ in range(4):
            loss = compiled(x).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "others", [{"head": "logistic_mixture"}, {"classes": 3}, {"skip": True, "residual": False}], ids=str
)
def test_heads_conditions_and_switches_compile(others):
    torch._dynamo.reset()
    model = build("DiagBiLSTM", **others)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randint(0, 3, (2, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    given = (x, torch.tensor([0, 2])) if "classes" in others else (x,)
    torch.testing.assert_close(compiled(*given), model(*given))
    compiled(*given).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
