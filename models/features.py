"""Where features stand: their groups, the masks between them, and room for hardware that reads sixteen at a time.

Legend: f features · g group.

Features are cut in contiguous groups, one a colour (1601.06759, section 3.4). The output at a pixel sees all groups of
the pixels before it; at the pixel itself, group g sees the groups before g (mask A) or up to g (mask B).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16
BEFORE = -1  # the group of features that have seen only pixels before this one


def group_sizes(features: int, groups: int) -> list[int]:
    """Cut `features` in `groups` parts that differ by at most one: 128 in 3 → 43 43 42."""
    if features < groups:
        raise ValueError(f"{features} features in {groups} groups: expected at least one a group")
    return [features // groups + (g < features % groups) for g in range(groups)]


class Stretch(NamedTuple):
    """Features side by side: how many, and in how many groups.

    With `before` they have seen only pixels before this one: any output may see them, and they see nothing here.
    """

    size: int
    groups: int = 1
    before: bool = False

    @property
    def sizes(self) -> list[int]:
        """How many features each group has."""
        return group_sizes(self.size, self.groups)

    @property
    def slices(self) -> list[slice]:
        """Where each group's features stand."""
        return [slice(*ends) for ends in pairwise(accumulate(self.sizes, initial=0))]

    def of_pixels_before(self) -> "Stretch":
        """The same features at a pixel before this one."""
        return self._replace(before=True)

    def aligned(self) -> "Stretch":
        """With groups as wide as the widest, in multiples of 16."""
        return self._replace(size=self.groups * -(-max(self.sizes) // ALIGNMENT) * ALIGNMENT)


Stretches = Sequence[Stretch]


def size_of(stretches: Stretches) -> int:
    return sum(stretch.size for stretch in stretches)


def groups_of(stretches: Stretches) -> Tensor:
    """The group of each feature (f,); −1 where it stands for pixels before."""
    groups = [BEFORE if s.before else g for s in stretches for g, size in enumerate(s.sizes) for _ in range(size)]
    return torch.tensor(groups, device="cpu")  # also where models are made on another device


def visible(kind: str, outputs: Stretches, inputs: Stretches) -> Tensor:
    """Whether each output may see each input of the same pixel, (outputs inputs), under mask "A" or "B"."""
    out, into = groups_of(outputs)[:, None], groups_of(inputs)[None]
    return (out > into) | (into == BEFORE) if kind == "A" else (out >= into)


def by_group(stretches: Stretches) -> list[Tensor]:
    """For each group, where its features stand in all stretches, one stretch after another: indices (f_g,)."""
    out, start = [[] for _ in range(stretches[0].groups)], 0
    for stretch in stretches:
        for g, s in enumerate(stretch.slices):
            out[g] += range(start + s.start, start + s.stop)
        start += stretch.size
    return [torch.tensor(indices, device="cpu") for indices in out]


def places(old: Stretches, new: Stretches) -> Tensor:
    """Where the features of `old` stand in `new`, whose groups are as wide or wider: (f,)."""
    out, start = [], 0
    for a, b in zip(old, new, strict=True):
        for size, s in zip(a.sizes, b.slices, strict=True):
            out += range(start + s.start, start + s.start + size)
        start += b.size
    return torch.tensor(out, device="cpu")
