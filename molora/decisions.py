"""Decisions: the routers of one adapter: which of its layers share a decision, and what takes it.

The tuner asks for them once the banks of an adapter are in their layers, and again when a mixture has changed.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .compat.layers import input_family, query_beside
from .compat.models import self_attentions, stack_of, vocabulary_of
from .config import MoloraConfig
from .errors import ConfigError, raise_all
from .hooks import ForwardHooks
from .layers import RoutedLayer, RoutedLinear
from .plan import Report, changes_at, form_of, place_of
from .routing.branches import Branches
from .routing.features import Place, attend, look_ahead, remember
from .routing.objectives import build_objective
from .routing.router import Router
from .routing.trace import Plan, Site
from .routing.weighted import WeightedLoss
from .sites import Blocks


class Decisions:
    """The decisions of one adapter.

    Args:
        model: the base model, with the banks of the adapter in its layers.
        adapter: the adapter's name.
        config: the adapter's configuration.
        hooks: what surrounds the forwards of the model.
        report: what was wrapped for the adapter; is told how many decisions there are.
        blocks: the MLP blocks of the model, with those layers in use whose experts are whole blocks.
        fixed: paths of layers with one expert that is always on, where nothing is decided.
        trains: whether the routers are trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        config: MoloraConfig,
        *,
        hooks: ForwardHooks,
        report: Report,
        blocks: Blocks,
        fixed: Collection[str],
        trains: bool,
    ) -> None:
        self.model, self.adapter, self.config = model, adapter, config
        self.hooks, self.report, self.blocks, self.fixed, self.trains = hooks, report, blocks, fixed, trains
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, RoutedLayer) and adapter in module.molora_bank
        }

    def plan(self) -> Plan:
        """Give each group of layers its router and each layer its site; return what the trace must know.

        Raises:
            ConfigError: there is nothing to route, or the layers cannot decide as the configuration says.
        """
        self._check_targets()
        self.blocks.assign(self.adapter, self.layers)
        groups, config = self._groups(), self.config
        vocab = vocabulary_of(self.model)
        before: dict[str, str] = {}  # the group that comes last so far, by stack
        scorers: dict[tuple[int, int], nn.Module] = {}
        lenders: dict[int, nn.Module] = {}  # selectors that share what they learn, by the size they read
        routers: list[Router] = []
        for group, members in groups.items():
            stack, leader = self._stack_of(members[0]), self.layers[members[0]]
            block = "" if stack == "cross" else place_of(members[0]).block  # cross: it reads what the encoder attends
            place = Place(group, before.get(stack), vocab, block, len(routers), len(groups), leader.d_out)
            before[stack] = group
            router = self._router(group, members, place)
            routers.append(router)
            if config.weights == "shared":
                sizes = (leader.d_in, router.num_experts * router.splits)
                if sizes in scorers:
                    router.borrow(scorers[sizes])
                else:
                    scorers[sizes] = router.scorer
            for mine, first in zip(_features_of(router), _features_of(routers[0]), strict=True):
                if hasattr(mine, "borrow") and mine is not first:
                    mine.borrow(first)
            if getattr(router.selector, "sharing", False):
                lender = lenders.setdefault(router.selector.dim, router.selector)
                if lender is not router.selector:
                    router.selector.borrow(lender)
        if attend(config.feature):
            attentions = {place_of(path): module for path, module in self_attentions(self.model).items()}
            in_blocks = {place.block: module for place, module in attentions.items() if place.index is not None}
            self.hooks.watch_attention(self.model, in_blocks)
        self.report.decisions = len(groups)
        return Plan(
            losses=_place_losses(config, routers),
            decisions=len(groups),
            by_prompt=any(router.granularity == "prompt" for router in routers),
            remembers=remember(config.feature) or any(getattr(router, "remembers", False) for router in routers),
            attends=attend(config.feature),
            looks_ahead=look_ahead(config.feature),
            draws=any(router.draws for router in routers),
            objective=build_objective(config.objective),
            scheduled=config.has_schedules(),
            sites=set(self.layers),
        )

    def _check_targets(self) -> None:
        if not self.layers:
            skipped = "; ".join(f"{path}: {why}" for path, why in self.report.skipped.items())
            raise ConfigError(
                f"nothing was wrapped: target_modules={self.config.target_modules!r} matched no linear layer"
                + (f" ({skipped})" if skipped else "")
                + "; name layers such as 'q_proj', or use 'all-linear'"
            )
        plain = self.report.plain
        if plain and not self.blocks.used:
            raise ConfigError(
                f"experts.form: block found no MLP block among the targets ({len(plain)} other layers, such as "
                f"'{plain[0]}'), so there is nothing to route; target the layers of MLPs, or use form: lora"
            )

    def _groups(self) -> dict[str, list[str]]:
        """Return the layers of each decision, the one that takes it first; layers that decide nothing get sites."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            if name in self.fixed:
                group, stack = f"{self.adapter}:fixed:{name}", self._stack_of(name)
                layer.sites[self.adapter] = Site(name, self.adapter, group, stack=stack, sparse=True, fixed=True)
            else:
                groups.setdefault(self._group_of(name), []).append(name)
        for members in groups.values():
            members.sort(key=lambda name: not self.blocks.leads(name))  # a block decides where it reads its input
            parent, _, leaf = members[0].rpartition(".")
            first = f"{parent}.{query_beside(leaf)}"
            if first in members:  # BART, OPT and Whisper define k before q, and run q before k
                members.insert(0, members.pop(members.index(first)))
        return groups

    def _stack_of(self, name: str) -> str:
        return stack_of(name, self.hooks.encoder_path)

    def _group_of(self, name: str) -> str:
        place, share = place_of(name), self.config.share
        if place.index is None:  # layers outside of the blocks (poolers, heads) see other inputs and decide alone
            share = "site"
        if name in self.blocks.used and share in ("site", "group"):
            share, name = "site", self.blocks.of[name]
        parent, _, leaf = name.rpartition(".")
        family = input_family(leaf)
        if share == "group" and family is None:
            share = "site"
        of = {"site": name, "group": f"{parent}.{family}", "block": place.block, "model": ""}[share]
        # with the adapter's name, so that two active adapters never read each other's decisions
        return f"{self.adapter}:{share}:{of}:{self._stack_of(name)}"

    def _router(self, group: str, members: list[str], place: Place) -> Router:
        """Make the router of a group, and give its layers their sites."""
        config, experts = self.config, self.config.experts
        leader = self.layers[members[0]]
        num, splits = self._sizes(group, members)
        parts = len(members) if config.per_site else 1
        if parts > 1 and splits > 1:
            raise ConfigError(f"per_site cannot decide for experts that take {splits} gates each")
        several = {"branches": config.branches, "mix": config.mix}
        kind, own = (Router, {}) if config.branches is None else (Branches, several)
        router = kind(
            leader.d_read,
            num,
            **own,
            scorer=config.scorer,
            link=config.link,
            selector=config.selector_at(changes_at(members[0], config.layers, "selector")),
            price=config.price,
            granularity=config.granularity,
            pool=config.pool,
            feature=config.feature,
            null=experts["null"],
            shared={"num": experts["shared"], "gate": experts["shared_gate"], "weight": experts["shared_weight"]}
            if experts["shared"]
            else None,
            weights=config.weights,
            place=place,
            splits=splits * parts,
        )
        self._check_editing(router, members)
        router.reads(leader.molora_bank[self.adapter])
        leader.molora_router[self.adapter] = router
        leader._move_adapter_to_device_of_base_layer(self.adapter)
        router.requires_grad_(self.trains)
        router.freeze()
        for position, name in enumerate(members):
            self.layers[name].sites[self.adapter] = Site(
                name=name,
                adapter=self.adapter,
                group=group,
                shared=len(members) > 1,
                leads=position == 0,
                stack=self._stack_of(name),
                column=position if form_of(experts) == "module" else None,
                part=(position, num) if parts > 1 else None,
                edits=router.edits_input,
                sparse=router.sparse,
            )
        return router

    def _sizes(self, group: str, members: list[str]) -> tuple[int, int]:
        """Return how many experts a group chooses from, and how many gates each of them takes."""
        banks = [self.layers[name].molora_bank[self.adapter] for name in members]
        counts = {bank.num_experts - self.config.experts["shared"] for bank in banks}
        counts = {len(members)} if form_of(self.config.experts) == "module" else counts
        splits = {bank.splits for bank in banks}
        if len(counts) > 1 or len(splits) > 1:
            what = f"{sorted(counts)} experts" if len(counts) > 1 else f"experts that take {sorted(splits)} gates"
            raise ConfigError(f"layers of group '{group}' share a decision but have {what}")
        return counts.pop(), splits.pop()

    def _check_editing(self, router: Router, members: list[str]) -> None:
        leader = self.layers[members[0]]
        is_plain = isinstance(leader, RoutedLinear) and not self.blocks.used.intersection(members)
        is_plain = is_plain and leader.molora_bank[self.adapter].in_kernels
        if router.edits_input and (self.config.share not in ("site", "group") or not is_plain):
            raise ConfigError(
                "this scorer changes what the experts read, which layers of other inputs cannot share and only LoRA "
                "experts can take; set share: site (or group) and experts.form: lora"
            )


def _place_losses(config: MoloraConfig, routers: list[Router]) -> list[WeightedLoss]:
    """Build the losses of an adapter; their controllers go into its first router, which saves and copies them.

    Raises:
        ConfigError: a loss cannot work with the routers or the experts of this configuration.
    """
    losses = [WeightedLoss(loss) for loss in config.losses]
    problems = {problem for loss in losses for router in routers if (problem := loss.why_not(router)) is not None}
    raise_all(sorted(problems), ConfigError, "these losses cannot work with this adapter")
    for position, loss in enumerate(losses):
        if loss.controller is not None and routers:
            routers[0].add_controller(position, loss.controller)
    return losses


def _features_of(router: nn.Module) -> list[nn.Module]:
    """Return the features of a router, or of all its branches."""
    return [feature for part in router.modules() if isinstance(part, Router) for feature in part.feature]
