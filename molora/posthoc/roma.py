"""RoMA (arXiv 2511.07419): routers are tuned so that samples that are alike route alike, after those that went right.

    L = CE + weight * sum_j W_ij ||r_i - r_j||^2          j: the k nearest samples that the model answered correctly

W is a Gaussian kernel of the samples' embeddings, divided by its sum over the neighbours; r are the routing weights of
the last token at the routers of the last blocks, and r_j is a stored target without gradient. Everything but those
routers is frozen. `weight`, the kernel's width and the embeddings of the paper are not known to us.

    model = molora.compose(base, loras, router="roma")  # or roma.build(model), where routers were trained before
    tuner = Roma(model)
    molora.attach(trainer, tuner)                       # rows bring `embeddings` and `sample_ids`; see batch_loss

or in a loop of one's own

    tuner.collect(samples)                              # (batch with labels, embeddings (B, d)), in order
    loss = tuner.loss(batch, embeddings, ids)           # collect again when targets grow stale
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..control import add_aux, trace_of, tuner_of
from ..errors import AuxLossError, ConfigError
from ..plan import depth_of, place_of
from ..registry import split_spec
from ..routing.trace import Site
from ..routing.types import Context, Routing
from .rerouting import posthoc_routers, reroute, routers_of, sites_of
from .scoring import Batch, base_of, inputs_of, row_losses, row_matches


@posthoc_routers.register("roma")
def build(model: nn.Module, adapter: str = "default", *, layers: int = 5) -> nn.Module:
    """Freeze a model but for the routers of its last blocks, which RoMA tunes; decisions stay as they are.

    A mixture whose experts all weigh the same and whose routers learn nothing, as `compose` makes it of LoRAs, gets
    linear routers that begin with these weights.

    Args:
        model: a wrapped model whose routers learn, trained or not, or whose experts all weigh the same.
        adapter: the name of the mixture.
        layers: how many of the last transformer blocks; 5 was best in the paper.

    Returns:
        The model. Switching adapters makes PEFT thaw what is frozen here; call this again afterwards.

    Raises:
        ConfigError: no router with anything to learn stands there; nothing is changed.
    """
    chosen = last_sites(model, adapter, layers)
    if _weighs_all_alike(tuner_of(model).peft_config[adapter]):
        reroute(model, adapter, scorer={"name": "linear", "init": 0.0}, experts={"frozen": "all"})
    routers = [
        router
        for path, router in zip(sites_of(model, adapter), routers_of(model, adapter), strict=True)
        if path in chosen
    ]
    learning = [parameter for router in routers for parameter in router.parameters()]
    if not learning or all(router.weights == "frozen" for router in routers):
        raise ConfigError(
            f"the routers of the last {layers} blocks have nothing to learn; make the mixture of its LoRAs by "
            "molora.compose(model, adapters, router='roma'), or route it by a recipe whose scorer learns, such as "
            "router={'scorer': 'linear', 'selector': 'softmax'}, and then by molora.posthoc.route(model, 'roma')"
        )
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    for router in routers:
        router.freeze()
    return model


def _weighs_all_alike(config: Any) -> bool:
    """Whether a config gives every expert the same gate, whatever comes."""
    scorer, selector = split_spec(config.scorer, "scorer"), split_spec(config.selector, "selector")
    constant = scorer[0] == "constant" and scorer[1].get("learn", True) is False
    return constant and config.link == "softmax" and selector == ("softmax", {}) and config.branches is None


def last_sites(model: nn.Module, adapter: str = "default", layers: int = 5) -> list[str]:
    """Return the layers that decide in the last `layers` blocks of each stack."""
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ConfigError(f"layers must be a whole number >= 1, got {layers!r}")
    paths = sites_of(model, adapter)
    depth = depth_of([name for name, _ in base_of(model).named_modules()])
    places = {path: place_of(path) for path in paths}
    found = [p for p, at in places.items() if at.index is not None and at.index >= depth[at.stack] - layers]
    if not found:
        raise ConfigError(f"adapter '{adapter}' takes no decision in the last {layers} blocks; it decides at: {paths}")
    return found


def neighbours(
    of: Tensor, among: Tensor, k: int = 3, *, width: float = 1.0, without: Sequence[int | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k nearest samples and their weights, a Gaussian kernel divided by its sum over them.

    Args:
        of: (B, d) embeddings.
        among: (N, d) embeddings of the samples to imitate.
        k: how many; all of them where there are fewer.
        width: sigma of `exp(-||a - b||^2 / (2 sigma^2))`.
        without: for each of the B, the one of the N that is the sample itself, or None.

    Returns:
        Numbers (B, k') and weights (B, k') float32 that sum to 1.
    """
    if k < 1 or not width > 0:
        raise ConfigError(f"neighbours need k >= 1 and a positive width, got k={k}, width={width}")
    distances = torch.cdist(of.double(), among.double())
    for row, own in enumerate(without or ()):
        if own is not None:
            distances[row, own] = torch.inf
    k = min(k, int(distances.isfinite().sum(1).min()))
    if k < 1:
        raise ConfigError("there is no other sample to imitate; collect more that the model answers correctly")
    nearest, numbers = distances.topk(k, largest=False)
    weights = torch.softmax(-nearest.square() / (2 * width**2), -1)  # the kernel over its sum, also far away
    return numbers, weights.float()


def imitation(routing: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over rows of `sum_j W_ij ||r_i - r_j||^2`.

    Args:
        routing: (B, L, E), r_i, with its gradient.
        targets: (B, k, L, E), r_j, which get none.
        weights: (B, k).
    """
    apart = (routing[:, None] - targets.detach()).square().flatten(2).sum(-1)
    return (weights * apart).sum(1).mean()


class Roma:
    """The samples that a model answered correctly, how it routed them, and the loss that pulls others after them.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        layers: as in `build`.
        k: neighbours; 3 was best in the paper.
        weight: lambda.
        width: of the kernel; none takes the median distance between the stored samples.

    Attributes:
        sites: the layers whose decisions count.
        ids: of the stored samples: the position of each among all samples that were collected, or its own number.
        pull: the second term of the latest loss, not weighted.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str = "default",
        *,
        layers: int = 5,
        k: int = 3,
        weight: float = 1.0,
        width: float | None = None,
    ) -> None:
        self.model, self.adapter, self.k, self.weight, self.width = model, adapter, k, float(weight), width
        self.sites = last_sites(model, adapter, layers)
        self.ids: list[int] = []
        self.pull = float("nan")
        self._embeddings = self._targets = torch.empty(0)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def collect(
        self,
        samples: Iterable[tuple[Batch, Tensor] | tuple[Batch, Tensor, Tensor | Sequence[int]]],
        is_correct: Callable[[Batch], Tensor] | None = None,
    ) -> int:
        """Store how the model routes the samples that it answers correctly; what was stored before is forgotten.

        Args:
            samples: a batch with labels, embeddings (B, d) of its rows, and perhaps a number for each row, which
                `loss` knows it by; by default its position among all rows.
            is_correct: of a batch, (B,) bool; by default whether the likeliest token is right at every label.

        Returns:
            How many are stored.
        """
        ids, embeddings, targets, count = [], [], [], 0
        was_training = self.model.training
        self.model.eval()
        try:
            for batch, own, *numbers in samples:
                right = (is_correct or self._matches)(batch).cpu()
                with self._reading():
                    self.model(**inputs_of(self.model, batch))
                known = [int(number) for number in numbers[0]] if numbers else range(count, count + len(right))
                ids += [number for row, number in enumerate(known) if right[row]]
                embeddings.append(own.detach().cpu().float()[right])
                targets.append(self._routing().cpu()[right])
                count += len(right)
        finally:
            self.model.train(was_training)
        if not ids:
            raise ConfigError(f"the model answered none of {count} samples correctly, so there is nothing to imitate")
        self.ids, self._embeddings, self._targets = ids, torch.cat(embeddings), torch.cat(targets)
        return len(ids)

    # --- what `molora.attach` asks for --------------------------------------------------------------------------------

    columns = ("embeddings", "sample_ids")  # of the rows, beside the model's arguments

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return `loss` of a batch that also holds `embeddings` (B, d) and `sample_ids` (B,)."""
        inputs, embeddings, ids = self._taken(batch)
        return self.loss(inputs, embeddings, ids.tolist())

    def begin_epoch(self, batches: Iterable[Batch]) -> None:
        """Collect anew, from batches as `batch_loss` takes them."""
        self.collect(self._taken(batch) for batch in batches)

    def report(self) -> dict[str, float]:
        """Return what is worth logging: the term of imitation, and how many samples there are to imitate."""
        return {"imitation": self.pull, "imitated": float(len(self.ids))}

    def _taken(self, batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        missing = [name for name in (*self.columns, "labels") if batch.get(name) is None]
        if missing:
            raise ConfigError(
                f"RoMA needs {', '.join(missing)} in every batch: rows of the training data hold embeddings (d "
                "numbers) and sample_ids (a whole number, another for each row) beside the model's arguments and labels"
            )
        inputs = {name: value for name, value in batch.items() if name not in self.columns}
        return inputs, batch["embeddings"], batch["sample_ids"]

    # --- in one's own loop --------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, embeddings: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Return `CE + weight * imitation` of one training forward, auxiliary losses of the adapter included.

        Args:
            batch: arguments of the model's forward, labels among them.
            embeddings: (B, d) of its rows.
            ids: positions of the rows among the collected samples, so that none imitates itself.
        """
        with self._reading():
            task = row_losses(self.model, batch).mean()
        task = add_aux(self.model, task)
        pull = self.imitation(self._routing(), embeddings, ids)
        self.pull = float(pull.detach())
        return task + self.weight * pull

    def imitation(self, routing: Tensor, embeddings: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Return the second term for routing (B, L, E) and embeddings (B, d), not yet weighted."""
        if not self.ids:
            raise ConfigError("nothing is stored to imitate; call collect(samples) first")
        places = {sample: number for number, sample in enumerate(self.ids)}
        without = None if ids is None else [places.get(int(sample)) for sample in ids]
        own = embeddings.detach().cpu().float()
        numbers, weights = neighbours(own, self._embeddings, self.k, width=self._width(), without=without)
        return imitation(routing, self._targets[numbers].to(routing.device), weights.to(routing.device))

    def _width(self) -> float:
        if self.width is not None:
            return self.width
        distances = torch.pdist(self._embeddings)
        middle = float(distances.median()) if len(distances) else 0.0
        return middle if middle > 0 else 1.0

    def _matches(self, batch: Batch) -> Tensor:
        return row_matches(self.model, batch)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._seen, trace = {}, trace_of(self.model)
        learns = self.model.training and torch.is_grad_enabled()

        def read(site: Site, routing: Routing, ctx: Context) -> None:
            if site.adapter != self.adapter or site.name not in self.sites:
                return
            if learns and not torch.is_grad_enabled():
                raise AuxLossError(
                    "RoMA's loss does not reach routers under reentrant gradient checkpointing, which hides them from "
                    'it; use gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            # read later: inside of a checkpoint, whose recompute has no readers, nothing more may be saved
            self._seen[site.name] = (routing.probs, ctx.weights(routing.probs))

        with trace.telling(read):
            yield

    def _routing(self) -> Tensor:
        """Return (B, L, E): what was decided for the last real token of each row."""
        missing = [site for site in self.sites if site not in self._seen]
        if missing:
            raise ConfigError(f"layers {missing} took no decision in this forward; is adapter '{self.adapter}' active?")
        rows = []
        for site in self.sites:
            probs, valid = self._seen[site]
            at = torch.arange(probs.shape[1], device=probs.device)
            last = torch.where(valid.to(probs.device) > 0, at, 0).amax(1)
            rows.append(probs.gather(1, last[:, None, None].expand(-1, 1, probs.shape[-1])).squeeze(1))
        return torch.stack(rows, 1)
