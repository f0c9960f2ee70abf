"""Slots: room for many LoRAs in one frozen model, bucketed by rank, written in place while it serves.

Each bucket is one PEFT adapter, called after its rank (`slots_8`), whose experts are the slots: a served batch gives
each row gates over them (see molora/routing/rows.py). The ranks of a bucket are uniform, so that a LoRA of rank 64
costs those of rank 8 nothing, and a LoRA goes into the smallest bucket that holds it. All memory is taken at the start:
writing allocates nothing and changes no shape, and since a slot that no row has a gate for adds zero, it may be written
while a forward runs.

Zero times a finite number is zero, zero times infinity is not: `LARGEST` keeps what is written so small that no
product with it overflows, so that one tenant's LoRA can never reach the rows of another.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ...compat.layers import linear_sizes_of, module_paths
from ...config import MoloraConfig
from ...control import routed_layers, trace_of
from ...errors import ConfigError, raise_all
from ...hub.compose import target_paths
from ...hub.writing import SlotWriter
from ...layers import RoutedLayer
from ...lora_files import Lora, Pair
from ...plan import targets_of
from ...tuner import MoloraModel
from ...wrapping import accept_own_arguments, task_type_of

PREFIX = "slots_"
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # the task types for which PEFT adds nothing to a model
LARGEST = 1e6  # of the numbers of a served adapter, its scale included; trained ones stay below 100


class Place(NamedTuple):
    """Where a loaded adapter is: the PEFT adapter that holds it, and its slot there; None for a routed mixture."""

    adapter: str
    slot: int | None


class Slots:
    """The slots of one model.

    Args:
        model: a base model, or a PeftModel that molora made. It is frozen, put into eval mode, and computes what the
            base model does until `trace.rows` says otherwise.
        buckets: how many slots there are of each rank.
        targets: the layers that adapters may use: `all-linear` (all but the output head), or the ends of their names.

    Attributes:
        model: the PeftModel.
        buckets: adapter name -> number of slots, by increasing rank.
        sizes: (d_in, d_out) of the linear layers of the base, by path.

    Raises:
        ConfigError: a bucket or a target that cannot be; all problems at once.
    """

    def __init__(
        self, model: nn.Module, buckets: Mapping[int, int], targets: str | Sequence[str] = "all-linear"
    ) -> None:
        problems = [f"rank {rank!r}" for rank in buckets if not _is_count(rank)]
        problems += [f"{slots!r} slots of rank {rank}" for rank, slots in buckets.items() if not _is_count(slots)]
        problems = [f"{problem} cannot be; write whole numbers from 1" for problem in problems]
        problems += [] if buckets else ["there is no bucket; write {rank: slots}, such as {8: 16}"]
        if isinstance(model, PeftModel) and not isinstance(model.base_model, MoloraModel):
            problems.append(f"the model holds adapters of type {model.peft_type}; merge them, or give the base model")
        if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
            problems.append(
                "an adapter of the model brings modules of its own (modules_to_save), which would act always"
            )
        raise_all(problems, ConfigError, "these slots cannot be made")
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.sizes = linear_sizes_of(base)
        names = targets_of(target_paths(targets, self.sizes, base), module_paths(base))
        self.model: PeftModel = model  # type: ignore[assignment]
        self._ranks: dict[str, int] = {}
        self._writers: dict[str, SlotWriter] = {}
        self._filled: dict[Place, set[str]] = {}  # the layers in which a slot may hold something
        for rank, slots in sorted(buckets.items()):
            self._add(f"{PREFIX}{rank}", rank, slots, names)
        self.buckets = {name: buckets[rank] for name, rank in self._ranks.items()}
        self.model.requires_grad_(False)
        self.model.eval()
        rest(self.model)
        trace_of(self.model).tell_progress(1.0)  # schedules of mixtures are at their end

    def _add(self, name: str, rank: int, slots: int, targets: str | list[str]) -> None:
        """Add one bucket, all zero."""
        config = MoloraConfig(
            target_modules=targets,
            experts={"num": slots, "rank": rank, "scaling": 1.0},
            scorer={"name": "constant", "learn": False},
            inference_mode=True,
        )
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, config)
        else:
            # `wrap` would give a classifier a head of its own; slots leave all but linear layers alone
            config.task_type = task if (task := task_type_of(self.model)) in _GENERATING else None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|is_gradient_checkpointing).*")
                self.model = get_peft_model(self.model, config, adapter_name=name)
            accept_own_arguments(self.model)
        banks = {path: layer.molora_bank[name] for path, layer in routed_layers(self.model, name).items()}
        with torch.no_grad():
            for bank in banks.values():
                bank.A.zero_()
        self._ranks[name], self._writers[name] = rank, SlotWriter(banks)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        banks = [bank for writer in self._writers.values() for bank in writer.banks.values()]
        return sum(p.numel() * p.element_size() for bank in banks for p in bank.parameters())

    @property
    def paths(self) -> list[str]:
        """The layers that have slots."""
        return list(next(iter(self._writers.values())).banks)

    def bucket_for(self, rank: int) -> str:
        """Return the smallest bucket that holds a rank.

        Raises:
            ConfigError: no bucket does.
        """
        for name, most in self._ranks.items():
            if rank <= most:
                return name
        ranks = ", ".join(map(str, self._ranks.values()))
        raise ConfigError(f"its rank is {rank}, and there are slots for ranks up to {ranks}; serve with larger slots")

    def problems(self, lora: Lora) -> list[str]:
        """Return what keeps a LoRA, read without problems, out of the slots, by its config and header."""
        known = set(self.paths)
        lost = [path for path in lora.pairs if path not in known]
        found = [f"layer '{path}' has no slots; serve with targets that name it" for path in lost]
        try:
            self.bucket_for(rank_of(lora.pairs))
        except ConfigError as error:
            found.append(str(error))
        return found

    def write(self, place: Place, pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor]) -> None:
        """Put a LoRA into a slot that no row has a gate for; layers that it leaves alone become zero there.

        Args:
            place: of it, in the bucket for its rank.
            pairs: its layers, as `molora.from_peft.read_lora` finds them.
            tensors: its tensors by name, without `problems` and `too_large`.
        """
        before = self._filled.get(place, set())
        self._filled[place] = before | pairs.keys()  # before it is written, in case that does not end
        self._writers[place.adapter].write(int(place.slot or 0), pairs, tensors, before)
        self._filled[place] = set(pairs)


def rest(model: PeftModel) -> None:
    """Let no adapter act where `trace.rows` says nothing; PEFT's active one would be the first bucket."""
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.set_adapter([], inference_mode=True)


def rank_of(pairs: Mapping[str, Pair]) -> int:
    """Return the largest rank of a LoRA."""
    return max((pair.rank for pair in pairs.values()), default=1)


def too_large(tensors: Mapping[str, Tensor], pairs: Mapping[str, Pair] | None = None) -> list[str]:
    """Return a problem for each of these tensors whose numbers exceed LARGEST, the scale of its pair included."""
    scales = {pair.B: max(1.0, abs(pair.scale)) for pair in (pairs or {}).values()}
    found = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        largest = float(torch.linalg.vector_norm(tensor.float(), ord=torch.inf)) * scales.get(name, 1.0)
        if not largest <= LARGEST:
            found.append(f"tensor '{name}' holds {largest:.3g}, scale included; served adapters stay below {LARGEST:g}")
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
