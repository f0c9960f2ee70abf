"""ForwardHooks: what surrounds every forward of a wrapped base model.

Before it, the masks, labels and task ids are read from the arguments and a pass of the trace is opened; after it, the
auxiliary loss is added to the model's own loss with this micro-batch's token share, and reported as
`outputs.aux_loss`. The hooks sit on the base model, so they work under any wrapper: PeftModel, DDP, Trainer, compile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Calls
from .compat.caches import follow_rows, tokens_in_cache
from .compat.models import (
    Arguments,
    add_output,
    checkpointing_is_on,
    encoder_of,
    generates,
    is_encoder_decoder,
    labels_are_shifted,
    looks_both_ways,
    shifted_labels,
    use_eager_attention,
    weights_of_attention,
)
from .errors import ConfigError, RoutingError
from .first_pass import check_cache, run_first_pass
from .routing.mixing import attention_key
from .routing.trace import Pass, Plan, Trace
from .routing.types import Context

# Arguments that the hooks take for themselves and the base model never sees.
OWN_ARGUMENTS = ("task_ids", "prompt_mask", "expert_ids", "router_extra")
# PEFT's forwards for CAUSAL_LM, SEQ_CLS, ... declare `task_ids` for Poly and drop it for every other type of adapter,
# so it travels past them under another name.
TASK_IDS = "molora_task_ids"


class ForwardHooks:
    """Opens and closes the passes of one base model.

    Args:
        model: the base model, whose forward is watched.
        trace: the trace of its routed layers.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.calls = Calls()
        self.arguments = Arguments(model.forward)
        self.takes_pairs = is_encoder_decoder(model)
        self.shifted = labels_are_shifted(model)
        self.generates = generates(model)
        self.both_ways = looks_both_ways(model)
        self.share: Tensor | float = 1.0
        self._grads_into_inputs = False
        self.watches = False  # whether attention weights are kept
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True)
        encoder = encoder_of(model)
        self.encoder_path = encoder[0] if encoder else None
        if encoder:
            self.encoder_arguments = Arguments(encoder[1].forward)
            encoder[1].register_forward_pre_hook(self.before_encoder, with_kwargs=True)

    def watch_attention(self, model: nn.Module, attentions: dict[str, nn.Module]) -> None:
        """Keep the attention weights of every block for the routers that run after it, from now on.

        Only eager attention gives them away, so the model is switched to it.

        Args:
            model: the base model.
            attentions: its self-attention modules by the path of their block.
        """
        if self.watches:
            return
        if not attentions:
            raise ConfigError(
                f"{type(model).__name__} has no self-attention whose weights routers could read: use feature: "
                "similarity, or another recipe"
            )
        use_eager_attention(model)
        for block, module in attentions.items():
            module.register_forward_hook(functools.partial(self._attended, attention_key(block)))
        self.watches = True

    def _attended(self, key: str, module: nn.Module, args: Any, output: Any) -> None:
        if not any(plan.attends for plan in self.trace.plans.values()):
            return
        weights = weights_of_attention(output)
        if weights is None:
            raise RoutingError(
                f"routers need the attention weights of {type(module).__name__}, but it returned none; load the model "
                'with attn_implementation="eager", or use feature: similarity'
            )
        self.trace.memory.now[key] = weights.float().mean(1)

    # --- before -----------------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Open a pass; takes molora's own arguments out of the model's."""
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        call = self.calls.now
        call.own = own = {**call.given, **{name: value for name, value in own.items() if value is not None}}
        get = self.arguments.get
        collecting = module.training and torch.is_grad_enabled()
        if collecting and not self._grads_into_inputs and checkpointing_is_on(module):
            # a frozen embedding gives checkpointed blocks inputs without grad, and reentrant checkpointing then
            # drops every gradient inside them
            module.enable_input_require_grads()
            self._grads_into_inputs = True
        new = Pass(collecting=collecting, cache=get(args, kwargs, "past_key_values", "cache_params"))
        new.continuing = tokens_in_cache(new.cache) > 0
        new.prompt_rows = call.prompt_rows
        labels = get(args, kwargs, "labels")
        if self.takes_pairs:
            self._describe_pairs(module, new, args, kwargs, labels, own)
        else:
            tokens = _shape(get(args, kwargs, "input_ids", "inputs_embeds"), get(args, kwargs, "inputs_embeds"))
            valid = _valid(get(args, kwargs, "attention_mask"), tokens)
            prompt = own.get("prompt_mask")
            if prompt is None and self.generates:
                prompt = _prompt(labels, tokens, call.prompt_length)
            self._describe(new, "main", tokens, valid, prompt, own, get(args, kwargs, "input_ids"))
        if collecting:
            self.share = self._token_share(labels, kwargs.get("num_items_in_batch"))
        self.trace.open(new)
        if new.continuing or any(plan.looks_ahead for plan in self.trace.plans.values()):
            plans = self._deciding(module)
            named = self.arguments.named(args, kwargs) if any(plan.looks_ahead for plan in plans) else None
            if named is not None:
                check_cache(new.cache, named)
            if new.continuing and any(plan.by_prompt for plan in plans):
                new.decisions = self.trace.cached.decisions(new.cache)
            if new.continuing and any(plan.remembers for plan in plans):
                new.memory.past = self.trace.cached.past(new.cache)
            if named is not None:
                run_first_pass(module, named, new)
        return args, kwargs

    def _deciding(self, module: nn.Module) -> list[Plan]:
        """Return the plans of the adapters whose routers will be asked, of those that ask for more than this forward.

        Those are not asked that are inactive, switched off or merged, and none while all gates are pinned.
        """
        plans = self.trace.plans.items()
        asking = {name: plan for name, plan in plans if plan.by_prompt or plan.remembers or plan.looks_ahead}
        if not asking or isinstance(self.trace.pins, Tensor):
            return []
        if self.trace.rows is not None:
            return [asking[name] for name, rows in self.trace.rows.items() if name in asking and rows.gates is None]
        active: set[str] = set()
        for part in module.modules():
            if hasattr(part, "molora_bank") and not (part._disable_adapters or part.merged_adapters):
                active.update(part.active_adapters)
        return [plan for name, plan in asking.items() if name in active]

    def _describe(
        self, new: Pass, stack: str, tokens: Any, valid: Any, prompt: Any, own: dict[str, Any], ids: Any = None
    ) -> None:
        if prompt is not None and tokens is not None and tuple(prompt.shape) != tokens:
            raise RoutingError(f"prompt_mask has shape {tuple(prompt.shape)}, but the input has {tokens}")
        new.contexts[stack] = Context(
            valid=valid,
            prompt=None if prompt is None else prompt.bool(),
            task_ids=self._by_beam(own.get("task_ids"), tokens),
            progress=self.trace.progress,
            training=new.collecting,
            token_ids=ids if isinstance(ids, Tensor) and ids.dim() == 2 else None,
            expert_ids=_by_token(self._by_beam(own.get("expert_ids"), tokens)),
            extra=_by_row(self._by_beam(own.get("router_extra"), tokens)),
            memory=new.memory,
            causal=not (self.both_ways or stack == "cross"),
        )
        if tokens is not None:
            new.shape[stack] = tokens

    def _describe_pairs(
        self, module: nn.Module, new: Pass, args: Any, kwargs: Any, labels: Any, own: dict[str, Any]
    ) -> None:
        get = self.arguments.get
        decoder_ids = get(args, kwargs, "decoder_input_ids", "decoder_inputs_embeds")
        # without decoder inputs the model makes them by shifting the labels
        tokens = _shape(decoder_ids, get(args, kwargs, "decoder_inputs_embeds")) or _shape(labels, None)
        valid = _valid(get(args, kwargs, "decoder_attention_mask"), tokens)
        if valid is None and tokens is not None and _shape(labels, None) == tokens:
            # what follows the last label is padding of the target: it predicts nothing
            valid = (labels != -100).long().flip(1).cumsum(1).flip(1) > 0
        # The prompt of a decoder is its start token: through cross-attention it has seen the whole input.
        prompt = None
        if tokens is not None:
            prompt = torch.zeros(tokens, dtype=torch.bool, device=_device(decoder_ids, labels))
            prompt[:, 0] = True
        if decoder_ids is None and isinstance(labels, Tensor):
            decoder_ids = shifted_labels(module, labels)
        self._describe(new, "main", tokens, valid, prompt, own, decoder_ids)
        source = get(args, kwargs, "attention_mask")
        states = get(args, kwargs, "encoder_outputs")
        rows = _shape(get(args, kwargs, "input_ids", "inputs_embeds"), get(args, kwargs, "inputs_embeds"))
        rows = rows or _shape(states[0] if states is not None else None, states[0] if states is not None else None)
        ids = get(args, kwargs, "input_ids")
        ids = ids if isinstance(ids, Tensor) else _repeated(self.calls.now.encoded_ids, rows)
        self._describe(new, "cross", rows, _valid(source, rows), None, own, ids)

    def before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the trace the mask of an encoder, which generate() runs before and outside of the model's forward."""
        get = self.encoder_arguments.get
        tokens = _shape(get(args, kwargs, "input_ids", "inputs_embeds"), get(args, kwargs, "inputs_embeds"))
        ids = get(args, kwargs, "input_ids")
        call = self.calls.now
        call.encoded_ids = ids  # generate() gives the decoder only what came of them
        own = call.own or call.given
        context = Context(
            valid=_valid(get(args, kwargs, "attention_mask"), tokens),
            task_ids=own.get("task_ids"),
            progress=self.trace.progress,
            training=module.training and torch.is_grad_enabled(),
            token_ids=ids if isinstance(ids, Tensor) and ids.dim() == 2 else None,
            expert_ids=_by_token(own.get("expert_ids")),
            extra=_by_row(own.get("router_extra")),
            memory=self.trace.memory,
            causal=False,
        )
        if tokens is not None:
            self.trace.amend("encoder", context, tokens)

    def _by_beam(self, given: Any, tokens: tuple[int, ...] | None) -> Any:
        """Repeat what was given per row of the prompt for the beams or samples of that row inside generate()."""
        rows = self.calls.now.prompt_rows
        if not isinstance(given, Tensor) or not given.dim() or not rows or tokens is None or given.shape[0] != rows:
            return given
        beams, left = divmod(tokens[0], rows)
        return given.repeat_interleave(beams, 0) if beams > 1 and not left else given

    def _token_share(self, labels: Any, total: Any) -> Tensor | float:
        """Return this micro-batch's part of the supervised tokens of the optimizer batch, counted as Trainer does."""
        if total is None or labels is None:
            return 1.0
        counted = labels[..., 1:] if self.shifted else labels
        return (counted != -100).sum() / total

    # --- after ------------------------------------------------------------------------------------------------------

    def after(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        """Add the auxiliary loss to the model's loss, report it, and close the pass."""
        collecting, self.calls.now.own = self.trace.is_collecting, {}
        cache = getattr(outputs, "past_key_values", None)
        cache = cache if cache is not None else getattr(outputs, "cache_params", None)
        self.trace.close(cache)
        if cache is not None and any(plan.remembers or plan.by_prompt for plan in self.trace.plans.values()):
            follow_rows(cache, self.trace.cached.reorder)
        if not collecting:
            return outputs
        aux = self.trace.aux
        value = aux.value()
        if value is None:
            return outputs
        has_labels = self.arguments.get(args, kwargs, "labels") is not None
        held = self.trace.is_holding
        if isinstance(outputs, tuple):
            if has_labels and not held and outputs and isinstance(outputs[0], Tensor):
                return (aux.add_to(outputs[0], self.share), *outputs[1:])
            return outputs
        if getattr(outputs, "loss", None) is not None and not held:
            outputs["loss"] = aux.add_to(outputs["loss"], self.share)
        add_output(outputs, "aux_loss", value)
        return outputs


def _shape(ids: Any, embeds: Any) -> tuple[int, int] | None:
    """Return (B, S) of token ids (B, S) or embeddings (B, S, d)."""
    if not isinstance(ids, Tensor):
        return None
    if ids is embeds or ids.dim() == 3:
        return tuple(ids.shape[:2])  # type: ignore[return-value]
    return tuple(ids.shape) if ids.dim() == 2 else None  # type: ignore[return-value]


def _valid(mask: Any, tokens: tuple[int, int] | None) -> Tensor | None:
    """Return (B, S) bool from a 2-D attention mask, which is longer than the input in cached decoding."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None:
        return None
    return mask[:, -tokens[1] :].bool() if mask.shape[1] >= tokens[1] else None


def _prompt(labels: Any, tokens: tuple[int, int] | None, length: int | None) -> Tensor | None:
    """Return (B, S) bool: the positions before the first label, or before what generate() has added; None for all."""
    if tokens is None:
        return None
    if isinstance(labels, Tensor) and tuple(labels.shape) == tokens:
        return (labels != -100).long().cumsum(1) == 0
    if labels is None and length is not None and tokens[1] > length:
        return (torch.arange(tokens[1]) < length).expand(tokens)
    return None


def _repeated(ids: Any, rows: tuple[int, ...] | None) -> Tensor | None:
    """Return token ids (B, S) for encoder states of `rows` (n B, S), which generate() repeats n times for beams."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or rows is None or rows[0] % max(1, ids.shape[0]):
        return None
    ids = ids.repeat_interleave(rows[0] // max(1, ids.shape[0]), 0)
    return ids if tuple(ids.shape) == tuple(rows) else None


def _by_token(ids: Any) -> Tensor | None:
    """Lay labels (B,) or (B, S) out as (B, 1|S)."""
    return ids.reshape(ids.shape[0], -1) if isinstance(ids, Tensor) else None


def _by_row(extra: Any) -> Tensor | None:
    """Lay features (B, m) or (B, S, m) out as float32 (B, 1|S, m)."""
    if not isinstance(extra, Tensor):
        return None
    return (extra[:, None] if extra.dim() == 2 else extra).float()


def _device(*tensors: Any) -> Any:
    return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)
