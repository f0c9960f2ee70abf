"""What hf-cb takes from transformers, which models it can serve, and how much memory it takes."""

import inspect
import math
import re
from pathlib import Path

import packaging.version
import pytest
import torch
import transformers as tf

from molora.errors import ConfigError
from molora.serve.backends import attention, packed, paged
from molora.serve.backends.continuous import Continuous
from molora.serve.engine.engine import Engine
from molora.serve.request import Base, Request
from tests import tiny
from tests.serve.kinds import GREEDY
from tests.serve.test_continuous import generated, job, prompt, run

NEW_ENOUGH = packaging.version.parse(tf.__version__) >= packaging.version.parse("5.23")
needs_paging = pytest.mark.skipif(not NEW_ENOUGH, reason="this transformers is older than the paged cache of 5.23")

#: The parameters that are passed, by name; where one is gone or another must be given, transformers has changed.
CALLED = {
    "cache:group_layers_by_attn_type": ["config"],
    "utils:find_num_key_value_heads": ["config"],
    "utils:find_head_dim": ["config"],
    "cache_allocators.cache_pool:CachePool.allocate_sector": ["self", "index"],
    "cache_allocators.cache_pool:CachePool.free_blocks": ["self", "index", "block_ids"],
    "cache_allocators.cache_pool:CachePool.count_free_blocks": ["self", "index"],
    "cache_allocators.cache_allocator:CacheAllocator.needs_new_blocks": [
        "self",
        "request_id",
        "past_length",
        "query_length",
    ],
    "cache_allocators.cache_allocator:CacheAllocator.allocate_cache_to_request": [
        "self",
        "request_id",
        "past_length",
        "query_length",
    ],
    "cache_allocators.cache_allocator:CacheAllocator.get_read_indices": [
        "self",
        "request_id",
        "past_length",
        "query_length",
    ],
    "cache_allocators.cache_allocator:CacheAllocator.get_write_indices": [
        "self",
        "request_id",
        "past_length",
        "query_length",
    ],
    "cache_allocators.cache_allocator:CacheAllocator.update": [
        "self",
        "key_states",
        "value_states",
        "layer_idx",
        "read_index",
        "write_index",
    ],
    "cache_allocators.cache_allocator:BlockLedger.acquire": ["self", "block_id"],
    "cache_allocators.cache_allocator:BlockLedger.release": ["self", "block_id", "no_cache"],
    "cache_allocators.cache_allocator:BlockLedger.register_new_hash": ["self", "block_id", "block_hash"],
}


# --- what is taken from transformers ------------------------------------------------------------------------------


@needs_paging
def test_transformers_has_what_is_taken_from_it():
    assert paged.missing() is None, "transformers has changed: look at backends/paged.py, and at its upper bound"
    found = {name: list(inspect.signature(paged._taken(name)).parameters) for name in CALLED}
    assert found == CALLED
    assert set(paged.PRIVATE) - CALLED.keys() == {"cache:PagedAttentionCache"}


@needs_paging
def test_the_cache_has_the_parts_that_are_read():
    pages = paged.Pages(tiny.tiny_llama().config, torch.float32, torch.device("cpu"), 1 << 16, places=2, page=4)
    for part in ("cache_allocators", "layer_to_allocator", "use_prefix_sharing", "cache_tensor", "pool"):
        assert hasattr(pages.cache, part), part
    assert pages.cache.pool.num_free_sectors == 0  # all are handed out
    (kind,) = pages.kinds
    for part in ("index", "block_table", "ledger", "blocks_per_sector", "read_trash_index"):
        assert hasattr(kind, part), part
    for part in ("hash_to_block", "block_to_hash", "cached_blocks"):
        assert getattr(kind.ledger, part) == {}, part


def test_private_names_are_taken_in_one_file_only():
    root = Path(packed.__file__).parents[1]
    users = {path.name for path in root.rglob("*.py") if "continuous_batching" in path.read_text(encoding="utf-8")}
    assert users == {"paged.py"}


def test_another_release_makes_hf_cb_step_back(monkeypatch):
    monkeypatch.setitem(paged.PRIVATE, "cache:PagedAttentionCache.forgotten", "for this test")
    reason = packed.why_not(tiny.tiny_llama())
    assert f"transformers {tf.__version__} has no" in reason and "cache.PagedAttentionCache.forgotten" in reason
    with pytest.raises(ConfigError, match=r"hf-cb cannot run this model: transformers .* use backend hf-simple"):
        Continuous(tiny.tiny_llama(), 1 << 20)


# --- models -------------------------------------------------------------------------------------------------------


def _mistral(window):
    options = dict(vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return tiny._build(tf.MistralForCausalLM, tf.MistralConfig(**options, **heads, sliding_window=window), seed=0)


def _gemma(window, **changes):
    options = dict(vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, **tiny.SPECIAL, **changes)
    return tiny._build(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**options, **heads, sliding_window=window), seed=0)


@needs_paging
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny.tiny_t5, "T5ForConditionalGeneration has an encoder"),
        (tiny.tiny_bert_classifier, "BertForSequenceClassification does not generate text"),
        (tiny.tiny_vit_classifier, "ViTForImageClassification does not generate text"),
        (tiny.tiny_mamba, "MambaForCausalLM keeps a state for each sequence"),
        (lambda: tiny.tiny_llama(attn_implementation="eager"), "attends by 'eager'.*attn_implementation='sdpa'"),
        (
            lambda: tiny.tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            "rotary positions of LlamaForCausalLM follow the longest",
        ),
    ],
)
def test_models_that_cannot_be_paged_are_told_why(build, reason):
    model = build()
    before = model.config._attn_implementation
    told = packed.why_not(model)
    assert told is not None and re.search(reason, told), told
    assert model.config._attn_implementation == before


@needs_paging
def test_a_model_that_computes_something_else_when_packed_is_found_out(monkeypatch):
    attend = attention.Packed.attend
    monkeypatch.setattr(attention.Packed, "attend", lambda self, *args: attend(self, *args) * 1.5)
    assert "in a packed batch are not those of a plain forward" in packed.why_not(tiny.tiny_llama())

    def fail(self, *args):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(attention.Packed, "attend", fail)
    assert packed.why_not(tiny.tiny_llama()) == (
        "LlamaForCausalLM failed on a packed batch: RuntimeError: no such layer"
    )


@needs_paging
@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_gpt2, lambda: _mistral(6), lambda: _gemma(6)])
def test_answers_of_many_kinds_of_attention_are_those_of_generate(build):
    model = build()
    assert packed.why_not(model) is None
    sizes = paged.bytes_per_block(model.config, torch.float32, 4)
    memory = math.lcm(*sizes.values(), 128) * 40  # so little that jobs wait for blocks
    backend = Continuous(model, memory, places=4, batch_tokens=9, page=4)
    jobs = [job(Base(), prompt(2 + 5 * i % 23, seed=i), limit=3 + i % 9) for i in range(12)]
    run(backend, jobs, most=2000)
    assert backend.pages.held() == 0 and backend.room() == backend.capacity
    backend.close()
    for done in jobs:
        assert done.drawn == generated(model, done.prompt_ids, done.limit)


@needs_paging
def test_half_precision_passes_the_trial():
    assert packed.why_not(tiny.tiny_llama().to(torch.bfloat16)) is None


@needs_paging
def test_a_window_overwrites_its_blocks_so_prefixes_are_not_shared():
    backend = Continuous(_mistral(6), 1 << 18, places=2, page=4)
    ids = prompt(20, seed=1)
    for _ in range(2):
        done = job(Base(), ids)
        run(backend, [done])
        assert done.cached == 0
    assert not backend.pages.shares and backend.pages.kept() == 0


# --- memory -------------------------------------------------------------------------------------------------------


@needs_paging
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [4, 16])
def test_the_cache_takes_what_it_was_given_and_no_more(dtype, page):
    layers, heads, width, given = 3, 2, 8, 200_000
    config = tiny.tiny_llama(num_hidden_layers=layers).config
    block = 2 * layers * heads * width * page * dtype.itemsize
    assert paged.bytes_per_block(config, dtype, page) == {"full_attention": block}
    pages = paged.Pages(config, dtype, torch.device("cpu"), given, places=4, page=page)
    assert given - block < pages.bytes <= given and pages.bytes % block == 0
    assert pages.blocks == [pages.bytes // block - 2]  # two stay empty, for padding
    assert pages.capacity == pages.room == pages.blocks[0] * page


@needs_paging
def test_layers_with_a_window_get_what_their_window_needs_and_the_rest_goes_to_the_others():
    config = _gemma(8).config  # five layers with a window, one without
    sizes = paged.bytes_per_block(config, torch.float32, 4)
    assert sizes == {"sliding_attention": 5 * 2 * 2 * 8 * 4 * 4, "full_attention": 2 * 2 * 8 * 4 * 4}
    pages = paged.Pages(config, torch.float32, torch.device("cpu"), 1 << 18, places=4, page=4)
    blocks = {kind.layer_type: blocks for kind, blocks in zip(pages.kinds, pages.blocks, strict=True)}
    assert blocks["sliding_attention"] == 4 * 2  # four places, windows of two pages
    assert pages.capacity == blocks["full_attention"] * 4 > 8 * 4
    taken = sum(blocks[kind] * sizes[kind] for kind in blocks)
    assert taken <= pages.bytes <= 1 << 18
    assert taken > 0.8 * (1 << 18)


@needs_paging
@pytest.mark.parametrize("places", [1, 3])
def test_where_all_layers_have_windows_the_capacity_is_what_the_blocks_hold(places):
    """A sequence of any length fits, but what there is room for is finite, and what is taken never exceeds it."""
    window, page = 6, 4
    model = _mistral(window)
    size = paged.bytes_per_block(model.config, torch.float32, page)["sliding_attention"]
    backend = Continuous(model, size * 12, places=places, page=page)  # two blocks stay empty
    assert backend.capacity == backend.room() == 10 * page == backend.pages.bytes // size * page - 2 * page
    assert backend.longest > 1_000_000  # no answer is refused for its length
    long = job(Base(), prompt(50, seed=1), limit=30)
    assert long.need > backend.capacity and backend.fits(long)
    backend.start(long)
    taken = math.ceil(window / page) * page  # a window, and no more
    assert (backend.used(), backend.room()) == (taken, backend.capacity - taken)
    others = [job(Base(), prompt(40, seed=seed), limit=2) for seed in range(2, 2 + 8)]
    for other in others:
        if backend.fits(other):
            backend.start(other)
    assert len(backend.running()) == min(places, 5)  # five windows of two blocks
    assert backend.used() + backend.room() == backend.capacity
    backend.close()
    assert backend.room() == backend.capacity


@needs_paging
def test_an_engine_reports_the_memory_of_windows_and_answers_beyond_it():
    model = _mistral(6)
    made = Engine(model, tiny.tiny_tokenizer(), backend="hf-cb", kv_bytes=1 << 16, max_batch=2, max_length=4000)
    try:
        capacity = made.stats().kv_capacity
        size = paged.bytes_per_block(model.config, torch.float32, 16)["sliding_attention"]
        assert capacity == ((1 << 16) // size - 2) * 16 < 4000
        assert made.report == [f"hf-cb: {capacity} tokens of keys and values"]
        assert made.longest == 4000  # as long as the model reads
        ids = prompt(capacity + 5, seed=3)
        drawn = made.submit(Request(ids, Base(), GREEDY)).result()[1]
        assert drawn.usage.prompt == capacity + 5 and drawn.usage.completion == GREEDY.max_tokens
    finally:
        made.close()


@needs_paging
@pytest.mark.parametrize("full", [1, 2, 3])
@pytest.mark.parametrize("sectors", [4, 5, 6, 9, 17])
def test_every_kind_of_layers_gets_blocks_of_the_smallest_memory(full, sectors):
    kinds = ["full_attention"] * full + ["sliding_attention"] * (6 - full)
    config = _gemma(64, layer_types=kinds).config
    sizes = paged.bytes_per_block(config, torch.float32, 4)
    sector = math.lcm(*sizes.values(), 128)
    pages = paged.Pages(config, torch.float32, torch.device("cpu"), sector * (2 + sectors), places=2, page=4)
    assert min(pages.blocks) >= 1 and pages.capacity >= 4
    assert sum(blocks * sizes[kind.layer_type] for kind, blocks in zip(pages.kinds, pages.blocks, strict=True)) <= (
        pages.bytes - 2 * sector
    )
