"""The same network with room in it: groups of features as wide as one another, in multiples of 16.

128 features are groups of 43, 43 and 42. A GPU reads and writes sixteen at a time, from multiples of sixteen: the row
kernel takes a network whose groups have 48 each. What is new are zeros: weights and biases of zero make features that
are 0 after a ReLU, after tanh ⊙ σ, and after an LSTM that began at zero; and their weights of zero change no other.

Legend: f hidden features · s of the stream · d features of the condition.
"""

import re

import torch
from torch import Tensor

from models.base import AutoregressiveModel
from models.head import SoftmaxHead
from models.layers import group_index, group_sizes

WIDTH = 16


def room(features: int, groups: int) -> int:
    """How many features there are when each of `groups` groups is as wide as the widest, in multiples of 16."""
    return groups * (-(-max(group_sizes(features, groups)) // WIDTH) * WIDTH)


def positions(features: int, new: int, groups: int, parts: int = 1) -> Tensor:
    """Where features stand when each of `parts` stretches of them has become `new` wide: (parts · features,)."""
    group = group_index(features, groups)
    within = torch.cat([torch.arange(size) for size in group_sizes(features, groups)])
    return torch.cat([part * new + group * (new // groups) + within for part in range(parts)])


def aligned(model: AutoregressiveModel) -> AutoregressiveModel:
    """The same network in eval mode, with equal groups; a condition is given to it as a map (`map_features` = d)."""
    old, body, groups = model.body.hidden, model.body, model.body.groups
    f, between = room(old, groups), room(model.head.first.outputs, groups)
    d, stream, vertical = body.given, body.stream * f, body.vertical * f
    out = type(model)(
        *(model.channels, model.levels, model.height, model.width, f, body.layers, body.residual, body.skip),
        head="softmax" if isinstance(model.head, SoftmaxHead) else "logistic_mixture",
        head_features=between,
        mixtures=getattr(model.head, "mixtures", 1),
        map_features=d,
    )
    out = out.to(model.stem.weight).eval().requires_grad_(False)

    hidden, hidden_2, hidden_4 = (positions(old, f, groups, parts) for parts in (1, 2, 4))
    u = positions(body.stream * old, stream, groups)
    # of the stem, the rest after what sees the rows above alone
    stem = torch.cat(
        [hidden[: body.vertical * old], vertical + positions(2 * old - body.vertical * old, 2 * f - vertical, groups)]
    )
    head, condition = positions(model.head.first.outputs, between, groups), torch.arange(d)
    row_inputs = torch.cat([hidden, f + hidden, 2 * f + hidden, 3 * f + condition])  # of the Gated PixelCNN
    lstm_inputs = torch.cat([u, stream + u, 2 * stream + condition])  # of the Row LSTM
    diagonal = body.extra_columns > 0
    where = {  # the positions of each dimension of a parameter; None: all are where they were
        "stem.weight": (stem,),
        "stem.bias": (stem,),
        "body.down.weight": (hidden, u),
        "body.down.bias": (hidden,),
        "body.conv.weight": (hidden, hidden),
        "body.conv.bias": (hidden,),
        "body.up.weight": (u, hidden),
        "body.up.bias": (u,),
        "body.to_head.weight": (u, hidden),
        "body.to_head.bias": (u,),
        "body.from_condition.weight": (hidden if body.stream == 2 else hidden_2,),
        "body.vertical_conv.weight": (hidden_2, hidden),
        "body.vertical_conv.bias": (hidden_2,),
        "body.horizontal.weight": (hidden_2, row_inputs),
        "body.horizontal.bias": (hidden_2,),
        "body.lstm.input.weight": (hidden_4, lstm_inputs),
        "body.lstm.input.bias": (hidden_4,),
        "body.lstm.input_weight": (None, hidden_4, u),
        "body.lstm.state_weight": (None, hidden_4, torch.cat([hidden, f + hidden])) if diagonal else (hidden_4, hidden),
        "body.lstm.bias": (None, hidden_4),
        "body.lstm.condition_weight": (None, hidden_4),
        "head.first.weight": (head, u),
        "head.first.bias": (head,),
        "head.last.weight": (None, head),
        "head.last.bias": (),
    }
    given = dict(model.named_parameters())
    for name, parameter in out.named_parameters():
        x = given[name].detach()
        for dim, index in enumerate(where[re.sub(r"\.\d+\.", ".", name)]):
            if index is not None:
                shape = list(x.shape)
                shape[dim] = parameter.shape[dim]
                x = x.new_zeros(shape).index_copy_(dim, index.to(x.device), x)
        parameter.copy_(x)
    return out
