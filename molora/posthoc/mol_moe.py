"""Mol-MoE (arXiv 2502.05633): one expert per property, and routers that follow how much of each is asked for.

Every expert was trained for one property; the frozen base counts as one more expert. Only routers are trained, by
reinforcement learning: texts are sampled, scored by the properties, and rewarded by how well they meet the preference

    precision     1 - mean_j |w_j - s_j / sum_i s_i|       the proportions are met, whatever their size
    maximisation  sum_j w_j s_j

with a leave-one-out baseline over several texts per prompt (RLOO) and a KL penalty towards the routers as they were.
Which of the two the paper's numbers use is unclear: the released script takes the second, and feeds prompts without
weights. Here the preference reaches the routers as `router_extra`, or in the prompt alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..control import tuner_of, using
from ..errors import ConfigError, did_you_mean, raise_all
from ..routing.objectives import leave_one_out
from .average import mean_inputs
from .rerouting import expert_names, posthoc_routers, reroute, routers_of, sites_of
from .scoring import Batch

BASE = "base"  # what the frozen model is called among the prompts


def precision(weights: Tensor, scores: Tensor) -> Tensor:
    """Return (...): `1 - mean_j |w_j - s_j / sum s|` for weights and scores (..., m).

    Scores that are all 0 have no share. The authors divide by the sum as it is, which is 0 / 0 there.
    """
    total = scores.sum(-1, keepdim=True)
    shares = torch.where(total == 0, torch.zeros_like(scores), scores / torch.where(total == 0, 1.0, total))
    return 1 - (weights - shares).abs().mean(-1)


def maximisation(weights: Tensor, scores: Tensor) -> Tensor:
    """Return (...): `sum_j w_j s_j` for weights and scores (..., m)."""
    return (weights * scores).sum(-1)


REWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"precision": precision, "maximisation": maximisation}


@posthoc_routers.register("mol_moe")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    preferences: int | None = None,
    prompts: Mapping[str, Sequence[Batch]] | None = None,
    base: bool = True,
) -> nn.Module:
    """Route a mixture by the text and a preference; all experts act, with softmax weights, and only routers learn.

    Args:
        model: a mixture, as `molora.import_peft` makes it: one expert per property.
        adapter: the name of the mixture.
        preferences: m, how many numbers `router_extra` brings with each row; none when prompts say it in words. They
            begin without influence.
        prompts: by name of an expert (and `base`), batches of prompts that name its property: its row begins as the
            mean state of their last tokens, of length 1, at each layer (mergekit's `gate_mode: hidden`). Experts
            without prompts begin at 0.
        base: let the frozen model take part as an expert that changes nothing.

    Returns:
        The model. Its optimizer must be made anew.

    Raises:
        ConfigError: options that do not fit; nothing is changed.
    """
    names = [*expert_names(model, adapter), *([BASE] if base else [])]
    given = dict(prompts or {})
    problems = [f"prompts name expert '{name}'{did_you_mean(name, names)}" for name in given if name not in names]
    if preferences is not None and (
        isinstance(preferences, bool) or not isinstance(preferences, int) or preferences < 1
    ):
        problems.append(f"preferences must be a whole number >= 1, or None, got {preferences!r}")
    raise_all(problems, ConfigError, "Mol-MoE cannot route this mixture")
    vectors = {name: mean_inputs(model, batches, None, adapter=adapter, pool="last") for name, batches in given.items()}
    routers = reroute(
        model,
        adapter,
        scorer={"name": "linear", "init": 0.0},
        feature=None if preferences is None else {"name": "concat", "size": preferences},
        experts={"frozen": "all", "null": int(base)},
    )
    with torch.no_grad():
        for path, router in zip(sites_of(model, adapter), routers, strict=True):
            for name, by_path in vectors.items():
                state = nn.functional.normalize(by_path[path], dim=0)
                router.scorer.weight[names.index(name), : len(state)] = state.to(router.scorer.weight)
    return model


class PreferenceTuner:
    """The training loss of routers that follow a preference: texts are sampled, scored, rewarded and compared.

    `molora.attach(trainer, tuner)` trains with it in a Trainer; the rows then hold `router_extra`, the preference (m
    numbers), beside the prompt. Or call `loss` in a loop of your own.

    Args:
        model: a mixture that `build` has routed, for causal language modelling.
        properties: of token ids (N, T) of new tokens and of what of them counts (N, T) bool, the scores (N, m) >= 0.
        reward: `precision`, `maximisation`, or a function of weights (N, m) and scores (N, m) -> (N,).
        adapter: the name of the mixture.
        samples: texts per prompt, at least 2, since they are compared.
        kl: weight of the KL penalty, per text, towards the routers as they are now; 0.05 in the paper.
        new_tokens: length of the texts; 64 in the paper.
        top_p: of sampling; 0.9 in the paper, which makes the gradient that of another policy than the one that sampled.
        tell: give the preference to the routers as `router_extra`; without it, prompts must say it.

    Attributes:
        mean_reward: of the latest loss, without the KL penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        properties: Callable[[Tensor, Tensor], Tensor],
        reward: str | Callable[[Tensor, Tensor], Tensor] = "precision",
        *,
        adapter: str = "default",
        samples: int = 4,
        kl: float = 0.05,
        new_tokens: int = 64,
        top_p: float = 1.0,
        tell: bool = True,
    ) -> None:
        problems = []
        if isinstance(reward, str) and reward not in REWARDS:
            problems.append(f"reward '{reward}' is unknown{did_you_mean(reward, REWARDS)}")
        if samples < 2 or new_tokens < 1 or kl < 0 or not 0 < top_p <= 1:
            problems.append(
                f"it needs samples >= 2, new_tokens >= 1, kl >= 0 and 0 < top_p <= 1, got {samples}, {new_tokens}, "
                f"{kl} and {top_p}"
            )
        raise_all(problems, ConfigError, "preferences cannot be tuned so")
        self.model, self.properties, self.adapter = model, properties, adapter
        self.reward = REWARDS[reward] if isinstance(reward, str) else reward
        self.samples, self.kl, self.new_tokens, self.top_p, self.tell = samples, kl, new_tokens, top_p, tell
        self._routers = routers_of(model, adapter)
        self._reference = [parameter.detach().clone() for parameter in self._parameters()]
        self.mean_reward = float("nan")

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for router in self._routers for parameter in router.parameters()]

    # --- what `molora.attach` asks for --------------------------------------------------------------------------------

    columns = ("router_extra",)  # of the rows, beside the model's arguments

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return `loss` of a batch with `input_ids`, `attention_mask` and `router_extra`, the preferences (B, m)."""
        missing = [name for name in ("input_ids", "router_extra") if batch.get(name) is None]
        if missing:
            raise ConfigError(
                f"tuning preferences needs {', '.join(missing)} in every batch: rows of the training data hold a "
                "prompt, padded on the left, and router_extra (m numbers: how much of each property is asked for)"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        return self.loss(prompts, batch["router_extra"].float())

    def report(self) -> dict[str, float]:
        """Return what is worth logging: the mean reward, since the loss itself is 0."""
        return {"reward": self.mean_reward}

    # --- in one's own loop --------------------------------------------------------------------------------------------

    def loss(self, prompts: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Return a scalar of value 0 whose gradient is minus that of the expected reward, KL penalty included.

        Args:
            prompts: `input_ids` (B, S) and `attention_mask` (B, S), padded on the left.
            weights: (B, m), the preferences.
        """
        rows = {name: tensor.repeat(self.samples, 1) for name, tensor in prompts.items()}
        wanted = weights.repeat(self.samples, 1)
        text, counted = self._sampled(rows, wanted)
        scores = self.properties(text, counted).to(wanted)
        with torch.no_grad(), self._as_before():
            before = self._log_prob(rows, text, counted, wanted)
        now = self._log_prob(rows, text, counted, wanted)
        reward = self.reward(wanted, scores)
        self.mean_reward = float(reward.mean())
        costs = -(reward - self.kl * (now.detach() - before))
        shape = (self.samples, len(weights))
        return leave_one_out(costs.view(shape), now.view(shape)) / len(weights)

    @torch.no_grad()
    def _sampled(self, rows: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return new tokens (N, T) and (N, T) bool, True up to the first end of text."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self._told(wanted):
                whole = self.model.generate(
                    **rows, do_sample=True, top_p=self.top_p, top_k=0, max_new_tokens=self.new_tokens
                )
        finally:
            self.model.train(was_training)
        text = whole[:, rows["input_ids"].shape[1] :]
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ended = torch.isin(text, torch.tensor([end for end in ends if end is not None], device=text.device))
        return text, (ended.long().cumsum(1) - ended.long()) == 0

    def _log_prob(self, rows: Mapping[str, Tensor], text: Tensor, counted: Tensor, wanted: Tensor) -> Tensor:
        """Return (N,): the log-probability of the new tokens that count."""
        ids = torch.cat([rows["input_ids"], text], 1)
        mask = torch.cat([rows["attention_mask"], counted.to(rows["attention_mask"])], 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in inspect.signature(self.model.get_base_model().forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)  # as generate() counts them
        with self._told(wanted):
            logits = self.model(**inputs).logits[:, -text.shape[1] - 1 : -1].float()
        each = torch.log_softmax(logits, -1).gather(-1, text[..., None])[..., 0]
        return (each * counted).sum(1)

    def _told(self, wanted: Tensor) -> Any:
        return using(self.model, router_extra=wanted) if self.tell else nullcontext()

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Put the routers back to what they were when the tuner was made, for a forward without gradient."""
        parameters = self._parameters()
        now = [parameter.data for parameter in parameters]
        try:
            for parameter, before in zip(parameters, self._reference, strict=True):
                parameter.data = before.to(parameter.device)
            yield
        finally:
            for parameter, own in zip(parameters, now, strict=True):
                parameter.data = own


def gates_by_preference(
    model: nn.Module, prompts: Mapping[str, Tensor], weights: Tensor, adapter: str = "default"
) -> Tensor:
    """Return (B, E): the mean gate of each expert over layers and real tokens, under preferences (B, m)."""
    trace, found = tuner_of(model).trace, list[Tensor]()

    def read(site: Any, routing: Any, ctx: Any) -> None:
        if site.adapter == adapter:
            real = ctx.weights(routing.gates)[..., None]
            found.append((routing.gates * real).sum(1) / real.sum(1).clamp_min(1))

    with torch.no_grad(), trace.telling(read), using(model, router_extra=weights):
        model(**prompts)
    return torch.stack(found).mean(0)
