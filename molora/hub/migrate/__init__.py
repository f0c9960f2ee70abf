"""Readers of what other libraries save: X-LoRA, MoE-PEFT's MixLoRA, mttl's libraries, and mergekit's gates."""

from .gates import gates_from_prompts
from .mixlora import from_mixlora
from .mttl import from_mttl
from .xlora import from_xlora

__all__ = ["from_mixlora", "from_mttl", "from_xlora", "gates_from_prompts"]
