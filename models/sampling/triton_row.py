"""The cached sampler with all pixels of a row in one launch of a Triton kernel (`kernels.draw_row`).

No other file of `models` knows what the kernel reads. The weights, and the memory that the kernel shares with
`begin_row`, are those of the torch form, with groups in multiples of 16 and features next to each other.
"""

from torch import Tensor

from kernels.draw_row import Choice, DrawRow, Head, Layers, Product, Stem, pack
from models.base import AutoregressiveModel
from models.in_row import GATES, Weights
from models.sampling.cached import Cached, CachedLayers
from models.sampling.rules import Rule


class TritonRow(Cached):
    """The cached sampler's rows, each in one launch, which chooses values as the rule's `choice` says."""

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None, rule: Rule, values: Tensor):
        choice = Choice(**rule.choice())
        network = model.in_row().aligned()
        super().__init__(model, b, condition, images_last=False, network=network, backend="triton")
        first, last = product_of(network.first), product_of(network.last)
        outputs = network.last.outputs[0].sizes[0]
        head = Head(first, last, network.first.outputs[0].size, outputs, getattr(model.head, "mixtures", 0))
        table = None if model.value_embedding is None else self.table
        stem = Stem(product_of(self.stem.taps, bias=False), self.stem.row, self.stem.above, network.reach, table)
        skip = network.to_head is not None
        self.program = DrawRow(stem, layers_of(self.layers), head, network.residual, skip, choice, values, model.levels)

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        self.begin_row(first)
        self.program.run()


def product_of(weights: Weights, bias: bool = True) -> Product:
    """A product of all layers, as the kernel reads it."""
    (*_, last), start, stretches = weights.outputs, 0, []
    for stretch in weights.outputs:
        stretches.append([slice(start + s.start, start + s.stop) for s in stretch.slices])
        start += stretch.size
    groups = [[slices[g] for slices in stretches] for g in range(last.groups)]
    return pack(weights.weight, weights.bias if bias else None, groups)


def layers_of(layers: CachedLayers) -> Layers:
    """The body, with views [layer, image, column, feature] of what `begin_row` writes and the next row reads."""
    network, row, w, f = layers.network, layers.in_row, layers.width, layers.f
    here = layers.slots[:, :, 1 : w + 1, layers.left_size :]
    places = {}
    if row.down:  # the stream is one pixel's: the same memory in all columns
        places["middle"] = here
        u = layers.row.new_zeros(layers.layers, layers.buffers.b, 1, layers.wide.size).expand(-1, -1, w, -1)
    else:
        u = here
    if layers.left_is_hidden:
        places["hidden"] = layers.slots[:, :, 2 : w + 2, :f]
    elif layers.hands_down_hidden:
        places["hidden"] = layers.hidden[:, :, 1:-1]
    if row.act == "lstm":
        places["cell"] = layers.cell[:, :, None].expand(-1, -1, w, -1) if layers.left_is_hidden else layers.cell
    if layers.mirrored:
        places["mirrored"] = layers.mirrored.hidden
    inputs = layers.slots[:, :, layers.left_is_hidden : layers.left_is_hidden + w]
    return Layers(
        GATES[row.act],
        product_of(row.down) if row.down else None,
        product_of(row.main, bias=False),
        product_of(network.up),
        product_of(network.to_head) if network.to_head else None,
        inputs,
        row.main.weight.shape[2],
        u,
        layers.above.out,
        **places,
    )
