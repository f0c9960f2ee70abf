"""MoloraModel: the PEFT tuner that puts routed experts into a frozen model, and knows which decisions they share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from . import compat
from .config import MoloraConfig
from .errors import ConfigError, LoadError, raise_all
from .experts.bank import ExpertBank
from .fingerprint import differences, of_model
from .hooks import OWN_ARGUMENTS, TASK_IDS, ForwardHooks
from .layers import RoutedLinear
from .plan import Report, depth_of, experts_at, place_of, ranks_of, scaling_of
from .routing.features import Place, remember
from .routing.losses import WeightedLoss
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
    tuner_layer_cls = RoutedLinear
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
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            with init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext():
                self._plan_decisions(model, adapter_name, config)
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
        sizes = compat.linear_sizes(target)
        reason = compat.why_bypassed(self.model, target_name)
        if sizes is None or reason:
            report.skipped[current_key] = reason or f"{type(target).__name__} is not a linear layer"
            return
        spec = experts_at(current_key, peft_config.experts, peft_config.layers, self._depth)
        bank = ExpertBank(
            *sizes,
            ranks_of(spec),
            form="lora" if spec["form"] == "module" else spec["form"],
            scaling=scaling_of(spec),
            dropout=spec["dropout"],
            frozen=spec["frozen"],
            init=spec["init"],
        )
        report.wrapped.append(current_key)
        if isinstance(target, RoutedLinear):
            target.add(adapter_name, bank)
            return
        layer = RoutedLinear(target, *sizes, self.trace, peft_config.upcast_base)
        layer.add(adapter_name, bank)
        layer.requires_grad_(False)  # PEFT switches the active adapters on afterwards
        self._replace_module(parent, target_name, layer, target)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Do nothing: PEFT's guard for Mamba knows only LoRA-like types, and refuses where we skip and report."""

    # --- decisions --------------------------------------------------------------------------------------------------

    def _plan_decisions(self, model: nn.Module, adapter_name: str, config: MoloraConfig) -> None:
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, RoutedLinear) and adapter_name in module.molora_bank
        }
        if not layers:
            skipped = "; ".join(f"{path}: {why}" for path, why in self.reports[adapter_name].skipped.items())
            raise ConfigError(
                f"nothing was wrapped: target_modules={config.target_modules!r} matched no linear layer"
                + (f" ({skipped})" if skipped else "")
                + "; name layers such as 'q_proj', or use 'all-linear'"
            )
        groups: dict[str, list[str]] = {}
        for name in layers:
            groups.setdefault(self._group_of(adapter_name, name, config.share), []).append(name)
        before: dict[str, str] = {}  # the group that comes last so far, by stack
        scorers: dict[tuple[int, int], nn.Module] = {}
        for group, members in groups.items():
            stack = compat.stack_of(members[0], self.hooks.encoder_path)
            place = Place(group, before.get(stack))
            before[stack] = group
            router = self._plan_group(group, members, layers, adapter_name, config, place)
            if config.weights == "shared":
                sizes = (layers[members[0]].d_in, router.num_experts)
                if sizes in scorers:
                    router.borrow(scorers[sizes])
                else:
                    scorers[sizes] = router.scorer
        self.trace.plans[adapter_name] = Plan(
            losses=[WeightedLoss(loss) for loss in config.losses],
            decisions=len(groups),
            by_prompt=config.granularity == "prompt",
            remembers=remember(config.feature),
            scheduled=config.has_schedules(),
            sites=set(layers),
        )
        self.reports[adapter_name].decisions = len(groups)

    def _group_of(self, adapter_name: str, name: str, share: str) -> str:
        place = place_of(name)
        if place.index is None:  # layers outside of the blocks (poolers, heads) see other inputs and decide alone
            share = "site"
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
        layers: dict[str, RoutedLinear],
        adapter_name: str,
        config: MoloraConfig,
        place: Place,
    ) -> Router:
        experts = config.experts
        by_module = experts["form"] == "module"
        counts = {layers[name].molora_bank[adapter_name].num_experts - experts["shared"] for name in members}
        counts = {len(members)} if by_module else counts
        if len(counts) > 1:
            raise ConfigError(f"layers of group '{group}' share a decision but have {sorted(counts)} experts")
        leader = layers[members[0]]
        router = Router(
            leader.d_in,
            counts.pop(),
            scorer=config.scorer,
            link=config.link,
            selector=config.selector,
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
                sparse=router.sparse,
            )
        return router

    def _finish_report(self, model: nn.Module, adapter_name: str, config: MoloraConfig) -> None:
        report = self.reports[adapter_name]
        for name, module in model.named_modules():
            if "molora_" in name or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
                continue
            if any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)):
                report.skipped[name] = f"3-D expert parameters of {type(module).__name__} are not supported yet"
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
        before = (self.hooks.given, self.hooks.prompt_length)
        self.hooks.given = {**before[0], **own}
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self.hooks.prompt_length = ids.shape[1]  # generate() without a cache feeds its own output back
        try:
            yield
        finally:
            self.hooks.given, self.hooks.prompt_length = before

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: banks and routers are float32 from the start, whatever the base."""

    def _check_merge_allowed(self) -> None:
        problems = set()
        for module in self.model.modules():
            if not isinstance(module, RoutedLinear):
                continue
            for adapter in module.active_adapters:
                if adapter in module.molora_bank:
                    try:
                        module.constant_gates(adapter)
                    except Exception:
                        problems.add(f"adapter '{adapter}' routes by its input, so no fixed weight equals it")
            if type(module.get_base_layer()) not in compat.PLAIN_LINEARS:
                problems.add(f"the base layers are {type(module.get_base_layer()).__name__}: merging would round twice")
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
        for container in RoutedLinear.adapter_layer_names:
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
        parts = tuple(f".{container}.{adapter_name}." for container in RoutedLinear.adapter_layer_names)
        return {key: value for key, value in state_dict.items() if any(part in key for part in parts)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map the tensors of a file to those of the model; all that does not fit is one error, before any is copied."""

        def short(key: str) -> str:
            return cls._remove_adapter_name_from_key(key, adapter_name).removeprefix("base_model.model.")

        parts = tuple(f".{container}.{adapter_name}." for container in RoutedLinear.adapter_layer_names)
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


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raise ConfigError for an adapter name that could be mistaken for a part of a module path.

    PEFT tells adapters apart by looking for `.name.` in parameter paths, so an adapter called `0` or `mlp` would make
    it drop tensors of other adapters when saving.
    """
    segments = {segment for path, _ in model.named_modules() for segment in path.split(".")}
    segments -= {n for m in model.modules() if isinstance(m, RoutedLinear) for n in m.molora_bank}
    segments |= {"A", "Bt", "weight", "bias", "base_layer", "scorer", "price", *RoutedLinear.adapter_layer_names}
    segments |= {"pool", "link", "selector", "value", "model", "base_model", "original_module", "modules_to_save"}
    if not name or "." in name or name in segments or name.startswith(compat.PREFIX):
        raise ConfigError(
            f"adapter name '{name}' is not safe: it is empty, holds a dot, or equals a part of this model's module "
            f"paths, and PEFT would drop tensors of other adapters when saving; choose another, such as 'my_{name}'"
        )


compat.register_tuner(MoloraConfig, MoloraModel)
