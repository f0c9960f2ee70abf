"""Scorers: hidden states (B, S, d) -> scores (B, S, E), in float32.

A scorer is a Module built with `(dim, num_experts, **options)` and called with `(x, ctx)`. `permute(order)`
reorders what belongs to the experts, which is how the laws check that no scorer treats an expert specially.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, RoutingError
from ..registry import Registry
from .types import Context

scorers = Registry("scorer")


class Rational(nn.Module):
    """Learnable rational activation `sum_{j<=m} a_j x^j / (1 + |sum_{1<=i<=n} b_i x^i|)`, elementwise.

    MiLoRA (arXiv 2410.18035) puts one before each router; degrees m = 6, n = 5 are from third-party notes, and the
    start (the identity: a_1 = 1, all else 0) is our choice, since the paper names none that we could read.
    """

    def __init__(self, *, numerator: int = 6, denominator: int = 5) -> None:
        super().__init__()
        start = torch.zeros(numerator + 1)
        start[1] = 1.0
        self.a = nn.Parameter(start)
        self.b = nn.Parameter(torch.zeros(denominator))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x of any shape (Horner's scheme)."""
        top = torch.zeros_like(x)
        for coefficient in self.a.flip(0):
            top = top * x + coefficient
        bottom = torch.zeros_like(x)
        for coefficient in self.b.flip(0):
            bottom = (bottom + coefficient) * x
        # not .abs(): its gradient at 0 is 0, and b, which starts there, would never leave
        return top / (1 + torch.where(bottom < 0, -bottom, bottom))


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "rational": Rational}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation '{name}' is unknown; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


def _init_rows(weight: Tensor, init: str | float) -> None:
    # The start is not neutral: with unit-variance inputs the spread of the scores sets how peaked training begins.
    if init == "kaiming":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    elif isinstance(init, (int, float)) and not isinstance(init, bool) and init >= 0:
        nn.init.normal_(weight, std=float(init))
    else:
        raise ConfigError(f"init {init!r} is unknown; write 'kaiming' or a standard deviation such as 0.02")


@scorers.register("linear")
class Linear(nn.Module):
    """One row per expert: `scores = act(x) W^T (+ b)`, W: (E, d).

    Options:
        bias: add a learned bias per expert, starting at 0.
        init: `kaiming` (uniform with a = sqrt(5), as nn.Linear) or the standard deviation of a normal.
        activation: applied to x first: gelu, relu, silu, tanh, rational (MiLoRA) or none.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bias: bool = False,
        init: str | float = "kaiming",
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.activation = _activation(activation) if activation else None
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        _init_rows(self.weight, init)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        return F.linear(x if self.activation is None else self.activation(x), self.weight, self.bias)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])
        if self.bias is not None:
            self.bias.copy_(self.bias[order])


@scorers.register("cosine")
class Cosine(nn.Module):
    """Cosine similarity to one direction per expert: `scores = cos(P x, c_e) / temperature`.

    Source: the geometric ST-MoE (arXiv 2604.14419, not the ST-MoE of 2202.08906) and X-MoE (arXiv 2204.09179).
    `scores(a x) = scores(x)` for a > 0. With temperature 1 and E = 8 no softmax probability can exceed 0.51, so the
    temperature must be small or learned.

    Options:
        bottleneck: size of the projected space, P: (bottleneck, d); none compares in the full space.
        temperature: divides the cosines; learned (kept positive by an exponential) when `learn_temperature`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bottleneck: int | None = None,
        temperature: float = 0.07,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"cosine temperature must be positive, got {temperature}")
        self.project = nn.Parameter(torch.empty(bottleneck, dim)) if bottleneck else None
        if self.project is not None:
            nn.init.kaiming_uniform_(self.project, a=math.sqrt(5))
        self.weight = nn.Parameter(torch.empty(num_experts, bottleneck or dim))
        nn.init.normal_(self.weight)
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        if self.project is not None:
            x = F.linear(x, self.project)
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
        return cosine * torch.exp(-self.log_temperature)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[order])


@scorers.register("mlp")
class MLP(nn.Module):
    """Two linear maps with an activation between: `scores = W2 act(W1 x + b1) + b2`.

    Options:
        hidden: width between the two maps.
        activation: gelu, relu, silu, tanh or rational.
    """

    def __init__(self, dim: int, num_experts: int, *, hidden: int = 64, activation: str = "gelu") -> None:
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.activation = _activation(activation)
        self.outer = nn.Linear(hidden, num_experts)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Score x (B, S, d) -> (B, S, E)."""
        return self.outer(self.activation(self.inner(x)))

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.outer.weight.copy_(self.outer.weight[order])
        self.outer.bias.copy_(self.outer.bias[order])


@scorers.register("constant")
class Constant(nn.Module):
    """The same scores for every input: a fixed mixture of experts, or no routing at all with one expert.

    Options:
        learn: learn one score per expert, starting at 0; otherwise the scores stay 0 and there is nothing to train.
    """

    def __init__(self, dim: int, num_experts: int, *, learn: bool = True) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts)) if learn else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Return (B, S, E) for x (B, S, d)."""
        scores = x.new_zeros(self.num_experts) if self.weight is None else self.weight
        return scores.expand(*x.shape[:-1], -1)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        if self.weight is not None:
            self.weight.copy_(self.weight[order])


@scorers.register("table", reads="task")
class Table(nn.Module):
    """A learned row of scores per task, `scores = Z[task]`, Z: (num_tasks, E), as in Poly (arXiv 2202.13914).

    A row whose task is unknown (-1) gets the mean of all rows.

    Options:
        num_tasks: how many tasks there are.
        spread: Z starts uniform in +-spread.
    """

    def __init__(self, dim: int, num_experts: int, *, num_tasks: int, spread: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts).uniform_(-spread, spread))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Look up the rows of the tasks: x (B, ., d) only tells the batch size -> (B, 1, E)."""
        if ctx.task_ids is None:
            raise RoutingError(
                "this adapter routes by task, but no task_ids reached the forward; pass task_ids=(B,) to the model, "
                "or set them with `with molora.using(model, task_ids=...)` around generate()"
            )
        ids = ctx.task_ids.to(self.weight.device).reshape(-1)
        if ids.numel() not in (1, x.shape[0]):
            raise RoutingError(
                f"task_ids holds {ids.numel()} ids for a batch of {x.shape[0]}; give one per row, and leave out "
                "layers that read something else (in DeBERTa, query_proj and key_proj read positions too) with "
                "exclude_modules"
            )
        if ids.numel() and int(ids.max()) >= self.weight.shape[0]:
            raise RoutingError(f"task id {int(ids.max())} is out of range; this adapter knows {self.weight.shape[0]}")
        rows = self.weight[ids.clamp_min(0)]
        rows = torch.where((ids >= 0)[:, None], rows, self.weight.mean(0, keepdim=True))
        return rows[:, None, :].expand(x.shape[0], 1, -1)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put the experts in another order."""
        self.weight.copy_(self.weight[:, order])
