"""The naive sampler: the whole network for each sub-pixel. It is what the cached sampler is compared with."""

import torch
from torch import Tensor

from models.base import AutoregressiveModel
from models.layers import state_dtype
from models.sampling.rules import Rule, visit


class Naive:
    """Logits from the whole network, which runs again for each sub-pixel of b images."""

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None = None):
        self.model, self.condition = model, condition
        self.x = torch.zeros(b, *model.shape, dtype=torch.long, device=model.device)

    def load(self, i: int) -> None:
        """Make row i the present one."""
        self.i = i
        if i == 0:
            self.x.zero_()

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        """Choose the values (b c w) of the row that was loaded."""
        visit(self, rule, values)

    def logits(self, j: int, c: int) -> Tensor:
        """Logits (b v) of colour c at column j."""
        outputs = self.model.outputs(self.x, self.condition)[:, self.i, j]
        return self.model.head.logits(outputs.to(state_dtype(outputs)), self.x[:, :, self.i, j])[:, c]

    def put(self, j: int, c: int, values: Tensor) -> None:
        """Make known the values (b,) of colour c at column j."""
        self.x[:, c, self.i, j] = values
