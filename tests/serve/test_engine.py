"""An engine serves many requests at once, on either backend: each gets its own answer, whatever the others do."""

import asyncio
import dataclasses
import threading

import pytest
import torch

import molora
from molora.errors import ConfigError
from molora.serve.engine.admission import settle
from molora.serve.engine.engine import Engine
from molora.serve.request import Auto, Base, Mixture, Request, Sampling, ServeError, Weighted, needs
from tests import tiny
from tests.serve.kinds import GREEDY, answers
from tests.serve.loras import LLAMA, generated, make_loras, make_mixture, make_store, prompts_of

WAIT = 30.0


def one(name):
    return Weighted(((name, 1.0),))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return a base model, LoRAs, a store that has them and two mixtures, and the mixtures alone."""
    base, folder = tiny.tiny_llama(), tmp_path_factory.mktemp("mixtures")
    loras = make_loras(base, LLAMA, ranks=(4, 8))
    store = make_store(base, loras, mixtures=4)
    mixtures = {}
    for name, changes in {"m0": {}, "whole": {"granularity": "prompt"}}.items():
        mixtures[name], where = make_mixture(base, folder / name, LLAMA, **changes)
        store.register(name, where)
    yield base, loras, store, mixtures
    store.close()


@pytest.fixture(params=["hf-simple", "auto"])
def backend(request):
    return request.param


@pytest.fixture
def engine(parts, backend):
    made = Engine(
        parts[2].model, tiny.tiny_tokenizer(), parts[2], backend=backend, kv_bytes=1 << 21, max_batch=20, timeout=WAIT
    )
    yield made
    made.close()


def expected_of(parts, request, limit=None):
    """Return what transformers generates alone."""
    base, loras, _, mixtures = parts
    model = base
    if isinstance(request.program, Weighted):
        loras.set_adapter(request.program.names[0])
        model = loras
    elif isinstance(request.program, Mixture):
        model = mixtures[request.program.name]
    return generated(model, request.prompt_ids, limit or request.sampling.max_tokens)


# --- equality -----------------------------------------------------------------------------------------------------


def test_a_batch_of_everything_equals_single_runs(engine, parts):
    programs = [*(one(f"a{i}") for i in range(16)), Mixture("m0"), Mixture("whole"), Mixture("whole"), Base()]
    prompts = prompts_of(len(programs))
    requests = [Request(ids, program, GREEDY) for ids, program in zip(prompts, programs, strict=True)]
    assert answers(engine, requests) == [expected_of(parts, request) for request in requests]
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.kv_used) == (0, 0, 0)
    assert stats.by_adapter == {name: 8 for name in [*(f"a{i}" for i in range(16)), "m0", "(base)"]} | {"whole": 16}
    assert stats.by_tenant == {"default": sum(map(len, prompts)) + 8 * len(prompts)}
    assert all(entry.in_use == 0 for entry in parts[2].entries())


def test_the_backend_is_chosen_by_the_model_and_said(engine, backend):
    if backend == "auto":
        assert engine.stats().backends == ("hf-cb", "hf-simple") and "beside it" in engine.report[1]
    mamba = Engine(tiny.tiny_mamba(), tiny.tiny_tokenizer(), kv_bytes=1 << 20)
    mamba.close()
    assert mamba.stats().backends == ("hf-simple",) and "Mamba" in mamba.report[0]
    with pytest.raises(ConfigError, match="use backend hf-simple"):
        Engine(tiny.tiny_mamba(), tiny.tiny_tokenizer(), backend="hf-cb", kv_bytes=1 << 20)
    with pytest.raises(ConfigError, match="did you mean 'hf-cb'"):
        Engine(tiny.tiny_llama(), tiny.tiny_tokenizer(), backend="hf_cb")


def test_a_mixture_that_packs_badly_is_refused_by_hf_cb_alone(parts):
    made = Engine(parts[2].model, tiny.tiny_tokenizer(), parts[2], backend="hf-cb", kv_bytes=1 << 20)
    try:
        with pytest.raises(ServeError, match="whole prompt") as told:
            made.submit(Request([5, 6], Mixture("whole"), GREEDY))
        assert told.value.status == 400 and told.value.code == "not_served"
    finally:
        made.close()


def test_text_stops_and_streams(engine, parts):
    tokenizer = tiny.tiny_tokenizer()
    ids = expected_of(parts, Request([9, 10, 11], one("a3"), GREEDY))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream = engine.submit(Request([9, 10, 11], one("a3"), GREEDY))
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole
    assert len(chunks) == 8 and chunks[-1].finish == "length"
    assert (chunks[-1].usage.prompt, chunks[-1].usage.completion) == (3, 8)
    words = whole.split()
    stop = " ".join(words[3:5])
    text, last = engine.submit(
        Request([9, 10, 11], one("a3"), dataclasses.replace(GREEDY, stop=(stop,), logprobs=2))
    ).result()
    assert text == whole[: whole.index(stop)] and last.finish == "stop"
    assert stream.submitted <= stream.first_token <= stream.finished

    async def read():
        return [chunk async for chunk in engine.submit(Request([9, 10, 11], one("a3"), GREEDY))]

    assert [chunk.text for chunk in asyncio.run(read())] == [chunk.text for chunk in chunks]


def test_watchers_see_the_decisions_about_their_own_tokens(engine, parts):
    seen, prompts = {}, prompts_of(3, seed=5)
    watched = [Request(ids, Mixture("m0"), GREEDY) for ids in prompts]
    streams = []
    for request in watched:
        streams.append(engine.submit(request, watcher=seen.setdefault(request.id, []).append))
    streams.append(engine.submit(Request([4] * 20, Mixture("m0"), GREEDY), watcher=lambda told: 1 / 0))  # harms nobody
    for stream in streams:
        assert stream.result()[1].finish == "length"
    mixture = parts[3]["m0"]
    for request in watched:
        ids = [*request.prompt_ids, *expected_of(parts, request)][:-1]
        plain = {}

        def read(site, routing, context, plain=plain):
            plain[site.name] = routing.gates[0]

        with torch.no_grad(), molora.control.trace_of(mixture).telling(read):
            mixture(input_ids=torch.tensor([ids]))
        groups = {decision.layer for decision in seen[request.id]}
        assert groups == plain.keys()
        for group in groups:
            gates = torch.cat([one.gates for one in seen[request.id] if one.layer == group])
            torch.testing.assert_close(gates, plain[group], rtol=1e-4, atol=1e-5)


# --- auto ---------------------------------------------------------------------------------------------------------


class Keyword:
    """Chooses the adapter that the prompt names, among those it may."""

    def select(self, prompts, allowed=None):
        """Return a choice for each prompt."""
        from molora.prompts.choice import Choice

        made = []
        for prompt in prompts:
            weights = {name: 1.0 for name in allowed if name in prompt.split()}
            scores = {name: float(name in weights) for name in allowed}
            made.append(Choice(weights, scores, scores, not weights, f"'{prompt}'"))
        return made


def test_auto_is_settled_by_a_selector_and_told(parts, backend):
    made = Engine(
        parts[2].model,
        tiny.tiny_tokenizer(),
        parts[2],
        backend=backend,
        kv_bytes=1 << 20,
        selectors={"keyword": Keyword()},
    )
    allowed = frozenset({"a1", "a2", "m0"})
    try:
        for text, program in {"use a2": one("a2"), "use m0": Mixture("m0"), "use a5": Base()}.items():
            stream = made.submit(Request([5, 6, 7], Auto(text, allowed), GREEDY))
            chunks = list(stream)
            tokens = [token.id for chunk in chunks for token in chunk.tokens]
            assert tokens == expected_of(parts, Request([5, 6, 7], program, GREEDY))
            chosen = chunks[-1].chosen
            assert chosen["selector"] == "keyword" and chosen["why"] == f"'{text}'"
            assert chosen["abstained"] == (program == Base()) and chosen["scores"].keys() == allowed
        nothing = list(made.submit(Request([5], Auto("use a2", frozenset()), GREEDY)))[-1]
        assert nothing.chosen["abstained"]
        assert made.embed([[5, 6]], Auto("use a1", allowed)).chosen["weights"] == {"a1": 1.0}
        with pytest.raises(ServeError, match="known: keyword"):
            made.submit(Request([5], Auto("x", allowed, "topic"), GREEDY))
    finally:
        made.close()


class Several:
    """Chooses as it is told."""

    def __init__(self, weights):
        self.weights = weights

    def select(self, prompts, allowed=None):
        """Return the choice for each prompt."""
        from molora.prompts.choice import Choice

        return [Choice(self.weights, self.weights, self.weights, not self.weights, "so it fits") for _ in prompts]


@pytest.mark.parametrize(
    ("weights", "program", "told", "left"),
    [
        ({"m": 0.5, "a": 0.3, "b": 0.2}, Mixture("m"), {"m": 1.0}, "'a' and 'b' were"),
        ({"a": 0.5, "m": 0.3, "b": 0.2}, Weighted((("a", 0.5), ("b", 0.2))), {"a": 0.5, "b": 0.2}, "'m' was"),
        ({"a": 0.6, "m": 0.4}, Weighted((("a", 0.6),)), {"a": 0.6}, "'m' was"),
        ({"a": 0.6, "b": 0.4}, Weighted((("a", 0.6), ("b", 0.4))), {"a": 0.6, "b": 0.4}, None),
        ({"a": 1.0, "m": 0.0}, Weighted((("a", 1.0),)), {"a": 1.0}, None),
        ({"m": 1.0}, Mixture("m"), {"m": 1.0}, None),
        ({}, Base(), {}, None),
    ],
)
def test_auto_tells_the_weights_of_what_acts(weights, program, told, left):
    kinds = {"a": "lora", "b": "lora", "m": "mixture"}
    made, chosen = settle(Auto("x", frozenset(kinds)), {"several": Several(weights)}, kinds)
    assert made == program and chosen["weights"] == told and chosen["scores"] == weights
    acting = dict(made.weights) if isinstance(made, Weighted) else dict.fromkeys(needs(made), 1.0)
    assert chosen["weights"] == acting
    why = "so it fits" if left is None else f"so it fits; a routed mixture acts alone, so {left} left out"
    assert chosen["why"] == why


def test_auto_without_selectors_is_an_unknown_model(engine):
    with pytest.raises(ServeError) as told:
        engine.submit(Request([5], Auto("x", frozenset({"a1"})), GREEDY))
    assert told.value.status == 404 and told.value.code == "model_not_found"


# --- many at once -------------------------------------------------------------------------------------------------


def test_nobody_gets_the_answer_of_another(engine, parts):
    """Threads ask, cancel and leave at random; every whole answer is that of its own prompt."""
    programs = [one("a0"), one("a7"), Mixture("m0"), Mixture("whole"), Base()]
    prompts = prompts_of(8, seed=11)
    expected = {
        (row, place): expected_of(parts, Request(prompt, program, GREEDY), 12)
        for row, prompt in enumerate(prompts)
        for place, program in enumerate(programs)
    }
    wrong, whole, start = [], [], threading.Barrier(6)

    def ask(seed):
        draws = torch.Generator().manual_seed(seed)
        start.wait(WAIT)
        for _ in range(8):
            row, place, limit, leaves = (int(torch.randint(n, (), generator=draws)) for n in (8, 5, 12, 4))
            sampling = dataclasses.replace(GREEDY, max_tokens=limit + 1)
            stream = engine.submit(Request(prompts[row], programs[place], sampling, tenant=f"t{seed % 3}"))
            tokens = []
            for chunk in stream:
                tokens += [token.id for token in chunk.tokens]
                if leaves == 0 and len(tokens) > limit // 2:
                    break  # the reader leaves, so the request is cancelled
            else:
                whole.append(len(tokens) == limit + 1)
            if tokens != expected[row, place][: len(tokens)] or chunk.error:
                wrong.append((row, place, chunk))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert wrong == [] and all(whole) and len(whole) > 25
    assert engine.drain(WAIT)
    stats = engine.stats()
    assert sum(stats.ended.values()) == 48 and (stats.running, stats.waiting, stats.kv_used) == (0, 0, 0)
    assert stats.ended["length"] >= len(whole)
    assert all(entry.in_use == 0 for entry in parts[2].entries())


def test_more_adapters_than_slots_and_a_broken_one(parts, backend):
    """Cold adapters take turns in two slots while resident ones answer; one that cannot be loaded fails alone."""
    base, loras = parts[0], make_loras(parts[0], LLAMA, count=6)
    store = make_store(base, loras, slots={4: 2}, patience=0.2)
    from peft import get_peft_model_state_dict

    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(loras, adapter_name="a0").items()}
    next(iter(tensors.values())).fill_(float("nan"))
    try:
        store.register("broken", (loras.peft_config["a0"].to_dict(), tensors))
        made = Engine(store.model, tiny.tiny_tokenizer(), store, backend=backend, kv_bytes=1 << 20, max_batch=8)
    except Exception:
        store.close()
        raise
    try:
        prompts = prompts_of(24, seed=13)
        names = [f"a{i % 6}" if i % 8 else "broken" for i in range(24)]
        requests = [Request(ids, one(name), GREEDY) for ids, name in zip(prompts, names, strict=True)]
        streams = [made.submit(request) for request in requests]
        for stream, request, name in zip(streams, requests, names, strict=True):
            chunks = list(stream)
            if name == "broken":
                assert chunks[-1].finish == "error" and chunks[-1].error.code == "adapter_load_failed"
                continue
            loras.set_adapter(name)
            tokens = [token.id for chunk in chunks for token in chunk.tokens]
            assert tokens == generated(loras, request.prompt_ids, 8)
        assert made.stats().ended == {"length": 21, "error": 3}
    finally:
        made.close()
        store.close()


def test_sampled_answers_do_not_depend_on_the_company(engine):
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=3, max_tokens=10, ignore_eos=True)
    request = Request([7, 8, 9], one("a1"), sampling)
    alone = answers(engine, [request])[0]
    crowd = [Request(ids, one(f"a{i}"), GREEDY) for i, ids in enumerate(prompts_of(9, seed=15))]
    assert answers(engine, [*crowd, dataclasses.replace(request, id="again")])[-1] == alone
