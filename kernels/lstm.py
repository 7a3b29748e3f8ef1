"""An LSTM's step in torch, as the torch forms of the Row LSTM and the Diagonal BiLSTM share it.

Legend: f hidden features. Gates are in the order o f i g, so `4f` is cut in four parts of f.

    [o f i g] = [σ σ σ tanh](sums)
    cell      = f ⊙ cell before + i ⊙ g
    hidden    = o ⊙ tanh(cell)
"""

import torch
from torch import Tensor


def double_g(f: int, like: Tensor) -> Tensor:
    """Make factors (4f) for the gates' weights and biases: 2 for g, 1 for o, f and i.

    tanh(x) is 2σ(2x) − 1. With g's sums doubled, one sigmoid serves all gates, in a third of the time of tanh.
    """
    return like.new_ones(4 * f).masked_fill_(torch.arange(4 * f, device=like.device) >= 3 * f, 2)


def local_gradients(gates: Tensor, cell_before: Tensor, tanh_cell: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients that need no state of the backward scan.

    Args:
        gates: (… 4f), activated.
        cell_before, tanh_cell: (… f).

    Returns:
        d hidden / d sums of o beside d cell / d sums of f, i and g (… 4f): the scan multiplies them with the gradients
        of hidden and cell; and d hidden / d cell (… f).
    """
    f = tanh_cell.shape[-1]
    o, forget, i, g = gates.split(f, dim=-1)
    d_sums = torch.empty_like(gates)
    sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    for gate, (factor, value) in enumerate(((tanh_cell, o), (cell_before, forget), (g, i))):
        sigmoid_backward.grad_input(factor, value, grad_input=d_sums.narrow(-1, gate * f, f))
    tanh_backward.grad_input(i, g, grad_input=d_sums.narrow(-1, 3 * f, f))
    return d_sums, tanh_backward(o, tanh_cell)
