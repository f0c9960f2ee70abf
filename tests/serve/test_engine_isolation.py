"""What one request asks, or one operator changes, cannot reach the answers of others or end the engine."""

import dataclasses
import logging
import threading

import pytest
import torch
from peft import get_peft_model_state_dict

from molora.errors import ConfigError
from molora.serve.engine.engine import Engine
from molora.serve.request import Base, Mixture, Request, Sampling, ServeError, Weighted
from tests import tiny
from tests.serve.kinds import GREEDY
from tests.serve.loras import LLAMA, make_mixture
from tests.serve.test_engine_limits import LONG, WAIT, Blocked, first_of, make, parts  # noqa: F401


def in_memory(loras, name):
    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(loras, adapter_name=name).items()}
    return loras.peft_config[name].to_dict(), tensors


# --- names that come to mean something else -------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["lora", "mixture", "whole"])
def test_a_name_that_becomes_another_kind_is_not_run_as_the_old_one(make, parts, tmp_path, change):  # noqa: F811
    """A mixture's mask over a bucket of slots would let every tenant's adapter act on the row."""
    base, loras, store = parts
    engine = make()
    for name in ("a0", "a1"):  # others' adapters are in the slots
        engine.submit(Request([5], Weighted(((name, 1.0),)), GREEDY)).result()
    mixture = make_mixture(base, tmp_path / "mixture", LLAMA)[1]
    before, after, program = {
        "lora": (mixture, in_memory(loras, "a0"), Mixture("x")),
        "mixture": (in_memory(loras, "a0"), mixture, Weighted((("x", 1.0),))),
        "whole": (mixture, make_mixture(base, tmp_path / "w", LLAMA, granularity="prompt")[1], Mixture("x")),
    }[change]
    store.register("x", before)
    try:
        with Blocked(engine):
            stream = engine.submit(Request([5, 6, 7], program, GREEDY))
            store.register("x", after)
        last = list(stream)[-1]
        if change == "whole" and engine.stats().backends == ("hf-simple",):  # it runs both
            assert last.error is None
        else:
            assert (last.error.status, last.error.code) == (409, "adapter_replaced") and last.usage.completion == 0
        if change == "lora":
            with pytest.raises(ServeError, match="plain adapter"):  # as everybody is told from now on
                engine.submit(Request([5], program))
    finally:
        store.unregister("x")


# --- requests that break something ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(-100_000,), (tiny.VOCAB,)])
def test_tokens_that_end_an_answer_must_exist(make, tokens):  # noqa: F811
    sampling = Sampling(temperature=0.0, max_tokens=8, stop_token_ids=tokens, min_tokens=3)
    with pytest.raises(ServeError, match="stop_token_ids names token") as told:
        make().submit(Request([5], sampling=sampling))
    assert told.value.param == "stop_token_ids"


def test_times_that_are_no_numbers_and_that_never_end(make):  # noqa: F811
    engine = make(timeout=float("inf"))
    with pytest.raises(ServeError, match="timeout must be a number"):
        engine.submit(Request([5], Base(), GREEDY, timeout=float("nan")))
    for _ in range(2):  # the second one finds the thread after it has waited with the first one's deadline
        assert engine.submit(Request([5], Base(), GREEDY)).result()[1].finish == "length"
        with Blocked(engine):
            pass
    assert engine.stats().healthy


class Undecodable:
    """A tokenizer that cannot decode."""

    eos_token_id, pad_token_id = tiny.EOS, tiny.PAD

    def decode(self, ids, **options):
        raise UnicodeError("no text")


def test_an_answer_that_cannot_be_decoded_ends_alone(make, caplog):  # noqa: F811
    engine = make()
    tokenizer, engine.tokenizer = engine.tokenizer, Undecodable()
    with Blocked(engine), caplog.at_level(logging.CRITICAL, logger="molora.serve"):
        bad = engine.submit(Request([5], Base(), GREEDY))
        engine.tokenizer = tokenizer
        good = engine.submit(Request([6], Base(), GREEDY))
    assert list(bad)[-1].error.code == "engine_error"
    assert good.result()[1].finish == "length" and engine.stats().healthy


def test_a_request_that_the_scheduler_refuses_leaves_nothing_behind(make):  # noqa: F811
    engine, ended = make(), []
    with pytest.raises(ConfigError, match="weight"):
        engine.submit(Request([5], Base(), GREEDY, weight=0.0), when_done=lambda *told: ended.append(told))
    assert engine.drain(5.0) and not ended and not sum(engine.stats().ended.values())


# --- who waits for whom ---------------------------------------------------------------------------------------------


def test_a_tenant_that_fills_the_queue_shuts_nobody_out(make):  # noqa: F811
    engine = make(max_waiting=4)

    def ask(tenant):
        return engine.submit(Request([5], Base(), GREEDY, tenant=tenant))

    with Blocked(engine):
        streams = [ask("greedy") for _ in range(4)]
        streams += [ask("modest"), ask("modest"), ask("third")]
        for tenant in ("greedy", "modest", "third"):  # each has its share of four
            with pytest.raises(ServeError, match="7 requests are waiting"):
                ask(tenant)
        streams.append(ask("fourth"))
        with pytest.raises(ServeError, match="8 requests are waiting"):  # twice the queue is the end of it
            ask("fifth")
    assert [stream.result()[1].finish for stream in streams] == ["length"] * 8


def test_a_backend_without_room_holds_up_no_other(parts, tmp_path):  # noqa: F811
    base, _, store = parts
    store.register("whole", make_mixture(base, tmp_path / "w", LLAMA, granularity="prompt")[1])
    engine = Engine(store.model, tiny.tiny_tokenizer(), store, kv_bytes=1 << 20, max_batch=4, timeout=WAIT)
    order = []

    def ask(program, tenant, count, weight):
        sampling = dataclasses.replace(GREEDY, max_tokens=count)
        request = Request([5], program, sampling, tenant=tenant, weight=weight)
        return engine.submit(request, when_done=lambda stream, last: order.append(stream.request.tenant))

    try:
        with Blocked(engine):  # the heavy tenant is always next, and hf-simple takes four of its requests at a time
            slow = [ask(Mixture("whole"), "heavy", 60, 1e6) for _ in range(5)]
            quick = [ask(Base(), "light", 4, 1.0) for _ in range(12)]
        assert [stream.result()[1].finish for stream in [*slow, *quick]] == ["length"] * 17
        assert order == ["light"] * 12 + ["heavy"] * 5
    finally:
        engine.close()
        store.unregister("whole")


def test_an_encoding_of_many_prompts_lets_answers_go_on_and_can_be_given_up(make, parts):  # noqa: F811
    engine, steps = make(max_batch=2), []
    encoder = engine._loop._entrance.encoder
    vectors = encoder._vectors

    def counted(*given):
        steps.append(engine.stats().steps)
        return vectors(*given)

    encoder._vectors = counted
    prompts = [[5 + i] * (1 + i % 3) for i in range(11)]
    chunks = first_of(engine.submit(Request([5], Base(), LONG)))
    found = engine.embed(prompts, Weighted((("a0", 1.0),))).values
    list(chunks)
    assert len(steps) == 6 and sorted(set(steps)) == steps  # a step of the answer between any two forwards
    alone = [engine.embed([ids], Weighted((("a0", 1.0),))).values for ids in prompts]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)
    inside, go = threading.Event(), threading.Event()

    def slow(*given):
        inside.set()
        assert go.wait(WAIT)
        steps.append(0)
        return vectors(*given)

    encoder._vectors = slow
    steps.clear()
    with pytest.raises(ServeError, match="not encoded within"):
        engine.embed(prompts, timeout=0.5)
    assert inside.wait(WAIT)
    go.set()
    assert engine.drain(WAIT) and len(steps) == 1  # the forward that ran, and no other


def test_draining_waits_for_an_encoding_that_runs(make):  # noqa: F811
    engine = make()
    inside, go, drained, found = threading.Event(), threading.Event(), [], []
    encoder = engine._loop._entrance.encoder
    vectors = encoder._vectors

    def slow(*given):
        inside.set()
        assert go.wait(WAIT)
        return vectors(*given)

    encoder._vectors = slow
    asking = threading.Thread(target=lambda: found.append(engine.embed([[5, 6]])))
    asking.start()
    assert inside.wait(WAIT)
    assert engine.drain(0.0) is False
    draining = threading.Thread(target=lambda: drained.append(engine.drain(WAIT)))
    draining.start()
    go.set()
    for thread in (asking, draining):
        thread.join(WAIT)
    assert found and drained == [True]


# --- what is counted ------------------------------------------------------------------------------------------------


def test_tokens_from_the_cache_are_counted_as_their_requests_tell(make):  # noqa: F811
    engine = make()
    with Blocked(engine):  # the later ones find the blocks while the first one is read
        streams = [engine.submit(Request(list(range(4, 60)), Base(), GREEDY)) for _ in range(3)]
    told = sum(stream.result()[1].usage.cached for stream in streams)
    assert engine.stats().tokens_cached == told
    assert told > 0 or engine.stats().backends == ("hf-simple",)


def test_tenants_do_not_find_each_others_prompts_in_the_cache(make):  # noqa: F811
    engine = make()
    if engine.stats().backends == ("hf-simple",):
        return  # it has no prefix cache
    ids = list(range(4, 60))

    def cached(tenant):
        return engine.submit(Request(ids, Base(), GREEDY, tenant=tenant)).result()[1].usage.cached

    assert cached("a") == 0
    assert cached("b") == 0  # what a has asked is neither told nor felt
    assert cached("a") > 0 and cached("b") > 0
    trusting = make(share_prefixes=True)
    streams = [trusting.submit(Request(ids, Base(), GREEDY, tenant=tenant)) for tenant in "ab"]
    assert sum(stream.result()[1].usage.cached for stream in streams) > 0
