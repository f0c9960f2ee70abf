"""MoloraModel: the PEFT tuner that puts routed experts into a frozen model, and knows which decisions they share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from . import compat, sites
from .config import MoloraConfig
from .errors import ConfigError, LoadError, raise_all
from .experts.pool import Pools
from .fingerprint import differences, of_model
from .hooks import OWN_ARGUMENTS, TASK_IDS, ForwardHooks
from .layers import RoutedLayer, RoutedLinear
from .plan import Report, changes_at, depth_of, experts_at, form_of, place_of
from .routing.branches import Branches
from .routing.features import Place, attend, look_ahead, remember
from .routing.losses import WeightedLoss
from .routing.objectives import build_objective
from .routing.router import Router
from .routing.trace import Plan, Site, Trace
from .undo import Snapshot

logger = logging.getLogger("molora")


class MoloraModel(BaseTuner):
    """The tuner behind every molora adapter.

    Attributes:
        trace: what the latest forward knew and decided.
        reports: per adapter, what was wrapped and what was skipped.
    """

    prefix: str = compat.PREFIX
    tuner_layer_cls = RoutedLayer
    target_module_mapping: dict[str, list[str]] = {}

    # --- injection --------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add one adapter; nothing of it stays when it cannot be added.

        PEFT runs its injection hooks only for the first adapter, so the work around injection is here.
        """
        config = self.peft_config[adapter_name]
        snapshot = Snapshot(model)
        try:
            self._check_before(model, adapter_name, config)
            if not hasattr(self, "trace"):
                compat.keep_4bit_layout(model)
                self.trace = Trace()
                self.trace.progress = float(config.inference_mode)  # schedules of a finished adapter are at their end
                self.hooks = ForwardHooks(model, self.trace)
                self.reports: dict[str, Report] = {}
            self.reports[adapter_name] = Report()
            self._depth = depth_of([name for name, _ in model.named_modules()])
            self._blocks, self._fixed, self._pools = sites.Blocks(model), set(), Pools()
            if config.native_experts and config.target_modules == "all-linear":
                native = sites.native_paths(model)
                config.target_modules = _maybe_include_all_linear_layers(config, model).target_modules | set(native)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            with init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext():
                self._plan_decisions(model, adapter_name, config)
            check_part_names(model)
        except Exception:
            snapshot.restore()
            self._forget(adapter_name)
            raise
        self._finish_report(model, adapter_name, config)

    def _check_before(self, model: nn.Module, adapter_name: str, config: MoloraConfig) -> None:
        check_adapter_name(model, adapter_name)
        mine, weights = of_model(model, compat.linear_sizes, config.modules_to_save)
        if config.fingerprint is None:
            config.fingerprint = mine
        raise_all(differences(config.fingerprint, mine, weights), LoadError, "this adapter belongs to another base")

    def _forget(self, adapter_name: str) -> None:
        plans = self.trace.plans if hasattr(self, "trace") else {}
        for record in (self.peft_config, getattr(self, "reports", {}), plans):
            record.pop(adapter_name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter, its report and its losses."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _create_and_replace(
        self,
        peft_config: MoloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        report = self.reports[adapter_name]
        spec = experts_at(current_key, peft_config.experts, peft_config.layers, self._depth)
        reason = compat.why_bypassed(self.model, target_name) or sites.why_not(target, spec)
        if reason:
            report.skipped[current_key] = reason
            return
        if form_of(spec) == "block" and current_key in self._blocks.of:
            self._blocks.used.add(current_key)
        elif form_of(spec) == "block":
            spec = sites.alone(spec)
            report.plain.append(current_key)
        if current_key in report.plain or sites.is_fixed(target, spec):
            self._fixed.add(current_key)
        place = place_of(current_key)
        pooled = place.index is not None and current_key not in self._fixed and sites.kind_of(target) == "linear"
        kind = spec["pool"] if pooled else "none"
        bank = self._pools.join(sites.bank_for(target, spec), kind, place.stack, target_name)
        report.wrapped.append(current_key)
        if isinstance(target, RoutedLayer):
            target.add(adapter_name, bank)
            return
        layer = sites.layer_for(target, self.trace, peft_config.upcast_base)
        layer.add(adapter_name, bank)
        layer.requires_grad_(False)  # PEFT switches the active adapters on afterwards
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if getattr(child, "base_layer", None) is new_module:  # PEFT would look for a `.weight` of native experts
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Do nothing: PEFT's guard for Mamba knows only LoRA-like types, and refuses where we skip and report."""

    # --- decisions --------------------------------------------------------------------------------------------------

    def _plan_decisions(self, model: nn.Module, adapter_name: str, config: MoloraConfig) -> None:
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, RoutedLayer) and adapter_name in module.molora_bank
        }
        if not layers:
            skipped = "; ".join(f"{path}: {why}" for path, why in self.reports[adapter_name].skipped.items())
            raise ConfigError(
                f"nothing was wrapped: target_modules={config.target_modules!r} matched no linear layer"
                + (f" ({skipped})" if skipped else "")
                + "; name layers such as 'q_proj', or use 'all-linear'"
            )
        groups: dict[str, list[str]] = {}
        self._blocks.assign(adapter_name, layers)
        plain = self.reports[adapter_name].plain
        if plain and not self._blocks.used:
            raise ConfigError(
                f"experts.form: block found no MLP block among the targets ({len(plain)} other layers, such as "
                f"'{plain[0]}'), so there is nothing to route; target the layers of MLPs, or use form: lora"
            )
        for name in layers:
            if name in self._fixed:
                group, stack = f"{adapter_name}:fixed:{name}", compat.stack_of(name, self.hooks.encoder_path)
                layers[name].sites[adapter_name] = Site(name, adapter_name, group, stack=stack, sparse=True, fixed=True)
                continue
            groups.setdefault(self._group_of(adapter_name, name, config.share), []).append(name)
        for members in groups.values():
            members.sort(key=lambda name: not self._blocks.leads(name))  # a block decides where it reads its input
        before: dict[str, str] = {}  # the group that comes last so far, by stack
        scorers: dict[tuple[int, int], nn.Module] = {}
        lenders: dict[int, nn.Module] = {}  # selectors that share what they learn, by the size they read
        routers: list[Router] = []
        for group, members in groups.items():
            stack = compat.stack_of(members[0], self.hooks.encoder_path)
            block = "" if stack == "cross" else place_of(members[0]).block  # cross: it reads what the encoder attends
            out = layers[members[0]].d_out
            vocab = compat.vocabulary_of(self.model)
            place = Place(group, before.get(stack), vocab, block, len(routers), len(groups), out)
            before[stack] = group
            router = self._plan_group(group, members, layers, adapter_name, config, place)
            routers.append(router)
            if config.weights == "shared":
                sizes = (layers[members[0]].d_in, router.num_experts * router.splits)
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
            attentions = {place_of(path): module for path, module in compat.self_attentions(model).items()}
            in_blocks = {place.block: module for place, module in attentions.items() if place.index is not None}
            self.hooks.watch_attention(model, in_blocks)
        self.trace.plans[adapter_name] = Plan(
            losses=_place_losses(config, routers),
            decisions=len(groups),
            by_prompt=any(router.granularity == "prompt" for router in routers),
            remembers=remember(config.feature) or any(getattr(router, "remembers", False) for router in routers),
            attends=attend(config.feature),
            looks_ahead=look_ahead(config.feature),
            draws=any(router.draws for router in routers),
            objective=build_objective(config.objective),
            scheduled=config.has_schedules(),
            sites=set(layers),
        )
        self.reports[adapter_name].decisions = len(groups)

    def _group_of(self, adapter_name: str, name: str, share: str) -> str:
        place = place_of(name)
        if place.index is None:  # layers outside of the blocks (poolers, heads) see other inputs and decide alone
            share = "site"
        if name in self._blocks.used and share in ("site", "group"):
            share, name = "site", self._blocks.of[name]
        parent, _, leaf = name.rpartition(".")
        family = compat.input_family(leaf)
        if share == "group" and family is None:
            share = "site"
        of = {"site": name, "group": f"{parent}.{family}", "block": place.block, "model": ""}[share]
        # with the adapter's name, so that two active adapters never read each other's decisions
        return f"{adapter_name}:{share}:{of}:{compat.stack_of(name, self.hooks.encoder_path)}"

    def _plan_group(
        self,
        group: str,
        members: list[str],
        layers: dict[str, RoutedLayer],
        adapter_name: str,
        config: MoloraConfig,
        place: Place,
    ) -> Router:
        experts = config.experts
        by_module = form_of(experts) == "module"
        counts = {layers[name].molora_bank[adapter_name].num_experts - experts["shared"] for name in members}
        counts = {len(members)} if by_module else counts
        splits = {layers[name].molora_bank[adapter_name].splits for name in members}
        if len(counts) > 1 or len(splits) > 1:
            what = f"{sorted(counts)} experts" if len(counts) > 1 else f"experts that take {sorted(splits)} gates"
            raise ConfigError(f"layers of group '{group}' share a decision but have {what}")
        num, parts = counts.pop(), len(members) if config.per_site else 1
        if parts > 1 and splits != {1}:
            raise ConfigError(f"per_site cannot decide for experts that take {max(splits)} gates each")
        leader = layers[members[0]]
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
            splits=splits.pop() * parts,
        )
        is_plain = isinstance(leader, RoutedLinear) and not self._blocks.used.intersection(members)
        is_plain = is_plain and leader.molora_bank[adapter_name].in_kernels
        if router.edits_input and (config.share not in ("site", "group") or not is_plain):
            raise ConfigError(
                "this scorer changes what the experts read, which layers of other inputs cannot share and only LoRA "
                "experts can take; set share: site (or group) and experts.form: lora"
            )
        router.reads(leader.molora_bank[adapter_name])
        leader.molora_router[adapter_name] = router
        leader._move_adapter_to_device_of_base_layer(adapter_name)
        router.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        router.freeze()
        for position, name in enumerate(members):
            layers[name].sites[adapter_name] = Site(
                name=name,
                adapter=adapter_name,
                group=group,
                shared=len(members) > 1,
                leads=position == 0,
                stack=compat.stack_of(name, self.hooks.encoder_path),
                column=position if by_module else None,
                part=(position, num) if parts > 1 else None,
                edits=router.edits_input,
                sparse=router.sparse,
            )
        return router

    def _finish_report(self, model: nn.Module, adapter_name: str, config: MoloraConfig) -> None:
        report = self.reports[adapter_name]
        for name, module in model.named_modules():
            if "molora_" in name or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
                continue
            path = name.replace(".base_layer", "")
            if path in report.wrapped or path in report.skipped:
                continue
            if any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)):
                what = f"3-D expert parameters of {type(module).__name__} were not asked for"
                known = sites.kind_of(module) == "native"
                report.skipped[path] = (
                    f"{what}; native_experts: true (with all-linear) or '{path.rpartition('.')[2]}' in target_modules "
                    "gives each native expert LoRAs"
                    if known
                    else sites.why_not(module, config.experts) or what
                )
        report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report.total = sum(p.numel() for p in model.parameters())
        logger.info("%s", report)

    # --- what PEFT asks of a tuner ----------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT swallows `adapter_names` in silence when a tuner does not speak up here.
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names= picks a LoRA per row and is not known to molora; give each row its gates instead: "
                "with molora.pin(model, gates): ..., gates (B, 1, E)"
            )
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
        if kwargs.get(TASK_IDS) is not None:
            own["task_ids"] = kwargs[TASK_IDS]
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        # generate() without a cache feeds its own output back, and runs several beams per row
        prompt = tuple(ids.shape) if isinstance(ids, Tensor) and ids.dim() == 2 else None
        with self.hooks.calls.inside(own, prompt):
            yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: banks and routers are float32 from the start, whatever the base."""

    def _check_merge_allowed(self) -> None:
        problems = set()
        for module in self.model.modules():
            if not isinstance(module, RoutedLayer):
                continue
            for adapter in module.active_adapters:
                if adapter in module.molora_bank:
                    try:
                        module.constant_gates(adapter)
                    except Exception:
                        problems.add(f"adapter '{adapter}' routes by its input, so no fixed weight equals it")
                    if not module.molora_bank[adapter].is_lora:
                        form = module.molora_bank[adapter].form
                        problems.add(f"experts of form '{form}' are no change of the base weight")
            refused = module.why_not_merge(self.model)
            if refused:
                problems.add(refused)
        if problems:
            raise ConfigError(
                "cannot merge: " + "; ".join(sorted(problems)) + ". Instead export one expert with "
                "molora.export_peft(model, path, expert=i), or a fixed mixture with molora.export_peft(model, path, "
                "gates=[...]), and load it with PEFT; or keep serving the adapter unmerged"
            )
        super()._check_merge_allowed()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own rule looks only at the end of the key, but routers nest deeper.
        for container in RoutedLayer.adapter_layer_names:
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return key

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoloraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Select the tensors of one adapter: those of our layers only, whatever other tuners are nested in the base."""
        for module in model.modules():
            if isinstance(module, Router) and module.price is not None:
                module.price.settle()  # in place: the state dict holds the same tensors
        parts = tuple(f".{container}.{adapter_name}." for container in RoutedLayer.adapter_layer_names)
        return {key: value for key, value in state_dict.items() if any(part in key for part in parts)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map the tensors of a file to those of the model; all that does not fit is one error, before any is copied."""

        def short(key: str) -> str:
            return cls._remove_adapter_name_from_key(key, adapter_name).removeprefix("base_model.model.")

        parts = tuple(f".{container}.{adapter_name}." for container in RoutedLayer.adapter_layer_names)
        state = model.state_dict()
        expected = {short(key): key for key in state if any(part in key for part in parts)}
        # PEFT has put the names of whole saved modules in order before; it also saves resized embeddings
        whole = {short(key): key for key in state if f".modules_to_save.{adapter_name}." in key}
        known = expected | whole | {short(key): key for key in compat.embeddings_of(model)}
        given = {short(key): value for key, value in state_dict.items()}
        problems = [f"tensor '{key}' is missing" for key in sorted(expected.keys() - given.keys())]
        problems += [f"tensor '{key}' is unexpected" for key in sorted(given.keys() - known.keys())]
        for key in sorted(known.keys() & given.keys()):
            want, have = tuple(state[known[key]].shape), tuple(given[key].shape)
            if want != have:
                problems.append(f"tensor '{key}' has shape {have}, the model needs {want}")
            elif not torch.isfinite(given[key].float()).all():
                problems.append(f"tensor '{key}' holds NaN or Inf")
        raise_all(problems, LoadError, f"the file does not fit adapter '{adapter_name}'")
        return {known[key]: value for key, value in given.items()}


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


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raise ConfigError for an adapter name that could be mistaken for a part of a module path.

    PEFT tells adapters apart by looking for `.name.` in parameter paths, so an adapter called `0` or `mlp` would make
    it drop tensors of other adapters when saving.
    """
    segments = {segment for path, _ in model.named_modules() for segment in path.split(".")}
    segments -= {n for m in model.modules() if isinstance(m, RoutedLayer) for n in m.molora_bank}
    segments |= {*RoutedLayer.adapter_layer_names, "base_layer", "original_module", "modules_to_save", "base_model"}
    segments |= {"model", "A", "Bt", "weight", "bias", "scorer", "value"}  # and see check_part_names
    if not name or "." in name or name in segments or name.startswith(compat.PREFIX):
        raise _unsafe(name)


def check_part_names(model: nn.Module) -> None:
    """Raise ConfigError when an adapter is called like a part of a router or of a bank of any adapter."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    adapters = {name for layer in layers for name in layer.molora_bank}
    for layer in layers:
        for container in RoutedLayer.adapter_layer_names:
            for part in getattr(layer, container).values():
                for path in part.state_dict():
                    if taken := adapters & set(path.split(".")):
                        raise _unsafe(min(taken))


def _unsafe(name: str) -> ConfigError:
    return ConfigError(
        f"adapter name '{name}' is not safe: it is empty, holds a dot, or equals a part of this model's module "
        f"paths, and PEFT would drop tensors of other adapters when saving; choose another, such as 'my_{name}'"
    )


compat.register_tuner(MoloraConfig, MoloraModel)
