"""Paged keys and values on transformers' continuous batching: all of its private names that molora takes are here.

What is taken is the cache: one tensor cut into blocks, block tables, reference counts, and the writing and reading of
layers with full or sliding attention. Its scheduler, its runner and its manager are not: they know one model and one
way of sampling, decide which requests share keys by tokens alone, want a thread of their own, and size the cache by the
memory of the machine. Which sequences share blocks is decided here: by tokens and by a salt, which stands for all that
keys and values depend on beside tokens. `PRIVATE` says what is taken and why; a test holds it against the installed
release, and `missing()` makes an engine fall back to another backend where a release has something else.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import secrets
from array import array
from itertools import islice
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from ...errors import ConfigError

PACKAGE = "transformers.generation.continuous_batching"
ENDLESS = 2**31  # tokens; longer than any sequence
#: What is taken from PACKAGE, by module and dotted name, and why.
PRIVATE = {
    "cache:PagedAttentionCache": "holds the tensor and the allocators of its layers",
    "cache:group_layers_by_attn_type": "tells which layers share blocks, which the formula of the size needs",
    "utils:find_num_key_value_heads": "heads of the keys, as the cache counts them",
    "utils:find_head_dim": "numbers per head, as the cache counts them",
    "cache_allocators.cache_pool:CachePool.allocate_sector": "hands memory to one kind of layers, once, at the start",
    "cache_allocators.cache_pool:CachePool.free_blocks": "gives blocks back",
    "cache_allocators.cache_pool:CachePool.count_free_blocks": "what can be taken without eviction",
    "cache_allocators.cache_allocator:CacheAllocator.needs_new_blocks": "how many blocks more tokens take",
    "cache_allocators.cache_allocator:CacheAllocator.allocate_cache_to_request": "takes them",
    "cache_allocators.cache_allocator:CacheAllocator.get_read_indices": "where the keys of a sequence are",
    "cache_allocators.cache_allocator:CacheAllocator.get_write_indices": "where its new keys go",
    "cache_allocators.cache_allocator:CacheAllocator.update": "writes keys and values and reads those of the batch",
    "cache_allocators.cache_allocator:BlockLedger.acquire": "counts one more holder of a block",
    "cache_allocators.cache_allocator:BlockLedger.release": "counts one less; keeps a named block for reuse",
    "cache_allocators.cache_allocator:BlockLedger.register_new_hash": "names the contents of a block",
}


def missing() -> str | None:
    """Return what the installed transformers lacks of PRIVATE; None when all of it is there."""
    for name in PRIVATE:
        try:
            _taken(name)
        except (ImportError, AttributeError):
            where = f"{PACKAGE}.{name.replace(':', '.')}"
            return f"transformers {transformers.__version__} has no {where}; 5.23 has"
    return None


def _taken(name: str) -> Any:
    module, path = name.split(":")
    return attrgetter(path)(importlib.import_module(f"{PACKAGE}.{module}"))


# --- sizes --------------------------------------------------------------------------------------------------------


def bytes_per_block(config: Any, dtype: torch.dtype, page: int) -> dict[str, int]:
    """Return the bytes of one block of `page` tokens, by kind of attention.

    A block holds keys and values of all layers of a kind: 2 * layers * key heads * head dim * page * bytes of dtype.
    """
    heads, width = _taken("utils:find_num_key_value_heads")(config), _taken("utils:find_head_dim")(config)
    groups = _taken("cache:group_layers_by_attn_type")(config)
    return {kind: 2 * len(layers) * heads * width * page * dtype.itemsize for kind, layers in groups.items()}


def blocks_for(config: Any, dtype: torch.dtype, page: int, kv_bytes: int) -> int:
    """Return how many sectors, the common multiple of all blocks, `kv_bytes` can hold beside two that stay empty.

    Raises:
        ConfigError: not even one.
    """
    blocks = bytes_per_block(config, dtype, page)
    sector = math.lcm(*blocks.values(), 128)  # the cache aligns to 128 bytes
    count = kv_bytes // sector - 2  # it keeps two for padding
    if count < len(blocks):
        raise ConfigError(
            f"kv_bytes is {kv_bytes:,}, but blocks of {page} tokens of this model take {sector:,} bytes and at least "
            f"{2 + len(blocks)} of them are needed; give {sector * (2 + len(blocks)):,} or more, or a smaller page"
        )
    return count


# --- the cache ----------------------------------------------------------------------------------------------------


class Pages:
    """Blocks of keys and values; sequences hold them, and those of equal salt and equal tokens share them.

    Args:
        config: of the language model.
        dtype, device: of the keys.
        kv_bytes, places, page: bytes of all blocks, sequences that are open at once, tokens per block.

    Attributes:
        bytes: what the blocks take.
        blocks: how many there are for each kind of layers.
        reused: tokens so far that were found in the cache and not computed again.
        shares: whether prefixes can be shared at all: sliding windows overwrite their blocks.
    """

    def __init__(
        self, config: Any, dtype: torch.dtype, device: torch.device, kv_bytes: int, places: int, page: int = 16
    ) -> None:
        sizes = bytes_per_block(config, dtype, page)
        sectors = blocks_for(config, dtype, page, kv_bytes)
        sector = math.lcm(*sizes.values(), 128)
        options = transformers.ContinuousBatchingConfig(
            page_size=page,
            num_blocks=sectors * sector // sum(sizes.values()),  # it counts in blocks of all layers
            max_batch_tokens=1,  # the buffers that this sizes are not used
            max_requests_per_batch=1,
            max_blocks_per_request=0,
            max_memory_percent=1.0,
            allow_block_sharing=True,
        )
        alone = SimpleNamespace(tp_size=1)  # no tensor parallelism
        self.page = page
        self.cache = _taken("cache:PagedAttentionCache")(config, options, device, alone, dtype=dtype)
        self.kinds = list(self.cache.cache_allocators.values())
        self.by_layer: dict[int, Any] = self.cache.layer_to_allocator
        self.bytes = self.cache.cache_tensor.numel()
        self.shares, self.reused = self.cache.use_prefix_sharing, 0
        self._secret = secrets.token_bytes(16)  # so that nobody can look for other tokens with the same digest
        self._names: dict[str, list[bytes]] = {}  # by sequence: its salt, then the digests of its full blocks
        self._reserved: dict[str, list[int]] = {}
        self.blocks = self._divide(places)

    def _divide(self, places: int) -> list[int]:
        """Hand all memory to the kinds of layers, once, and return the blocks of each.

        So no kind can be starved by another one's half-used sectors, and a reservation in blocks is a promise.
        """
        pool, per_sector = self.cache.pool, [kind.blocks_per_sector for kind in self.kinds]
        left, given = pool.num_free_sectors, [0] * len(self.kinds)
        windows = [places * self._needed(kind, ENDLESS) if _window(kind) else math.inf for kind in self.kinds]
        order = sorted(range(len(self.kinds)), key=lambda i: windows[i])  # those with a window first
        for place, i in enumerate(order):
            others = len(order) - place - 1  # which get at least one each
            pages = min(windows[i], int(left / sum(1 / per_sector[j] for j in order[place:])))
            given[i] = max(1, min(left - others, math.ceil(pages / per_sector[i]))) if others else left
            left -= given[i]
        for i, sectors in enumerate(given):
            for _ in range(sectors):
                pool.allocate_sector(self.kinds[i].index)
        return [sectors * per for sectors, per in zip(given, per_sector, strict=True)]

    def _needed(self, kind: Any, tokens: int) -> int:
        return math.ceil(min(tokens, _window(kind) or tokens) / self.page)

    # --- reservations ---------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Tokens whose keys the blocks hold, in the kind of layers that runs out of blocks first."""
        return self._tokens(self.blocks)

    @property
    def longest(self) -> int:
        """Tokens that one sequence alone can come to: `ENDLESS` where no layer looks back farther than a window."""
        return ENDLESS if self._is_endless(self.blocks) else self.capacity

    @property
    def room(self) -> int:
        """Tokens whose keys find blocks that are neither held nor reserved."""
        return self._tokens(self._free())

    def fits(self, need: int) -> bool:
        """Tell whether there are blocks for one more sequence of so many tokens, whatever the open ones do."""
        return all(self._needed(kind, need) <= free for kind, free in zip(self.kinds, self._free(), strict=True))

    @property
    def reserved(self) -> int:
        """Tokens that open sequences can come to, in the kind of layers that has most of them."""
        return max(self._promised()) * self.page

    def _promised(self) -> list[int]:
        return [sum(blocks[i] for blocks in self._reserved.values()) for i in range(len(self.kinds))]

    def _free(self) -> list[int]:
        return [have - taken for have, taken in zip(self.blocks, self._promised(), strict=True)]

    def _tokens(self, blocks: list[int]) -> int:
        """Return the tokens that these many blocks of each kind hold."""
        held = [max(0, count) * self.page for count in blocks]
        if self._is_endless(blocks):
            return min(held)
        # a full window holds a sequence of any length, so what the other layers can hold counts
        full = [self._holds_window(i, count) for i, count in enumerate(blocks)]
        return min(tokens for tokens, is_full in zip(held, full, strict=True) if not is_full)

    def _is_endless(self, blocks: list[int]) -> bool:
        """Tell whether these many blocks of each kind hold a sequence of any length."""
        return all(self._holds_window(i, count) for i, count in enumerate(blocks))

    def _holds_window(self, i: int, count: int) -> bool:
        return bool(_window(self.kinds[i])) and count >= self._needed(self.kinds[i], ENDLESS)

    # --- sequences ------------------------------------------------------------------------------------------------

    def open(self, sequence: str, salt: bytes, need: int) -> None:
        """Reserve blocks for a sequence.

        Args:
            sequence: its name.
            salt: equal only where equal tokens have equal keys and values.
            need: how many tokens it can come to at most.
        """
        self._names[sequence] = [hashlib.blake2b(salt, digest_size=16, key=self._secret).digest()]
        self._reserved[sequence] = [self._needed(kind, need) for kind in self.kinds]
        for kind in self.kinds:
            kind.block_table[sequence] = []

    def find(self, sequence: str, tokens: list[int], past: int) -> int:
        """Take over blocks of the next tokens that others have computed; return how many tokens that saves.

        At least the last token is left to compute, since that gives the next one.

        Args:
            sequence, tokens: its name, and all of it so far.
            past: how many of its tokens have keys.
        """
        if not self.shares or past % self.page:
            return 0
        (kind,), names, found = self.kinds, self._names[sequence], 0
        while (name := self.next_name(sequence, tokens)) is not None:
            block = kind.ledger.hash_to_block.get(name)
            if block is None:
                break
            kind.ledger.acquire(block)
            kind.block_table[sequence].append(block)
            names.append(name)
            found += self.page
        self.reused += found
        return found

    def next_name(self, sequence: str, tokens: list[int]) -> bytes | None:
        """Return the digest of the next full block and all before it; None when the last token comes before its end."""
        names = self._names[sequence]
        at = len(names) - 1
        return self._name(names[-1], tokens, at) if self.shares and (at + 1) * self.page < len(tokens) else None

    def grow(self, sequence: str, past: int, count: int) -> None:
        """Take the blocks for `count` more tokens after `past`; what nobody holds is forgotten first come, first."""
        for kind in self.kinds:
            short = kind.needs_new_blocks(sequence, past, count) - self.cache.pool.count_free_blocks(kind.index)
            if short > 0:
                self._forget(kind, short)
            kind.allocate_cache_to_request(sequence, past, count)

    def written(self, sequence: str, tokens: list[int], total: int) -> None:
        """Let others share the blocks that the first `total` tokens of a sequence have filled."""
        if not self.shares:
            return
        (kind,), names = self.kinds, self._names[sequence]
        table, ledger = kind.block_table[sequence], kind.ledger
        while len(names) - 1 < total // self.page:
            at = len(names) - 1
            names.append(self._name(names[-1], tokens, at))
            twin, block = ledger.register_new_hash(table[at], names[-1]), table[at]
            if twin is not None:  # computed twice at the same time: keep one
                ledger.acquire(twin)
                table[at] = twin
                if ledger.release(block):
                    self.cache.pool.free_blocks(kind.index, [block])

    def close(self, sequence: str) -> None:
        """Give back what a sequence holds; full blocks stay to be found until their memory is needed."""
        self._reserved.pop(sequence, None)
        self._names.pop(sequence, None)
        for kind in self.kinds:
            # the end of a text is forgotten before its beginning, without which it cannot be found
            blocks = reversed(kind.block_table.pop(sequence, []))
            self.cache.pool.free_blocks(kind.index, [block for block in blocks if kind.ledger.release(block)])

    def held(self) -> int:
        """Return how many blocks sequences hold; shared ones count once."""
        return sum(len(set().union(*kind.block_table.values())) for kind in self.kinds)

    def kept(self) -> int:
        """Return how many blocks nobody holds but that can be found."""
        return sum(len(kind.ledger.cached_blocks) for kind in self.kinds)

    def _name(self, before: bytes, tokens: list[int], at: int) -> bytes:
        page = array("q", tokens[at * self.page : (at + 1) * self.page]).tobytes()
        return hashlib.blake2b(before + page, digest_size=16, key=self._secret).digest()

    def _forget(self, kind: Any, count: int) -> None:
        ledger = kind.ledger
        oldest = list(islice(ledger.cached_blocks, count))
        for block in oldest:
            del ledger.cached_blocks[block], ledger.hash_to_block[ledger.block_to_hash.pop(block)]
        self.cache.pool.free_blocks(kind.index, oldest)

    # --- a forward ------------------------------------------------------------------------------------------------

    def places(self, kind: Any, sequence: str, past: int, count: int) -> tuple[list[int], list[int]]:
        """Return where the keys are that the `count` tokens after `past` see, in order, and where their own go."""
        return kind.get_read_indices(sequence, past, count), kind.get_write_indices(sequence, past, count)

    def update(self, layer: int, keys: Tensor, values: Tensor, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (T, heads, width) of a layer; return those at `read`, new ones among them."""
        return self.by_layer[layer].update(keys, values, layer, read, write)


def _window(kind: Any) -> int | None:
    """Return how many tokens the layers of a kind look back at; None: all."""
    return getattr(kind, "sliding_window", None)
