"""MoloraModel: the PEFT tuner that puts routed experts into a frozen model, and what PEFT asks of a tuner."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from . import sites
from .adapter_names import check_adapter_name, check_part_names
from .compat.layers import keep_4bit_layout, linear_sizes, why_bypassed
from .compat.models import embeddings_of
from .compat.registration import PREFIX, register_tuner
from .config import MoloraConfig
from .decisions import Decisions
from .errors import ConfigError, LoadError, raise_all
from .experts.pool import Pools
from .fingerprint import differences, of_model
from .hooks import OWN_ARGUMENTS, TASK_IDS, ForwardHooks
from .layers import RoutedLayer
from .plan import Report, depth_of, experts_at, form_of, place_of
from .routing.router import Router
from .routing.trace import Trace
from .undo import Snapshot

logger = logging.getLogger("molora")


class MoloraModel(BaseTuner):
    """The tuner behind every molora adapter.

    Attributes:
        trace: what the latest forward knew and decided.
        reports: per adapter, what was wrapped and what was skipped.
    """

    prefix: str = PREFIX
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
                keep_4bit_layout(model)
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
                self.plan_decisions(adapter_name, self._blocks, self._fixed)
            check_part_names(model)
        except Exception:
            snapshot.restore()
            self._forget(adapter_name)
            raise
        self._finish_report(model, adapter_name, config)

    def _check_before(self, model: nn.Module, adapter_name: str, config: MoloraConfig) -> None:
        check_adapter_name(model, adapter_name)
        mine, weights = of_model(model, linear_sizes, config.modules_to_save)
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
        reason = why_bypassed(self.model, target_name) or sites.why_not(target, spec)
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

    def plan_decisions(self, adapter_name: str, blocks: sites.Blocks, fixed: Collection[str]) -> None:
        """Make the routers of an adapter whose banks are in their layers (see `Decisions`, whose arguments these are).

        Raises:
            ConfigError: the layers cannot decide as the adapter's configuration says.
        """
        config = self.peft_config[adapter_name]
        self.trace.plans[adapter_name] = Decisions(
            self.model,
            adapter_name,
            config,
            hooks=self.hooks,
            report=self.reports[adapter_name],
            blocks=blocks,
            fixed=fixed,
            trains=adapter_name in self.active_adapters and not config.inference_mode,
        ).plan()

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

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, with what works instead: PEFT users look for this name."""
        raise ConfigError(
            "mixtures cannot be added up: each decides by its own router. Let several act together with "
            "model.base_model.set_adapter([name, ...]); weigh experts of one mixture with molora.export_peft(model, "
            "path, gates=[...]); or mix plain LoRAs with molora.compose(base, [...]) or molora hub mix"
        )

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
        known = expected | whole | {short(key): key for key in embeddings_of(model)}
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


register_tuner(MoloraConfig, MoloraModel)
