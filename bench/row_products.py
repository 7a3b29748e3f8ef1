"""The matrix products of a row of the cached sampler in torch: recorded as it computes them, to be done again alone."""

from functools import partial

from torch.utils._python_dispatch import TorchDispatchMode

from models.sampling import PixelLoop, noise
from models.sampling.rules import Draw

PRODUCTS = ("addmm", "addmm_", "baddbmm", "baddbmm_", "mm")


class Products(TorchDispatchMode):
    """Records matrix products: a call that repeats each, their multiplications and additions, their weights' bytes."""

    def __init__(self):
        super().__init__()
        self.again, self.operations, self.weight_bytes = [], 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        out = operation(*arguments, **keywords)
        name = operation.overloadpacket.__name__
        if name in PRODUCTS:
            weight = arguments[2 if "add" in name else 1]
            self.again.append(partial(operation, *arguments, **keywords))
            self.operations += 2 * out.numel() * weight.shape[-2]
            self.weight_bytes += weight.numel() * weight.element_size()
        return out


def draw_rule(model, b: int, seed: int = 0) -> Draw:
    return Draw(noise(seed, range(b), model.shape).to(model.device))


def products_of_a_row(model, b: int) -> Products:
    """Those of any row but the first: they read and write the memory of a sampler that stays."""
    products, loop = Products(), PixelLoop(model, "cached", draw_rule(model, b), b, backend="torch", graph=False)
    with loop.drawing():
        for i in (0, 1):
            loop.evaluator.load(i)
            loop.rule.load(i)
            if i == 0:
                loop.row(first=True)
            else:
                with products:
                    loop.row(first=False)
    return products
