"""hf-simple gives every request what it gets alone, on every kind of model, within its memory."""

import dataclasses

import peft
import pytest
import torch

from molora.serve.engine.engine import Engine
from molora.serve.request import Base, Mixture, Request, Sampling, Weighted
from tests import tiny
from tests.serve.kinds import GREEDY, MODELS, answers
from tests.serve.loras import LLAMA, generated, make_loras, make_mixture, make_store, prompts_of


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_in_one_batch_are_single_runs(kind):
    (make, targets), count = MODELS[kind], 16 if kind == "llama" else 5
    base = make()
    loras = make_loras(base, targets, count, ranks=(4, 8))
    store = make_store(base, loras, targets=targets)
    engine = Engine(
        store.model, tiny.tiny_tokenizer(), store, backend="hf-simple", kv_bytes=1 << 21, max_batch=count + 1
    )
    try:
        prompts = prompts_of(count + 1)
        limits = [3 + 2 * (i % 4) for i in range(count + 1)]  # rows leave at different times
        asked = [dataclasses.replace(GREEDY, max_tokens=limit) for limit in limits]
        programs = [*(Weighted(((f"a{i}", 1.0),)) for i in range(count)), Base()]
        found = answers(engine, [Request(*one) for one in zip(prompts, programs, asked, strict=True)])
        expected = []
        for i in range(count):
            loras.set_adapter(f"a{i}")
            expected.append(generated(loras, prompts[i], limits[i]))
        expected.append(generated(base, prompts[count], limits[count]))
        assert found == expected
        alone = [generated(base, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        assert sum(one != other for one, other in zip(found, alone, strict=True)) > count / 2  # they act
        stats = engine.stats()
        assert stats.running == stats.waiting == stats.kv_used == 0
        assert stats.tokens_out == sum(limits) and stats.tokens_in == sum(map(len, prompts))
    finally:
        engine.close()
        store.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return a base model, LoRAs, a store that has them and mixtures, and the mixtures alone."""
    base, folder = tiny.tiny_llama(), tmp_path_factory.mktemp("mixtures")
    loras = make_loras(base, LLAMA, count=4, ranks=(4, 8))
    store = make_store(base, loras, mixtures=4)
    mixtures = {}
    for number, (name, changes) in enumerate(
        {"m0": {}, "m1": {}, "whole": {"granularity": "prompt"}, "smeared": {"feature": "mean"}}.items()
    ):
        changes = {} if name == "smeared" else changes
        mixtures[name], where = make_mixture(base, folder / name, LLAMA, seed=number + 5, **changes)
        store.register(name, where)
    yield base, loras, store, mixtures
    store.close()


@pytest.fixture
def engine(llama):
    store = llama[2]
    made = Engine(store.model, tiny.tiny_tokenizer(), store, backend="hf-simple", kv_bytes=1 << 20, max_batch=16)
    yield made
    made.close()


def test_mixtures_of_several_kinds_share_a_batch_with_adapters(engine, llama):
    base, loras, store, mixtures = llama
    prompts = prompts_of(12, seed=3)
    programs = [Mixture(name) for name in mixtures] * 2
    programs += [Weighted((("a0", 1.0),)), Weighted((("a1", 1.0),)), Base(), Base()]
    asked = [dataclasses.replace(GREEDY, max_tokens=4 + i % 5) for i in range(12)]
    answers(engine, [Request([5], Mixture(name), asked[0]) for name in mixtures])  # all are in the model
    found = answers(engine, [Request(*one) for one in zip(prompts, programs, asked, strict=True)])
    for tokens, prompt, program, sampling in zip(found, prompts, programs, asked, strict=True):
        model = base
        if isinstance(program, Weighted):
            model = loras
            loras.set_adapter(program.names[0])
        elif isinstance(program, Mixture):
            model = mixtures[program.name]
        assert tokens == generated(model, prompt, sampling.max_tokens), program
    assert all(entry.in_use == 0 for entry in store.entries())


def test_a_weighted_mix_is_the_weighted_sum_of_deltas(engine, llama):
    loras = llama[1]
    mixes = [(("a0", 0.7), ("a1", 0.3)), (("a2", -0.5), ("a0", 1.5), ("a3", 0.25)), (("a1", 0.5),), (("a1", 0.0),)]
    prompts = prompts_of(len(mixes), seed=4)
    found = answers(engine, [Request(ids, Weighted(mix), GREEDY) for ids, mix in zip(prompts, mixes, strict=True)])
    for number, (mix, prompt, tokens) in enumerate(zip(mixes, prompts, found, strict=True)):
        names, weights = [name for name, _ in mix], [weight for _, weight in mix]
        if min(weights) > 0:
            loras.add_weighted_adapter(names, weights, f"mix{number}", combination_type="cat")
        else:  # PEFT takes square roots of weights; so the deltas are added by hand
            merged = delta_sum(llama[0], loras, dict(mix))
            assert tokens == generated(merged, prompt, 8)
            continue
        loras.set_adapter(f"mix{number}")
        assert tokens == generated(loras, prompt, 8)
        loras.delete_adapter(f"mix{number}")


def delta_sum(base, loras, weights):
    """Return the base model with the weighted deltas of PEFT's own layers added to its weights."""
    import copy

    merged = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in loras.get_base_model().named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                for name, weight in weights.items():
                    merged.get_submodule(path).weight += weight * layer.get_delta_weight(name)
    return merged


def test_penalties_and_minimum_length_are_those_of_generate(engine, llama):
    base, prompt = llama[0], [7, 8, 9, 8]
    plain = Sampling(temperature=0.0, max_tokens=12)
    penalised = dataclasses.replace(plain, repetition_penalty=1.7)
    found = answers(engine, [Request(prompt, Base(), one) for one in (plain, penalised)])
    assert found[0] == generated(base, prompt, 12, eos_token_id=tiny.EOS)
    assert found[1] == generated(base, prompt, 12, eos_token_id=tiny.EOS, repetition_penalty=1.7)
    assert found[0] != found[1]
    ends = found[0][2]  # let one of its tokens be the end of the text
    short, long = answers(
        engine,
        [
            Request(prompt, Base(), dataclasses.replace(plain, stop_token_ids=(ends,))),
            Request(prompt, Base(), dataclasses.replace(plain, stop_token_ids=(ends,), min_tokens=6)),
        ],
    )
    assert short == generated(base, prompt, 12, eos_token_id=[tiny.EOS, ends])
    assert long == generated(base, prompt, 12, eos_token_id=[tiny.EOS, ends], min_new_tokens=6)
    assert len(short) <= 3 < 6 < len(long)
