"""What rows above give to a row, in one launch: what a product of the same inputs, copied side by side, is.

Legend: b batch · w columns · k features read at a place · f outputs.
"""

import pytest
import torch
from torch.testing import assert_close

from models.sampling.memory import Buffers, ConditionRow, RowProduct, windows

pytest.importorskip("triton", reason="Triton is for Linux")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter has none
pytestmark = pytest.mark.usefixtures("no_hazards")


def sources(of: str, layers: int, b: int, w: int, k: int, new) -> list[torch.Tensor]:
    """Views as the sampler reads them: (layers b w taps features) each."""
    slots = new(layers, b, w + 2, 2 * k)  # those of a row, with zeros at both ends
    return {
        "three columns": [windows(slots[..., :k], 3)],
        "behind ones": [windows(new(layers, b, w + 2, 1 + k)[..., 1:], 3)],
        "hidden states and the row": [new(layers, b, w, k)[:, :, :, None], slots[:, :, 1:-1, None, k:]],
        "rows of an image": [
            windows(new(layers * b, 3, w + 6, k), 7).transpose(1, 2).flatten(3).unflatten(0, (layers, b))
        ],
    }[of]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["three columns", "behind ones", "hidden states and the row", "rows of an image"])
@pytest.mark.parametrize(
    ("layers", "b", "w", "k", "f"),
    [(1, 1, 1, 1, 1), (2, 3, 7, 8, 5), (1, 1, 8, 7, 33), (2, 2, 5, 16, 16), (1, 17, 8, 3, 70), (3, 1, 3, 40, 96)],
)
def test_it_is_the_product_of_inputs_side_by_side(layers, b, w, k, f, of, dtype):
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    read = sources(of, layers, b, w, k, new)
    inputs = torch.cat([x.flatten(3) for x in read], dim=3)
    weight, bias = new(layers, f, inputs.shape[3]), new(layers, f)
    product = RowProduct(Buffers(b, weight, backend="triton"), w, weight, bias, ConditionRow(None, None, w))
    product.read(*read)
    product()
    expected = torch.einsum("lbwk,lfk->lbwf", inputs.double(), weight.double()) + bias[:, None, None].double()
    limit = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert_close(product.out.double(), expected, rtol=limit, atol=limit * inputs.shape[3] ** 0.5)
