"""Objectives at work: run the batch as often as an objective wants, and make one loss of the outcomes.

`molora.attach(trainer)` does this inside a Trainer's `compute_loss`; `molora.objective_loss(model, inputs)` in an own
loop. One backward follows, whatever the number of forwards: its memory grows with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.models import labels_are_shifted, loss_is_shifted
from ..control import trace_of, tuner_of
from ..errors import AuxLossError, ConfigError, RoutingError
from ..routing.objectives import Outcome
from ..routing.trace import Site, Trace
from ..routing.types import Context, Routing

Forward = Callable[[], tuple[Tensor, Any]]  # -> the task loss and the outputs of the model


def objective_of(model: nn.Module) -> Any:
    """Return the objective of the active adapters of a wrapped model, or None.

    Raises:
        ConfigError: several active adapters have one each.
    """
    tuner = tuner_of(model)
    plans = {name: tuner.trace.plans[name] for name in tuner.active_adapters if name in tuner.trace.plans}
    found = {name: plan.objective for name, plan in plans.items() if plan.objective is not None}
    if len(found) > 1:
        raise ConfigError(f"only one active adapter can have an objective, but {', '.join(found)} have one each")
    return next(iter(found.values()), None)


def objective_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the loss of a batch as the `objective` of the config makes it, auxiliary losses included.

    Without an objective this is one forward and its loss. In evaluation mode it always is.

    Args:
        model: a wrapped model.
        inputs: arguments of its forward, labels among them; `num_items_in_batch` is understood as Trainer does.
    """

    def forward() -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", None)
        if loss is None:
            raise ConfigError("objective_loss needs a forward that returns a loss; pass labels among the inputs")
        return loss, outputs

    objective = objective_of(model)
    if objective is None or not (model.training and torch.is_grad_enabled()):
        return forward()[0]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels, total = inputs.get("labels"), inputs.get("num_items_in_batch")
    share: Tensor | float = 1.0
    if total is not None and isinstance(labels, Tensor):
        counted = labels[..., 1:] if labels_are_shifted(base) else labels  # as Trainer counts
        share = (counted != -100).sum() / total
    trace = trace_of(model)
    with trace.gathering(hold=True):
        loss, _ = run(trace, objective, forward, labels, loss_is_shifted(base), share)
    return trace.aux.add_to(loss, share)


def run(
    trace: Trace, objective: Any, forward: Forward, labels: Any, shifted: bool, share: Tensor | float
) -> tuple[Tensor, Any]:
    """Run `forward` as often as the objective wants, inside `trace.gathering(hold=True)`.

    Args:
        trace: of the model.
        objective: as `objective_of` returns it.
        forward: runs the batch once.
        labels: of the batch, or None.
        shifted: whether position t predicts label t + 1.
        share: this micro-batch's part of the supervised tokens of the optimizer batch.

    Returns:
        The loss without auxiliary losses, and the outputs of the last forward.
    """
    seeds = torch.randint(2**62, (objective.forwards,)).tolist()
    noise = _Noise() if objective.shares_noise else None
    outcomes, outputs = [], None
    try:
        for seed in seeds:
            if noise is not None:
                noise.restore()
            trace.seed = seed
            draws = _Draws(objective.name)
            with trace.telling(draws):
                loss, outputs = forward()
            outcomes.append(_outcome(loss, outputs, labels, shifted, share, draws.log_prob()))
    finally:
        trace.seed = None
    return objective(outcomes), outputs


class _Noise:
    """The state of torch's generators, to run a batch again under the same dropout."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


class _Draws:
    """Reads the log-probabilities of the draws of one forward."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terms: list[tuple[Tensor, Tensor]] = []  # log-probabilities (B, S) and weights (B, S) per decision

    def __call__(self, site: Site, routing: Routing, ctx: Context) -> None:
        for one in (routing, *routing.branches):
            log_prob = (one.notes or {}).get("log_prob")
            if log_prob is None:
                continue
            if not torch.is_grad_enabled():
                raise AuxLossError(
                    f"the objective '{self.name}' does not reach routers under reentrant gradient checkpointing, "
                    'which hides them from the loss; use gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            # multiplied later: inside of a checkpoint, whose recompute has no readers, nothing more may be saved
            self.terms.append((log_prob, ctx.weights(one.gates)))

    def log_prob(self) -> Tensor | None:
        """Return (B,): the sum over all decisions."""
        terms = [(log_prob * weights).sum(1) for log_prob, weights in self.terms]
        if len({term.shape for term in terms}) > 1:
            raise RoutingError("decisions of one forward were taken for different numbers of rows; use share: site")
        return torch.stack(terms).sum(0) if terms else None


def _outcome(
    loss: Tensor, outputs: Any, labels: Any, shifted: bool, share: Tensor | float, log_prob: Tensor | None
) -> Outcome:
    """Describe one forward; logits (B, S, C) of tokens or (B, C) of rows, with the labels of the same shape."""
    logits = _logits(outputs)
    if logits is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return Outcome(loss, log_prob=log_prob)
    if shifted and logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        return Outcome(loss, log_prob=log_prob)
    counted = labels != -100
    weight = share / counted.sum().clamp_min(1)
    with torch.no_grad():
        each = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
        rows = each.view(labels.shape[0], -1).sum(1) * weight
    return Outcome(loss, rows, logits[counted], weight, log_prob)


def _logits(outputs: Any) -> Tensor | None:
    if isinstance(outputs, tuple):
        return next((one for one in outputs if isinstance(one, Tensor) and one.dim() >= 2), None)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() >= 2 else None
