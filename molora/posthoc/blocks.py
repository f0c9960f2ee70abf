"""AdapterHub's composition blocks as gate programs over the experts of a mixture.

    Average("law", "code", weights=[3, 1])         one mixture for every row
    BatchSplit("law", Average("law", "code"), batch_sizes=[2, 1])
    MultiTask("law", "code")                       each row by its task id
    Parallel("law", "code")                        the whole batch once per child, one after the other

A block is a gate wherever it chooses or weighs outputs of experts that read the same input, and all of these do. They
nest freely, except that Parallel, which changes the number of rows, is outermost. `Average` is an average: its weights
sum to 1 (AdapterHub's divides by the number of children once more, and so halves two equal children).

What is no gate is refused. `Stack` feeds one adapter with the output of another; for LoRAs AdapterHub computes
`B2 A2 B1 A1 h`, which drops the first update and needs square layers. Only a Stack of one is a gate. `Fuse` weighs
outputs by attention over them, and `Split` by position, which cached decoding does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..control import pin
from ..errors import ConfigError, did_you_mean, raise_all
from .base import install, refuse_shared, slot_of
from .registry import posthoc_routers
from .rerouting import expert_names, routers_of

REFUSED = {
    "Fuse": "it weighs outputs by attention over them, which no gate can",
    "Split": "it chooses by position, which cached decoding does not know; split the rows with BatchSplit",
    "Stack": (
        "it feeds one adapter with the output of another (for LoRAs B2 A2 B1 A1 h, without the first update), while "
        "experts of a mixture read the same input; use Average, or merge the adapters one after the other"
    ),
}


class Block:
    """A composition of experts, or of further blocks.

    Args:
        children: names of experts, or blocks.
    """

    options: tuple[str, ...] = ()

    def __init__(self, *children: Block | str) -> None:
        name = type(self).__name__
        if not children:
            raise ConfigError(f"{name} needs children: names of experts, or blocks")
        wrong = [child for child in children if not isinstance(child, (Block, str))]
        if wrong:
            raise ConfigError(f"{name} holds names of experts or blocks, not {wrong[0]!r}")
        if any(isinstance(child, Parallel) for child in children):
            raise ConfigError(f"{name} cannot hold Parallel, which changes the number of rows; put Parallel outermost")
        self.children = list(children)

    def gates(self, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
        """Return gates (rows, E); raise ConfigError where the block does not fit them."""
        raise NotImplementedError

    @property
    def by_row(self) -> bool:
        """Whether rows of one batch differ."""
        return any(child.by_row for child in self.children if isinstance(child, Block))

    def to_dict(self) -> dict[str, Any]:
        """Return the block as plain data."""
        children = [child if isinstance(child, str) else child.to_dict() for child in self.children]
        own = {key: getattr(self, key) for key in self.options}
        return {"type": type(self).__name__, "children": children, **{k: v for k, v in own.items() if v is not None}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        parts = [repr(child) for child in self.children]
        parts += [f"{k}={v!r}" for k, v in self.to_dict().items() if k not in ("type", "children")]
        return f"{type(self).__name__}({', '.join(parts)})"


def gates_of(child: Block | str, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
    """Return the gates (rows, E) of an expert's name or of a block."""
    if isinstance(child, Block):
        return child.gates(names, rows, task_ids)
    one = nn.functional.one_hot(torch.tensor(slot_of(names, child)), len(names)).float()
    return one.expand(rows, -1)


class Stack(Block):
    """Adapters one after the other; a gate only with a single child."""

    def __init__(self, *children: Block | str) -> None:
        super().__init__(*children)
        if len(children) > 1:
            raise ConfigError(f"Stack of {len(children)} is no gate over a bank: {REFUSED['Stack']}")

    def gates(self, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
        """Return the gates (rows, E) of the only child."""
        return gates_of(self.children[0], names, rows, task_ids)


class Average(Block):
    """The mean of the children's outputs.

    Args:
        children: names of experts, or blocks.
        weights: of the children; none: equal. They are divided by their sum.
    """

    options = ("weights",)

    def __init__(self, *children: Block | str, weights: Sequence[float] | None = None) -> None:
        super().__init__(*children)
        self.weights = None if weights is None else [float(w) for w in weights]
        if self.weights is not None and len(self.weights) != len(children):
            raise ConfigError(f"Average has {len(children)} children, but {len(self.weights)} weights")
        if self.weights is not None and not (
            all(w >= 0 for w in self.weights) and 0 < sum(self.weights) < float("inf")
        ):
            raise ConfigError(f"weights of Average must be 0 or more, and not all 0, got {self.weights}")

    def gates(self, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
        """Return the mean of the children's gates (rows, E)."""
        weights = torch.tensor(self.weights or [1.0] * len(self.children))
        found = torch.stack([gates_of(child, names, rows, task_ids) for child in self.children])
        return torch.einsum("c,cre->re", weights / weights.sum(), found)


class BatchSplit(Block):
    """The first rows for the first child, the next for the second, ...

    Args:
        children: names of experts, or blocks.
        batch_sizes: how many rows each child gets; one number: the same for all.
    """

    options = ("batch_sizes",)

    def __init__(self, *children: Block | str, batch_sizes: Sequence[int] | int) -> None:
        super().__init__(*children)
        sizes = [batch_sizes] * len(children) if isinstance(batch_sizes, int) else list(batch_sizes)
        if len(sizes) != len(children) or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in sizes):
            raise ConfigError(
                f"BatchSplit needs one number of rows per child, got {sizes} for {len(children)} children"
            )
        self.batch_sizes = sizes

    by_row = True  # type: ignore[assignment]

    def gates(self, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
        """Return the gates (rows, E) of each child for its rows."""
        if sum(self.batch_sizes) != rows:
            raise ConfigError(
                f"BatchSplit splits {sum(self.batch_sizes)} rows as {self.batch_sizes}, but there are {rows}"
            )
        found, start = [], 0
        for child, size in zip(self.children, self.batch_sizes, strict=True):
            own = None if task_ids is None else task_ids[start : start + size]
            found.append(gates_of(child, names, size, own))
            start += size
        return torch.cat(found)


class MultiTask(Block):
    """Each row to the child of its task id, in any order of the rows."""

    by_row = True  # type: ignore[assignment]

    def gates(self, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
        """Return the gates (rows, E), by task_ids (rows,)."""
        if task_ids is None or task_ids.shape != (rows,):
            raise ConfigError(f"MultiTask needs task_ids of shape ({rows},)")
        ids = task_ids.cpu().long()
        if rows and (int(ids.min()) < 0 or int(ids.max()) >= len(self.children)):
            raise ConfigError(f"task ids must be 0 to {len(self.children) - 1}, got {sorted(set(ids.tolist()))}")
        table = torch.stack([gates_of(child, names, rows, task_ids) for child in self.children])  # (C, rows, E)
        return table[ids, torch.arange(rows)]


class Parallel(Block):
    """The whole batch once per child: rows of the first child come first. Give the model `replicated` inputs."""

    by_row = True  # type: ignore[assignment]

    def gates(self, names: Sequence[str], rows: int, task_ids: Tensor | None = None) -> Tensor:
        """Return gates (rows, E), where rows counts all copies of the batch."""
        count = len(self.children)
        if rows % count:
            raise ConfigError(
                f"Parallel has {count} children, so the batch must be there {count} times (see `replicated`), but "
                f"there are {rows} rows"
            )
        part = rows // count
        ids = [None] * count if task_ids is None else task_ids.chunk(count)
        return torch.cat([gates_of(child, names, part, own) for child, own in zip(self.children, ids, strict=True)])

    def replicated(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs with every tensor repeated along its rows, once per child."""
        count = len(self.children)
        return {
            key: value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value
            for key, value in inputs.items()
        }


BLOCKS = {kind.__name__: kind for kind in (Stack, Average, BatchSplit, MultiTask, Parallel)}


def block_from(content: Any) -> Block | str:
    """Return the block that `Block.to_dict` made this plain data of.

    Raises:
        ConfigError: it is no block, or one that is no gate.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, Mapping) or not isinstance(content.get("children"), (list, tuple)):
        raise ConfigError(
            f"{content!r} is no block; write {{type: Average, children: [...]}}, or the name of an expert"
        )
    kind = content.get("type")
    if kind in REFUSED and kind not in BLOCKS:
        raise ConfigError(f"{kind} is no gate over a bank: {REFUSED[kind]}")
    if kind not in BLOCKS:
        raise ConfigError(f"block '{kind}' is unknown{did_you_mean(str(kind), BLOCKS)}")
    options = {key: value for key, value in content.items() if key not in ("type", "children")}
    known = BLOCKS[kind].options
    unknown = [f"it has no '{key}'{did_you_mean(key, known)}" for key in options if key not in known]
    raise_all(unknown, ConfigError, f"{kind} cannot be built")
    return BLOCKS[kind](*[block_from(child) for child in content["children"]], **options)


@contextmanager
def composing(
    model: nn.Module, block: Block | str, rows: int, task_ids: Tensor | None = None, adapter: str = "default"
) -> Iterator[Tensor]:
    """Let a block decide in every forward of `rows` rows inside of this context; yields its gates (rows, 1, E)."""
    refuse_shared(model, adapter)
    gates = gates_of(block, expert_names(model, adapter), rows, task_ids)[:, None]
    with pin(model, gates):
        yield gates


@posthoc_routers.register("blocks")
def build(model: nn.Module, adapter: str = "default", *, block: Block | str | Mapping[str, Any]) -> nn.Module:
    """Make a block the router of a mixture, saved with it: one that does not depend on the row, or a MultiTask.

    A MultiTask of such blocks becomes a table that is read by `task_ids`; all others become constant gates, which can
    be merged. What splits the batch acts inside `with composing(model, block, rows):` only.

    Args:
        model: a wrapped model.
        adapter: the name of the mixture.
        block: a block, its plain data, or the name of an expert.

    Returns:
        The model.

    Raises:
        ConfigError: the block splits the batch, or names an unknown expert; nothing is changed.
    """
    program = block_from(block) if isinstance(block, Mapping) else block
    names = expert_names(model, adapter)
    by_task = isinstance(program, MultiTask) and not any(isinstance(c, Block) and c.by_row for c in program.children)
    if isinstance(program, Block) and program.by_row and not by_task:
        raise ConfigError(
            f"{program!r} depends on the rows of a batch, so no router can hold it; run the model inside "
            "`with composing(model, block, rows):`"
        )
    if by_task:
        table = torch.cat([gates_of(child, names, 1) for child in program.children])
        parts = {"scorer": {"name": "table", "num_tasks": len(table)}, "granularity": "task"}
    else:
        table = gates_of(program, names, 1)[0]
        parts = {"scorer": "constant"}
    install(model, adapter, link="identity", selector="softmax", **parts)
    for router in routers_of(model, adapter):
        with torch.no_grad():
            router.scorer.weight.copy_(table)
    return model
