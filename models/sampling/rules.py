"""Rules choose the values of sub-pixels: draw them, take given ones, keep known ones, record how likely they are.

A rule reads and writes only static memory between `load` and `store`, so that a row can be a CUDA graph.

Legend: b batch · c channel · h w rows, columns · v levels · g group · i j a row, a column.
"""

from functools import partial

import torch
from torch import Tensor

from models.base import AutoregressiveModel
from models.layers import state_dtype


class Rule:
    """Chooses values: `load(i)` before a row, then a call for each of its sub-pixels, then `store(i)`.

    What a call answers holds until the next call: it may be the same memory each time.
    """

    def load(self, i: int) -> None:
        """Row i comes next: what the calls read of it goes to static memory."""

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        """The values (b,) of colour g at column j, given their logits (b v)."""
        raise NotImplementedError

    def store(self, i: int) -> None:
        """Row i is done: what the calls wrote of it goes to where it is kept."""

    def renew(self, rule: "Rule") -> None:
        """Choose from now on as another rule of the same kind does, in the memory of this one."""
        raise NotImplementedError

    def choice(self, whole: bool = False) -> dict | None:
        """The same rule for a row's kernel: the fields of `kernels.draw_row.Choice` that it sets.

        They are the static memory of a row, (b c w); or, `whole`, what it is loaded from, (b c h w). None: the rule can
        only be called.
        """


class Draw(Rule):
    """Draw from the conditional, by inverse CDF of one uniform number a sub-pixel.

    Args:
        uniforms: (b c h w) in [0, 1).
        temperature: logits are divided by it, or by 1e-30 if it is smaller; 0 takes the likeliest value.
    """

    def __init__(self, uniforms: Tensor, temperature: float = 1.0):
        self.uniforms, self.row = uniforms, uniforms[:, :, 0].clone()
        self.temperature = max(float(temperature), 1e-30) if temperature else 0.0  # float32 holds no less
        self.value, self.made = torch.zeros(len(uniforms), dtype=torch.long, device=uniforms.device), None

    def scratch(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Memory for (b v) probabilities, sums of them, a number to reach (b 1), which have not reached it (b v-1)."""
        if self.made is None:
            p, cdf = logits.new_empty(logits.shape), logits.new_empty(logits.shape)
            number = logits.new_empty(len(logits), 1, dtype=torch.promote_types(logits.dtype, self.row.dtype))
            below = logits.new_empty(len(logits), logits.shape[1] - 1, dtype=torch.long)  # as what sums them adds
            self.made = p, cdf, number, below
        return self.made

    def load(self, i: int) -> None:
        self.row.copy_(self.uniforms[:, :, i])

    def renew(self, rule: "Draw") -> None:
        assert rule.temperature == self.temperature
        self.uniforms = rule.uniforms

    def choice(self, whole: bool = False) -> dict | None:
        return {"uniforms": self.uniforms if whole else self.row, "temperature": self.temperature}

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return torch.argmax(logits, 1, out=self.value)
        p, cdf, number, below = self.scratch(logits)
        if self.temperature != 1:
            likeliest = torch.amax(logits, 1, keepdim=True, out=p[:, :1])  # before the division, which may overflow
            logits = torch.sub(logits, likeliest, out=cdf).div_(self.temperature)
        torch.cumsum(torch.softmax(logits, 1, out=p), 1, out=cdf)
        torch.mul(self.row[:, g, j, None], cdf[:, -1:], out=number)
        torch.le(cdf[:, :-1], number, out=below)
        return torch.sum(below, 1, out=self.value)


class Given(Rule):
    """Take the values of given images x (b c h w): what scores them."""

    def __init__(self, x: Tensor):
        self.x = x.long()
        self.row = self.x[:, :, 0].clone()

    def load(self, i: int) -> None:
        self.row.copy_(self.x[:, :, i])

    def renew(self, rule: "Given") -> None:
        self.x = rule.x

    def choice(self, whole: bool = False) -> dict | None:
        return {"given": self.x if whole else self.row}

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        return self.row[:, g, j]


class Keep(Rule):
    """Keep the sub-pixels of x (b c h w) that are `known` (b c h w, true or false); ask another rule for the rest.

    Only known sub-pixels that come before another in the order are evidence for it.
    """

    def __init__(self, x: Tensor, known: Tensor, otherwise: Rule):
        known = known.bool()
        if isinstance(otherwise, Keep):  # one rule for both
            x = torch.where(known, x.long(), otherwise.given.x)
            known, otherwise = known | otherwise.known, otherwise.otherwise
        self.given, self.known, self.otherwise = Given(x), known, otherwise
        self.known_row, self.value = self.known[:, :, 0].clone(), self.given.x.new_zeros(len(x))

    def load(self, i: int) -> None:
        self.given.load(i)
        self.known_row.copy_(self.known[:, :, i])
        self.otherwise.load(i)

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        given, other = self.given(j, g, logits), self.otherwise(j, g, logits)
        return torch.where(self.known_row[:, g, j], given, other, out=self.value)

    def store(self, i: int) -> None:
        self.otherwise.store(i)

    def renew(self, rule: "Keep") -> None:
        self.given.renew(rule.given)
        self.known = rule.known
        self.otherwise.renew(rule.otherwise)

    def choice(self, whole: bool = False) -> dict | None:
        drawn = self.otherwise.choice(whole)
        if drawn is None or "given" in drawn or "log_prob" in drawn:
            return None
        given, known = (self.given.x, self.known) if whole else (self.given.row, self.known_row)
        return {**drawn, "given": given, "known": known}


class Guided(Rule):
    """Ask another rule about b images, of which each is visited twice: with its label, and b images later without.

    Logits are moved away from those without the label: l_without + guidance · (l_with − l_without), which is
    classifier-free guidance (2207.12598) with w = guidance − 1. 1 is the model as it is, 0 the model without labels.
    """

    def __init__(self, rule: Rule, b: int, guidance: float):
        self.rule, self.b, self.guidance = rule, b, float(guidance)
        self.logits: Tensor | None = None
        self.twice: Tensor | None = None

    def load(self, i: int) -> None:
        self.rule.load(i)

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        labelled, free = logits[: self.b], logits[self.b :]
        if self.logits is None:
            self.logits = torch.empty_like(free)
            self.twice = torch.empty(2, self.b, dtype=torch.long, device=logits.device)
        torch.sub(labelled, free, out=self.logits)
        self.twice.copy_(self.rule(j, g, self.logits.mul_(self.guidance).add_(free)))
        return self.twice.view(-1)

    def store(self, i: int) -> None:
        self.rule.store(i)

    def renew(self, rule: "Guided") -> None:
        assert (rule.b, rule.guidance) == (self.b, self.guidance)
        self.rule.renew(rule.rule)


class Record(Rule):
    """Ask another rule, and add up how likely its choices were: `log_prob` (b,) nats, at temperature 1.

    With `conditionals=True` every conditional is kept too (b c h w v).
    """

    def __init__(self, model: AutoregressiveModel, rule: Rule, b: int, conditionals: bool = False):
        self.rule, weight = rule, model.stem.weight
        new = partial(weight.new_zeros, dtype=state_dtype(weight))
        self.log_prob = new(b)
        self.conditionals = new(b, *model.shape, model.levels) if conditionals else None
        self.row = new(b, model.channels, model.width, model.levels) if conditionals else None
        self.log_probs, self.of_values = new(b, model.levels), new(b, 1)

    def load(self, i: int) -> None:
        self.rule.load(i)

    def __call__(self, j: int, g: int, logits: Tensor) -> Tensor:
        values = self.rule(j, g, logits)
        log_probs = torch.log_softmax(logits, 1, out=self.log_probs)
        self.log_prob += torch.gather(log_probs, 1, values[:, None], out=self.of_values)[:, 0]
        if self.row is not None:
            self.row[:, g, j] = log_probs
        return values

    def store(self, i: int) -> None:
        self.rule.store(i)
        if self.row is not None:
            self.conditionals[:, :, i] = self.row

    def choice(self, whole: bool = False) -> dict | None:
        chosen, conditionals = self.rule.choice(whole), self.conditionals if whole else self.row
        return None if chosen is None else {**chosen, "log_prob": self.log_prob, "conditionals": conditionals}


def visit(evaluator, rule: Rule, values: Tensor) -> None:
    """Choose the values (b c w) of a row: sub-pixel after sub-pixel, each known to those after it.

    Args:
        evaluator: its `logits(j, c)` (b v) are those of colour c at column j, once `put(j, c, values)` has told it all
            values before.
    """
    for j in range(values.shape[2]):
        for c in range(values.shape[1]):
            value = rule(j, c, evaluator.logits(j, c))
            evaluator.put(j, c, value)
            values[:, c, j] = value
