"""One row, told once: everything that computes a row pixel after pixel reads what stands here.

Legend: f hidden features · d features of the condition · k inputs of a product.

Rows above are finished. Inside a row every architecture is the same three lines, in each layer:

    gates  = above · handed_down + main · [left, here] + bias       here = u, or ReLU(down(ReLU(u)))
    hidden = act(gates)                                             plus what the mirrored direction says
    u      ← u + up(hidden)                                         and skips ← skips + to_head(hidden)

From this description follow the torch form of a sub-pixel's step (`models.sampling.cached`), the layout that the row
kernel reads (`models.sampling.triton_row`), the operations of a compiled row (`models.sampling.cpu_row`), the same
network with groups in multiples of 16 (`aligned`), and the number of multiply-adds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.features import Stretches, by_group, places, size_of, visible

GATES = {"relu": 1, "gate": 2, "lstm": 4}  # outputs of `main` for each hidden feature, by `act`


class Weights(NamedTuple):
    """One product in all layers: its weights, zero where a mask hides them, and what its outputs and inputs are."""

    weight: Tensor  # (layers outputs inputs)
    bias: Tensor | None  # (layers outputs)
    outputs: Stretches
    inputs: Stretches
    kind: str = "B"  # of the mask

    def mask(self) -> Tensor:
        """Whether each output sees each input (outputs inputs)."""
        return visible(self.kind, self.outputs, self.inputs)

    def of_group(self, g: int) -> tuple[Tensor, Tensor | None]:
        """The outputs of group g, gate after gate, from what they see: weights (layers f_g k) and bias (layers f_g).

        A group sees the first k inputs: those of pixels before come first, and groups are in order.
        """
        rows = by_group(self.outputs)[g]
        k = int(self.mask()[rows[0]].sum())
        return self.weight[:, rows, :k], None if self.bias is None else self.bias[:, rows]

    def sorted_by_group(self) -> tuple[Tensor, Tensor | None]:
        """Weights and bias with the outputs of group 0 first, gate after gate, then those of group 1, …."""
        rows = torch.cat(by_group(self.outputs))
        return self.weight[:, rows], None if self.bias is None else self.bias[:, rows]

    def part(self, outputs: slice = slice(None), inputs: slice = slice(None)) -> "Weights":
        """The product from some stretches of the inputs to some of the outputs; the bias goes with the first inputs."""

        def features(stretches: Stretches, chosen: slice) -> slice:
            start, stop, _ = chosen.indices(len(stretches))
            return slice(size_of(stretches[:start]), size_of(stretches[:stop]))

        rows, columns = features(self.outputs, outputs), features(self.inputs, inputs)
        bias = None if self.bias is None or columns.start else self.bias[:, rows]
        return Weights(self.weight[:, rows, columns], bias, self.outputs[outputs], self.inputs[inputs], self.kind)

    def aligned(self, outputs: bool = True, inputs: bool = True) -> "Weights":
        """The same product with groups in multiples of 16, of its outputs, its inputs, or both.

        Added weights and biases are zero: added features are zero after a ReLU, a gate and an LSTM, and affect nothing.
        """

        def widen(x: Tensor, dim: int, old: Stretches, new: Stretches) -> Tensor:
            shape = list(x.shape)
            shape[dim] = size_of(new)
            return x.new_zeros(shape).index_copy_(dim, places(old, new).to(x.device), x)

        new_outputs = [s.aligned() for s in self.outputs] if outputs else self.outputs
        new_inputs = [s.aligned() for s in self.inputs] if inputs else self.inputs
        weight = widen(widen(self.weight, 1, self.outputs, new_outputs), 2, self.inputs, new_inputs)
        bias = None if self.bias is None else widen(self.bias, 1, self.outputs, new_outputs)
        return Weights(weight, bias, new_outputs, new_inputs, self.kind)

    def multiply_adds(self) -> int:
        """Weights that no mask hides, in all layers."""
        return len(self.weight) * int(self.mask().sum())


class Vertical(NamedTuple):
    """A stack of its own that sees only the rows above: v ← tanh(a) ⊙ σ(b), [a b] = main · [two rows of v] + given."""

    main: Weights  # from rows i−1 and i, three columns of each: (layers 2f row·column·f)
    given: Weights | None


class Mirrored(NamedTuple):
    """An LSTM from right to left over the row above, whose hidden state is added to that of the layer."""

    main: Weights  # from [its hidden state a row higher, u]; its bias is that of the gates
    left: Weights  # from its hidden state at the pixel it comes from
    given: Weights | None


class InRow(NamedTuple):
    """The layers of a body inside a row."""

    act: str  # "relu", "gate" (tanh ⊙ σ) or "lstm" (gates o f i g)
    main: Weights  # from [left, here]; its bias is that of the gates
    above: Weights  # from what the row above hands down
    handed_down: str  # "here" or "hidden" of the row above, of as many columns as `above` reads; or "vertical"
    left: str = "here"  # of the left neighbour: "here" or "hidden"; an LSTM's cell comes from there, else from above
    down: Weights | None = None  # here = ReLU(down(ReLU(u))); None: here = u
    given: Weights | None = None  # from the condition
    vertical: Vertical | None = None
    mirrored: Mirrored | None = None


class Network(NamedTuple):
    """A whole network inside a row, with its layers' products side by side."""

    stem: Weights  # one layer, of mask A: from its taps in the row to the outputs that see it
    stem_above: (
        Weights  # from its taps in the rows above to all outputs: first those of the vertical stack; with the bias
    )
    reach: int  # rows and columns that the stem sees to each side
    row: InRow
    up: Weights
    to_head: Weights | None  # None: without skip connections
    residual: bool
    first: Weights  # of the head, one layer each
    last: Weights

    @property
    def groups(self) -> int:
        return self.up.outputs[0].groups

    def aligned(self) -> "Network":
        """The same network with groups in multiples of 16: values and conditionals are the same.

        Colours, conditions, levels and a mixture's parameters stay where they are.
        """
        row = {}
        for name, x in self.row._asdict().items():
            if isinstance(x, Weights):
                row[name] = x.aligned(inputs=name != "given")
            elif isinstance(x, Vertical | Mirrored):
                row[name] = x._make(
                    None if part is None else part.aligned(inputs=name != "given") for name, part in x._asdict().items()
                )
        return self._replace(
            stem=self.stem.aligned(inputs=False),
            stem_above=self.stem_above.aligned(inputs=False),
            row=self.row._replace(**row),
            up=self.up.aligned(),
            to_head=self.to_head and self.to_head.aligned(),
            first=self.first.aligned(),
            last=self.last.aligned(outputs=False),
        )

    def multiply_adds(self) -> tuple[int, int]:
        """Live weights: of stem and layers, used at each column of features, and of the head, used at each pixel."""

        def count(x) -> int:
            if isinstance(x, Weights):
                return x.multiply_adds()
            return sum(map(count, x)) if isinstance(x, tuple) else 0

        return count((self.stem, self.stem_above, self.row, self.up, self.to_head)), count((self.first, self.last))
