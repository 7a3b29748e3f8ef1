"""Rules that code: each value goes to a range coder, or comes from it, with the probability that the model gives it.

Legend: b batch · c channel (colour) · h w rows, columns · v levels · g colour · i j a row, a column.

A range coder needs integers. From logits they follow by a fixed rule, in float32 (`kernels.integer_probabilities`), the
same bits on every machine. They are at least 1, so every image can be coded, and sum to 2²⁴.
"""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kernels.integer_probabilities import integer_probabilities
from models.sampling.rules import Rule


def constriction() -> ModuleType:
    """Import constriction; the ImportError where it is not installed says how to install it."""
    try:
        import constriction
    except ImportError:
        raise ImportError("expected constriction, found none: pip install -e '.[compress]'") from None
    return constriction


class Coded(Rule):
    """Images x (b c h w) that are coded as they are visited, but for sub-pixels that are `known` already.

    Which are known (b c h w) is the same of all images.
    """

    def __init__(self, x: Tensor, known: Tensor | None):
        # integers that sum to 2²⁴ less their number: adding 1 to each is what such a model does
        self.family = constriction().stream.model.Categorical(perfect=False)
        self.x, self.known = x, None if known is None else known[0]

    def load(self, i: int) -> None:
        self.row = self.x[:, :, i]
        self.known_row = None if self.known is None else self.known[:, i].tolist()

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        if self.known_row is None or not self.known_row[g][j]:
            self.code(self.row[:, g, j], integer_probabilities(logits.float()).numpy())
        return self.row[:, g, j]

    def renew(self, rule: "Coded") -> None:
        self.x, self.known = rule.x, rule.known

    def code(self, values: Tensor, probabilities: np.ndarray) -> None:
        """Code values (b,) of these probabilities (b v) less 1."""
        raise NotImplementedError


class Encode(Coded):
    """Codes given images."""

    def __init__(self, encoder, x: Tensor, known: Tensor | None = None):
        super().__init__(x, known)
        self.encoder = encoder

    def code(self, values: Tensor, probabilities: np.ndarray) -> None:
        self.encoder.encode(values.to(torch.int32).numpy(), self.family, probabilities)


class Decode(Coded):
    """Fills x with the images that were coded."""

    def __init__(self, decoder, x: Tensor, known: Tensor | None = None):
        super().__init__(x, known)
        self.decoder = decoder

    def code(self, values: Tensor, probabilities: np.ndarray) -> None:
        values.copy_(torch.from_numpy(self.decoder.decode(self.family, probabilities)))
