"""hf-cb gives every request what it gets alone, in whatever company, over a cache of a fixed size."""

import copy
import hashlib
from types import SimpleNamespace

import peft
import pytest
import torch

import molora
from molora.errors import ConfigError
from molora.serve.backends.continuous import Continuous
from molora.serve.engine.jobs import Job, salt_of
from molora.serve.engine.sampling import Sampler
from molora.serve.request import Base, Mixture, Request, Sampling, ServeError, Weighted
from tests import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = [f"a{i}" for i in range(16)]
MIXTURES = {"m0": "mixtral", "m1": "mixtral"}
NEW = 8
PAGE = 4


@pytest.fixture(scope="module")
def loras():
    """Return a PEFT model with sixteen LoRAs, whose effect is large."""
    model = peft.get_peft_model(
        tiny.tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), adapter_name="a0"
    )
    for name in ADAPTERS[1:]:
        model.add_adapter(name, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def served(loras):
    """Return the same LoRAs in the slots of one molora adapter, and two routed mixtures beside it."""
    model = molora.wrap(
        tiny.tiny_llama(),
        {
            "experts": {"num": 16, "rank": 4, "alpha": 8},
            "scorer": {"name": "constant", "learn": False},
            "selector": "softmax",
            "target_modules": TARGETS,
        },
        adapter_name="slots",
    )
    for name, recipe in MIXTURES.items():
        model.add_adapter(name, molora.MoloraConfig.from_recipe(recipe, target_modules=TARGETS))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora" in name:
                parameter.normal_(std=0.3)
    for slot, name in enumerate(ADAPTERS):
        pairs = {
            path.removeprefix("base_model.model."): (layer.lora_A[name].weight, layer.lora_B[name].weight)
            for path, layer in loras.named_modules()
            if hasattr(layer, "lora_A")
        }
        molora.control.write_expert(model, slot, pairs, 2.0, adapter="slots")
    return model.eval()


@pytest.fixture
def backend(served):
    """Return a backend of sixteen places over blocks of four tokens."""
    made = Continuous(served, kv_bytes=1 << 20, places=16, batch_tokens=64, page=PAGE)
    yield made
    made.close()


def prompt(length, seed):
    return torch.randint(4, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def job(program, prompt_ids, limit=NEW, versions=None, **asked):
    """Return a job of an adapter, a mix, a mixture or the base, as an engine makes it."""
    sampling = Sampling(**({"temperature": 0.0, "ignore_eos": True} | asked))
    request = Request(prompt_ids, program, sampling)
    names = [*ADAPTERS, *MIXTURES]
    rows = {name: ("slots", slot) for slot, name in enumerate(ADAPTERS)} | {name: (name, None) for name in MIXTURES}
    digests = {name: hashlib.blake2b((name + (versions or {}).get(name, "")).encode()).hexdigest() for name in names}
    return Job(
        request,
        SimpleNamespace(put=lambda chunk: None),
        Sampler(sampling, prompt_ids, [tiny.EOS]),
        SimpleNamespace(feed=lambda token, may_stop: "", flush=lambda: "", stopped=False),
        limit,
        program,
        lease=SimpleNamespace(rows=rows, digests=digests, release=lambda: None),
        salt=salt_of(program, digests),
    )


def run(backend, jobs, most=400):
    """Start jobs as there is room, as an engine does, until all have ended; return the sizes of the forwards."""
    waiting, sizes = list(jobs), []
    for _ in range(most):
        while waiting and backend.fits(waiting[0]):
            backend.start(waiting.pop(0))
        sizes.append(len(backend.running()))
        for event in backend.step():
            assert event.error is None
            event.job.feed(event.token)
            if event.job.finish:
                backend.cancel(event.job)
        if not waiting and not backend.running():
            return sizes
    raise AssertionError("the jobs did not end")


def generated(model, prompt_ids, limit=NEW):
    """Return what transformers generates greedily, whatever the end-of-text token."""
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=None,
            pad_token_id=tiny.PAD,
        )
    return out[0, len(prompt_ids) :].tolist()


def one(name):
    return Weighted(((name, 1.0),))


# --- equality -----------------------------------------------------------------------------------------------------


def test_sixteen_adapters_in_one_batch_are_sixteen_single_runs(backend, loras):
    prompts = [prompt(3 + 2 * i, seed=i) for i in range(16)]
    jobs = [job(one(name), ids) for name, ids in zip(ADAPTERS, prompts, strict=True)]
    sizes = run(backend, jobs)
    assert max(sizes) == 16
    answers = []
    for name, ids, done in zip(ADAPTERS, prompts, jobs, strict=True):
        loras.set_adapter(name)
        answers.append(generated(loras, ids))
        assert done.drawn == answers[-1], name
    same = [generated(loras, ids) for ids in prompts]  # all by the last adapter
    assert sum(a != b for a, b in zip(answers[:-1], same[:-1], strict=True)) > 10  # the adapters matter


def test_mixtures_mixes_adapters_and_the_base_share_a_packed_row(backend, served, loras):
    mix = (("a2", 0.7), ("a5", -0.4), ("a9", 1.3))
    programs = [Mixture("m0"), Base(), Weighted(mix), Mixture("m1"), one("a3"), Mixture("m0")]
    prompts = [prompt(5 + 3 * i, seed=40 + i) for i in range(len(programs))]
    jobs = [job(program, ids) for program, ids in zip(programs, prompts, strict=True)]
    run(backend, jobs)
    backend.close()

    expected = []
    for program, ids in zip(programs, prompts, strict=True):
        if isinstance(program, Mixture):
            served.set_adapter(program.name)
            expected.append(generated(served, ids))
        elif isinstance(program, Base):
            with loras.disable_adapter():
                expected.append(generated(loras, ids))
        else:
            names, weights = zip(*program.weights, strict=True)
            if len(names) > 1:  # PEFT's exact way: ranks side by side
                loras.add_weighted_adapter(list(names), list(weights), "mix", combination_type="cat")
            loras.set_adapter("mix" if len(names) > 1 else names[0])
            expected.append(generated(loras, ids))
            loras.set_adapter("a0")
            if len(names) > 1:
                loras.delete_adapter("mix")
    assert [done.drawn for done in jobs] == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


def test_a_long_prompt_is_read_in_pieces_while_others_answer(served, loras):
    backend = Continuous(served, kv_bytes=1 << 20, places=4, batch_tokens=16, page=PAGE)
    quick = [job(one(f"a{i}"), prompt(4, seed=i), limit=20) for i in range(3)]
    for made in quick:
        backend.start(made)
    for event in backend.step():
        event.job.feed(event.token)
    long = job(Mixture("m1"), prompt(100, seed=9))
    backend.start(long)
    meanwhile = 0
    while not long.drawn:
        events = backend.step()
        meanwhile += sum(event.job is not long for event in events)
        for event in events:
            event.job.feed(event.token)
    assert meanwhile == 3 * 8  # 13 tokens of the prompt fit beside three answers: 8 steps
    run(backend, [])
    backend.close()
    served.set_adapter("m1")
    assert long.drawn == generated(served, long.prompt_ids)
    for i, done in enumerate(quick):
        loras.set_adapter(f"a{i}")
        assert done.drawn == generated(loras, done.prompt_ids, 20)


def test_many_requests_pass_through_few_places(served, loras):
    backend = Continuous(served, kv_bytes=1 << 20, places=8, batch_tokens=32, page=PAGE)
    jobs = [job(one(ADAPTERS[i % 16]), prompt(2 + i % 9, seed=i % 5), limit=2 + i % 7) for i in range(64)]
    sizes = run(backend, jobs)
    assert max(sizes) == 8
    assert backend.pages.held() == 0 and backend.used() == 0
    backend.close()
    for done in jobs[:16] + jobs[40:]:
        loras.set_adapter(done.program.names[0])
        assert done.drawn == generated(loras, done.prompt_ids, done.limit)


# --- ends ---------------------------------------------------------------------------------------------------------


def test_a_token_that_ends_the_answer_frees_its_blocks(backend, loras):
    loras.set_adapter("a4")
    ids = prompt(6, seed=3)
    answer = generated(loras, ids)
    ends_at = next(i for i in range(1, NEW) if answer[i] not in answer[:i])
    done = job(one("a4"), ids, stop_token_ids=(answer[ends_at],))
    other = job(Base(), prompt(5, seed=4))
    run(backend, [done, other])
    assert done.finish == "stop" and done.drawn == answer[: ends_at + 1]
    assert other.finish == "length" and len(other.drawn) == NEW
    assert backend.pages.held() == 0


def test_cancelling_midway_frees_blocks_and_disturbs_nobody(backend, loras):
    leaver, stayer = job(one("a1"), prompt(30, seed=1), limit=50), job(one("a2"), prompt(7, seed=2))
    backend.start(leaver)
    backend.start(stayer)
    for _ in range(3):
        for event in backend.step():
            event.job.feed(event.token)
    before, room = backend.pages.held(), backend.room()
    backend.cancel(leaver)
    assert backend.pages.held() <= before - 8 and backend.room() >= room + 80
    assert backend.running() == [stayer]
    backend.cancel(leaver)  # unknown now
    run(backend, [])
    loras.set_adapter("a2")
    assert stayer.drawn == generated(loras, stayer.prompt_ids)


def test_sampling_depends_on_the_seed_and_not_on_the_company(backend):
    asked = {"temperature": 1.5, "seed": 7}
    alone = job(one("a6"), prompt(6, seed=6), **asked)
    run(backend, [alone])
    among = job(one("a6"), prompt(6, seed=6), **asked)
    run(backend, [job(Mixture("m0"), prompt(9, seed=1), temperature=0.7), among, job(Base(), prompt(4, seed=2))])
    other = job(one("a6"), prompt(6, seed=6), temperature=1.5, seed=8)
    run(backend, [other])
    assert among.drawn == alone.drawn != other.drawn


def test_a_request_whose_numbers_overflow_disturbs_nobody(backend, served, loras):
    layers = molora.control.routed_layers(served, "slots")
    layer = next(layer for path, layer in layers.items() if path.endswith("0.mlp.down_proj"))
    experts = layer.molora_bank["slots"]._parameters["Bt"]
    with torch.no_grad():
        rows = experts[15 * 4 : 16 * 4]  # of the last adapter
        kept = rows.clone()
        rows.fill_(torch.inf)
    try:
        ill, well, late = job(one("a15"), prompt(26, seed=1)), job(one("a1"), prompt(7, seed=2)), job(Base(), [5, 6, 7])
        for made in (ill, well):
            backend.start(made)
        (first, second) = backend.step()
        assert first.job is ill and first.token is None and first.error.code == "not_finite"
        assert second.job is well and second.error is None
        well.feed(second.token)
        backend.cancel(ill)
        backend.start(late)  # which gets the blocks that the bad numbers were in
        run(backend, [])
    finally:
        with torch.no_grad():
            rows.copy_(kept)
    loras.set_adapter("a1")
    assert well.drawn == generated(loras, well.prompt_ids)
    with loras.disable_adapter():
        assert late.drawn == generated(loras, late.prompt_ids)


def test_a_forward_that_fails_leaves_nothing_behind(backend, served, monkeypatch, loras):
    jobs = [job(one("a1"), prompt(9, seed=1)), job(one("a2"), prompt(5, seed=2))]
    for made in jobs:
        backend.start(made)

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as broken:
        broken.setattr(backend._reader, "model", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            backend.step()
    assert molora.control.trace_of(served).rows is None
    for made in jobs:
        backend.cancel(made)
    assert backend.pages.held() == 0 and backend.room() == backend.capacity and backend.step() == []
    again = job(one("a1"), jobs[0].prompt_ids)
    run(backend, [again])
    loras.set_adapter("a1")
    assert again.cached == 0 and again.drawn == generated(loras, again.prompt_ids)


# --- the prefix cache ---------------------------------------------------------------------------------------------


def after(backend, program, ids, **more):
    """Return how many tokens of a prompt were found in the cache, having answered it."""
    done = job(program, ids, **more)
    run(backend, [done])
    assert done.usage.cached == done.cached
    return done.cached, done.drawn


def test_adapters_never_share_keys_and_each_finds_its_own(backend, loras):
    ids = prompt(22, seed=5)
    programs = [one("a0"), one("a1"), Base(), Weighted((("a0", 0.5),)), Mixture("m0"), Mixture("m1")]
    first = [after(backend, program, ids) for program in programs]
    assert [found for found, _ in first] == [0] * len(programs)
    again = [after(backend, program, ids) for program in programs]
    assert [found for found, _ in again] == [20] * len(programs)  # five blocks of four; the last tokens are computed
    assert [answer for _, answer in again] == [answer for _, answer in first]
    assert backend.pages.reused == 20 * len(programs)
    loras.set_adapter("a1")
    assert again[1][1] == generated(loras, ids)


def test_a_new_version_of_an_adapter_or_mixture_finds_nothing(backend):
    ids = prompt(21, seed=8)
    for program, name in ((one("a7"), "a7"), (Mixture("m1"), "m1")):
        assert after(backend, program, ids)[0] == 0
        assert after(backend, program, ids)[0] == 20
        assert after(backend, program, ids, versions={name: "2"})[0] == 0
        assert after(backend, program, ids, versions={name: "2"})[0] == 20


def test_a_shared_beginning_is_reused_and_the_rest_is_not(backend, loras):
    common = prompt(12, seed=1)
    run(backend, [job(one("a8"), common + prompt(9, seed=2))])
    done = job(one("a8"), common + prompt(7, seed=3))
    run(backend, [done])
    assert done.cached == 12
    loras.set_adapter("a8")
    assert done.drawn == generated(loras, done.prompt_ids)


def test_requests_that_come_at_once_are_computed_once(backend, loras):
    ids = prompt(20, seed=12)
    jobs = [job(one("a3"), ids), job(one("a3"), ids), job(one("a4"), ids), job(one("a3"), ids[:17] + ids[:5])]
    for made in jobs:
        backend.start(made)
    assert [event.job for event in backend.step()] == [jobs[0], jobs[2]]  # the others wait for the first one's blocks
    assert backend.pages.held() == 10
    events = backend.step()
    assert {event.job.id for event in events} == {made.id for made in jobs}
    assert [made.cached for made in jobs] == [0, 16, 0, 16]
    assert backend.pages.held() == 6 + 6 + 0 + 2  # what each has begun or differs in; all else is held once
    for made in jobs:
        backend.cancel(made)
    assert backend.pages.held() == 0

    jobs = [job(one("a3"), ids), job(one("a3"), ids), job(one("a4"), ids), job(one("a3"), ids[:17] + ids[:5])]
    run(backend, jobs)
    for done in jobs:
        loras.set_adapter(done.program.names[0])
        assert done.drawn == generated(loras, done.prompt_ids)


def test_equal_blocks_that_were_computed_twice_are_kept_once(served):
    pages = Continuous(served, 1 << 16, places=2, page=PAGE)
    pages.close()
    pages = pages.pages
    for name in ("first", "second"):
        pages.open(name, b"salt", 20)
        pages.grow(name, 0, 10)
    assert pages.held() == 6
    for name in ("first", "second"):
        pages.written(name, list(range(10)), 10)
    assert pages.held() == 4  # two blocks are full and shared, one is each one's own
    free = pages.cache.pool.count_free_blocks(0)
    pages.close("first")
    assert pages.held() == 3 and pages.kept() == 0
    pages.close("second")
    assert pages.held() == 0 and pages.kept() == 2
    assert pages.cache.pool.count_free_blocks(0) == free + 2
    pages.open("third", b"pepper", 20)
    assert pages.find("third", list(range(10)), 0) == 0
    pages.open("fourth", b"salt", 20)
    assert pages.find("fourth", list(range(10)), 0) == 8


# --- memory -------------------------------------------------------------------------------------------------------


def test_jobs_never_run_out_of_blocks_and_old_prefixes_give_way(served):
    config = served.get_base_model().config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * (32 // 4) * 4
    backend = Continuous(served, kv_bytes=per_token * PAGE * (2 + 24), places=16, batch_tokens=32, page=PAGE)
    assert backend.capacity == 24 * PAGE
    jobs = [job(one(ADAPTERS[i % 5]), prompt(4 + i % 20, seed=i), limit=5 + i % 30) for i in range(30)]
    sizes = run(backend, jobs, most=2000)
    assert all(len(done.drawn) == done.limit for done in jobs)
    assert 2 <= max(sizes) < 16  # memory, not places, was short
    assert backend.pages.held() == 0 and backend.pages.kept() <= 24
    assert backend.room() == backend.capacity  # what is kept for reuse stands in nobody's way
    backend.close()


def test_what_does_not_fit_is_refused(served):
    backend = Continuous(served, kv_bytes=1 << 16, places=2, batch_tokens=8, page=PAGE)
    with pytest.raises(ServeError, match=rf"needs {backend.capacity + 1} tokens.*of {backend.capacity}") as refused:
        backend.start(job(Base(), prompt(backend.capacity, seed=0), limit=1))
    assert refused.value.status == 400
    backend.start(job(Base(), prompt(5, seed=0), limit=backend.capacity - 5))
    assert backend.room() == 0 and not backend.fits(job(Base(), prompt(1, seed=0), limit=1))
    with pytest.raises(ServeError, match="1 of 2 places") as full:
        backend.start(job(Base(), prompt(5, seed=0)))
    assert full.value.status == 503
    backend.close()
    with pytest.raises(ConfigError, match=r"kv_bytes is 1,000.*give 3,072 or more"):
        Continuous(served, kv_bytes=1000, places=2, page=PAGE)
    with pytest.raises(ConfigError, match="places 9, batch_tokens 8"):
        Continuous(served, kv_bytes=1 << 16, places=9, batch_tokens=8)


def test_a_mixture_that_looks_at_other_tokens_is_refused(served):
    backend = Continuous(
        served, 1 << 16, places=2, page=PAGE, packed=lambda name: "it reads the whole prompt" if name == "m1" else None
    )
    assert backend.why_not(Mixture("m1")) == "mixture 'm1' cannot share a packed row: it reads the whole prompt"
    assert [backend.why_not(program) for program in (Mixture("m0"), one("a0"), Base())] == [None] * 3
    backend.close()


def test_closing_gives_the_model_its_attention_back(served):
    base = served.get_base_model()
    backend = Continuous(served, 1 << 16, places=2, page=PAGE)
    assert base.config._attn_implementation == "molora_packed"
    ids = torch.tensor([prompt(9, seed=0), prompt(9, seed=1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        while_open = base(input_ids=ids, attention_mask=mask).logits  # a plain forward between two steps
        backend.close()
        assert base.config._attn_implementation == "sdpa"
        assert torch.equal(while_open, base(input_ids=ids, attention_mask=mask).logits)
    assert copy.deepcopy(served) is not None  # nothing that cannot be copied stays in the model
