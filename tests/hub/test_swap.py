"""Experts that change while requests run: a request sees the old expert or the new one, never half of each.

The requests here are whole generations of a tiny model, compared with those of models that hold one adapter only, and
swaps come at the worst moments: between two layers of one forward, between two tokens, and from threads all the time.
"""

import gc
import threading
import time

import pytest
import torch
from transformers import StaticCache

import molora
from molora import ConfigError, LoadError
from molora.control import routed_layers, tuner_of
from molora.hub.compose import compose, live
from molora.hub.leases import Leases
from molora.hub.rows import copy_rows, rows_of
from molora.routing.router import Router
from molora.routing.scorers import scorers
from tests.adapters import CONFIG, WEIGHTS, change_config, change_tensors, logits
from tests.test_interchange import peft_lora, peft_says
from tests.test_laws import cases, context, hidden, router_of
from tests.tiny import tiny_inputs, tiny_llama, tiny_t5

LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]
PROMPT = tiny_inputs(tiny_llama(), batch=1, length=5)
LENGTH = 8
# Scorers that choose by themselves, or hold something else than a row for each expert; and those whose score of one
# expert depends on the others.
REFUSED = {"codebook", "distilled", "hash", "hyper", "random"}
TOGETHER = {"attention", "mixture", "response"}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    return [peft_lora(root / name, seed, r=4, target_modules=LAYERS) for seed, name in enumerate("abcd")]


def scores(model, **options):
    """The scores (LENGTH, vocab) of a greedy generation."""
    with torch.no_grad():
        out = model.generate(
            **PROMPT,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.cat(out.scores)


def pure(folder, **options):
    """What a request gets that sees this adapter under the name `x` all along."""
    return scores(compose(tiny_llama(), {"x": folder}, **options).eval())


def same(got, want):
    return torch.allclose(got, want, rtol=1e-4, atol=1e-5)


class Meanwhile:
    """Calls something in the middle of the n-th forward, before the second block: half of the model has run."""

    def __init__(self, model, at, call):
        self.count, self.at, self.call = 0, at, call
        block = tuner_of(model).model.model.layers[1]
        self.handle = block.register_forward_pre_hook(self.run)

    def run(self, *_):
        self.count += 1
        if self.count == self.at:
            worker = threading.Thread(target=self.call)  # as another thread would
            worker.start()
            worker.join(20)
            assert not worker.is_alive()


@pytest.mark.parametrize("at", [1, 4], ids=["prefill", "decode"])
@pytest.mark.parametrize("explicit", [False, True], ids=["by cache", "by block"])
def test_a_swap_in_the_middle_of_a_forward_waits_for_the_next_request(loras, at, explicit):
    a, b = pure(loras[0]), pure(loras[1])
    assert not same(a, b)
    model = compose(tiny_llama(), {"x": loras[0]}, slots=2).eval()
    mixture = live(model)
    Meanwhile(model, at, lambda: mixture.swap("x", loras[1]))
    if explicit:
        with mixture.using():
            assert same(scores(model), a) and mixture.free == 0  # still leased: nothing may be written
    else:
        assert same(scores(model), a)
        gc.collect()
    assert mixture.free == 1
    assert same(scores(model), b)


def test_writing_in_place_would_have_torn_that_request(loras):
    """The control: the same moment, with the weights overwritten where they are, gives neither."""
    a, b = pure(loras[0]), pure(loras[1])
    model = compose(tiny_llama(), {"x": loras[0]}).eval()
    layers = routed_layers(compose(tiny_llama(), {"x": loras[1]}))
    pairs = {path: layer.molora_bank["default"].pair(0) for path, layer in layers.items()}
    Meanwhile(model, 4, lambda: molora.write_expert(model, 0, pairs, scale=2.0))
    got = scores(model)
    assert not same(got, a) and not same(got, b)


def test_every_request_of_four_threads_sees_one_adapter_while_a_fifth_swaps(loras):
    """Every sequence equals one of the four pure ones, in all scores, bit for bit up to rounding."""
    want = [pure(folder) for folder in loras]
    model = compose(tiny_llama(), {"x": loras[0], "still": loras[3]}, slots=4).eval()
    mixture = live(model)
    stop, got, errors, swaps = threading.Event(), [], [], 0

    def which(found):
        return next((number for number, one in enumerate(want) if same(found, one)), None)

    def generate(explicit):
        try:
            while not stop.is_set():
                if explicit:
                    with mixture.using("x"):
                        got.append(scores(model))
                else:
                    with mixture.using("still"):
                        assert same(scores(model), want[3])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=generate, args=(kind,)) for kind in (True, True, True, False)]
    for thread in threads:
        thread.start()
    begin, seen = time.monotonic(), set()
    while not errors and time.monotonic() < begin + 20:
        if time.monotonic() > begin + 1.5 and swaps > 30:  # long enough, when every adapter had its turn
            seen |= {which(got.pop()) for _ in range(len(got))}
            if seen == {0, 1, 2}:
                break
        swaps += 1
        mixture.swap("x", loras[swaps % 3])
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not errors and not any(thread.is_alive() for thread in threads)
    seen |= {which(scores_) for scores_ in got}
    assert seen == {0, 1, 2}, f"{swaps} swaps"
    assert mixture.free == 2 and swaps > 10


def test_without_a_free_slot_a_swap_waits_for_the_requests_that_run(loras):
    a, b = pure(loras[0]), pure(loras[1])
    model = compose(tiny_llama(), {"x": loras[0]}).eval()
    mixture, order = live(model), []

    def swap():
        mixture.swap("x", loras[1])
        order.append("swapped")

    worker = threading.Thread(target=swap)
    with mixture.using():
        worker.start()
        time.sleep(0.2)
        assert same(scores(model), a)
        order.append("request")
    worker.join(20)
    assert order == ["request", "swapped"]
    assert same(scores(model), b)
    with mixture.using(), pytest.raises(ConfigError, match=r"inside of a request.*slots=2"):
        mixture.swap("x", loras[0])
    lease = mixture._leases.acquire()
    with pytest.raises(ConfigError, match=r"after 0.05 seconds 1 request still use"):
        mixture.swap("x", loras[0], timeout=0.05)
    lease.release()
    assert same(scores(model), b)  # nothing was changed, and requests run again


def test_a_cache_that_goes_on_later_keeps_its_experts(loras):
    model = compose(tiny_llama(), {"x": loras[0]}, slots=2).eval()
    ids = tiny_inputs(tiny_llama(), batch=1, length=6)["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
        first = model(ids[:, :5], use_cache=True)
        live(model).swap("x", loras[1])
        then = model(ids[:, 5:], past_key_values=first.past_key_values).logits[:, -1]
        fresh = model(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(then, whole, atol=1e-5) and not torch.allclose(fresh, whole, atol=1e-3)
    assert live(model).free == 0
    del first
    gc.collect()
    assert live(model).free == 1


def test_an_emptied_cache_begins_another_request(loras):
    """Static caches are kept and emptied; what begins in one must see the experts of now."""
    model = compose(tiny_llama(), {"x": loras[0]}, slots=2).eval()
    cache = StaticCache(config=tuner_of(model).model.config, max_cache_len=8)
    with torch.no_grad():
        model(**PROMPT, past_key_values=cache)
        live(model).swap("x", loras[1])
        then = model(input_ids=PROMPT["input_ids"][:, :1], past_key_values=cache)  # the first request goes on
        cache.reset()
        got = model(**PROMPT, past_key_values=cache).logits
    assert torch.allclose(got, logits_of(compose(tiny_llama(), {"x": loras[1]})), atol=1e-5)
    ids = torch.cat([PROMPT["input_ids"], PROMPT["input_ids"][:, :1]], 1)
    want = compose(tiny_llama(), {"x": loras[0]}).eval()(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(then.logits[:, -1], want, atol=1e-5)
    assert live(model).free == 1


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**PROMPT).logits


def test_add_and_remove(loras):
    model = compose(tiny_llama(), {"x": loras[0]}, slots=3).eval()
    mixture = live(model)
    with mixture.using("x") as before:
        mixture.add("y", loras[1])
        mixture.remove("x")
        assert same(scores(model), pure(loras[0]))  # this request began earlier
        assert before.experts == {"x": 0} and mixture.names == ["y"] and mixture.free == 1
    assert mixture.free == 2
    assert same(scores(model), pure(loras[1]))
    mixture.remove("y")
    assert same(scores(model), scores(tiny_llama()))  # without experts it is the base
    assert mixture.names == [] and mixture.free == 3
    with pytest.raises(ConfigError, match="no expert is called 'x'"):
        mixture.swap("x", loras[0])


def test_what_does_not_fit_is_refused_before_anything_is_written(loras, tmp_path):
    model = compose(tiny_llama(), {"x": loras[0], "y": loras[1]}, slots=3).eval()
    want = scores(model)
    high = peft_lora(tmp_path / "high", r=5, target_modules=["q_proj"])
    wide = peft_lora(tmp_path / "wide", target_modules=["o_proj"])
    dora = peft_lora(tmp_path / "dora", use_dora=True)
    with pytest.raises(ConfigError, match=r"rank 5, there is room for 4; compose with max_rank="):
        live(model).swap("x", high)
    with pytest.raises(ConfigError, match=r"o_proj' has no experts; compose the mixture with targets="):
        live(model).add("z", wide)
    with pytest.raises(LoadError, match="DoRA"):
        live(model).swap("x", dora)
    with pytest.raises(ConfigError, match="there is an expert 'y' already"):
        live(model).add("y", loras[2])
    live(model).add("z", loras[2])
    with pytest.raises(ConfigError, match=r"all 3 slots are taken.*slots=4"):
        live(model).add("more", loras[3])
    live(model).remove("z")
    assert same(scores(model), want)


def test_layers_that_the_new_adapter_leaves_alone_are_cleared(loras, tmp_path):
    small = peft_lora(tmp_path / "small", 7, r=2, lora_alpha=3, target_modules=["v_proj"])
    model = compose(tiny_llama(), {"x": loras[0]}, slots=2).eval()
    for folder in (small, loras[1], small, loras[2], small):  # each slot is written over larger ones
        live(model).swap("x", folder)
        with molora.using_experts(model, "x"):
            want = peft_says(folder)
            assert (logits(model) - want).abs().max() < 2e-6 * want.abs().max()


# --- routers follow ---------------------------------------------------------------------------------------------------


def learned(loras, **options):
    """A mixture whose router and price have learned something for each expert."""
    recipe = {"scorer": {"name": "linear", "bias": True}, "selector": {"name": "top_k", "k": 1}, "price": "sign"}
    model = compose(tiny_llama(), dict(zip("xyz", loras, strict=False)), recipe, **options).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in routed_layers(model).values():
        router = layer.molora_router["default"]
        for tensor in (router.scorer.weight, router.scorer.bias, router.price.value):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def test_a_learned_router_treats_the_new_expert_as_the_old_one(loras):
    model = learned(loras, slots=5)
    with molora.record(model) as seen:
        before = logits(model)
    gates = {path: routing.gates for path, routing in seen.items()}
    assert len({int(g.argmax(-1).flatten()[0]) for g in gates.values()}) > 1
    live(model).swap("y", loras[1])  # the same adapter again, in another slot
    assert live(model).slot("y") == 3
    with molora.record(model) as seen:
        after = logits(model)
    assert torch.allclose(before, after, atol=1e-6)
    for path, routing in seen.items():
        assert torch.equal(routing.gates[..., [0, 3, 2]], gates[path][..., :3])
        assert (routing.gates[..., [1, 4]] == 0).all()
    router = next(iter(routed_layers(model).values())).molora_router["default"]
    assert torch.equal(router.price.value[3], router.price.value[1])


def test_a_new_expert_of_a_learned_router_needs_a_start(loras):
    model = learned(loras, slots=4)
    with pytest.raises(ConfigError, match=r"say which expert it is like at first \(like=\), one of: x, y, z"):
        live(model).add("w", loras[3])
    slot = live(model).add("w", loras[3], like="z")
    for layer in routed_layers(model).values():
        scorer = layer.molora_router["default"].scorer
        assert torch.equal(scorer.weight[slot], scorer.weight[2]) and torch.equal(scorer.bias[slot], scorer.bias[2])


def test_arrow_looks_at_the_new_expert(loras):
    model = compose(tiny_llama(), {"x": loras[0], "y": loras[1]}, {"name": "arrow", "top_k": 1}, slots=3).eval()
    live(model).swap("x", loras[2])
    want = compose(tiny_llama(), {"x": loras[2], "y": loras[1]}, {"name": "arrow", "top_k": 1}).eval()
    assert torch.allclose(logits(model), logits(want), atol=1e-5)
    live(model).add("z", loras[0])  # it knows new experts by itself
    want = compose(tiny_llama(), {"x": loras[2], "y": loras[1], "z": loras[0]}, {"name": "arrow", "top_k": 1}).eval()
    assert torch.allclose(logits(model), logits(want), atol=1e-5)


@pytest.mark.parametrize(("name", "options"), list(cases(scorers)))
def test_every_scorer_gives_the_new_expert_the_scores_of_the_old_one_or_refuses(name, options):
    router = router_of(scorer={"name": name, **options})
    state = {key: value.clone() for key, value in router.state_dict().items()}
    try:
        rows_of(router)
    except ConfigError as error:
        assert name in REFUSED and ("a row per expert" in str(error) or "chooses by itself" in str(error))
        return
    assert name not in REFUSED
    assert all(torch.equal(value, router.state_dict()[key]) for key, value in state.items())
    x, bank = hidden(), router.bank
    before = router(x, context()).scores
    copy_rows(router, 0, 2)
    bank.write(2, *bank.pair(0), bank.scaling)
    after = router(x, context()).scores
    torch.testing.assert_close(after[..., 2], after[..., 0])
    if name not in TOGETHER:
        torch.testing.assert_close(after[..., [0, 1, 3, 4]], before[..., [0, 1, 3, 4]])


def test_rows_of_null_experts_and_of_several_decisions_stay():
    router = Router(6, 3, scorer={"name": "linear", "bias": True}, null=2, selector={"name": "top_k", "k": 2})
    before = router.scorer.weight.detach().clone()
    copy_rows(router, 0, 2)
    assert torch.equal(router.scorer.weight, before[[0, 1, 0, 3, 4]])
    router = Router(6, 3, splits=2)
    before = router.scorer.weight.detach().clone()
    copy_rows(router, 2, 1)
    assert torch.equal(router.scorer.weight, before[[0, 2, 2, 3, 5, 5]])
    router = Router(3, 3)  # a square weight: its second axis counts no experts
    before = router.scorer.weight.detach().clone()
    copy_rows(router, 0, 1)
    assert torch.equal(router.scorer.weight, before[[0, 0, 2]])


# --- other models and ways to run -------------------------------------------------------------------------------------


def test_an_encoder_decoder_keeps_its_experts_inside_of_a_block(tmp_path):
    folders = [peft_lora(tmp_path / str(seed), seed, tiny_t5, target_modules=["q", "v"]) for seed in (0, 1)]
    pures = [scores(compose(tiny_t5(), {"x": folder}).eval()) for folder in folders]
    assert not same(*pures)
    model = compose(tiny_t5(), {"x": folders[0]}, slots=2).eval()
    encoder = tuner_of(model).model.get_encoder()
    encoder.register_forward_hook(lambda *_: threading.Thread(target=live(model).swap, args=("x", folders[1])).start())
    with live(model).using():
        assert same(scores(model), pures[0])
    deadline = time.monotonic() + 10
    while live(model).free == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert same(scores(model), pures[1])


def test_compiled_code_stays_valid(loras):
    torch._dynamo.reset()
    model = compose(tiny_llama(num_hidden_layers=1), {"x": some(loras, 0)}, slots=3).eval()
    counts = []

    def backend(graph, inputs):
        counts.append(1)
        return graph.forward

    logits_of(model)  # the trace looks at a first forward, too
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        for turn, number in enumerate([0, 1, 2, 3]):
            folder = some(loras, number)
            if turn > 0:
                live(model).swap("x", folder)
            with live(model).using(alone=True):
                got = run(**PROMPT, use_cache=False).logits
            want = logits_of(compose(tiny_llama(num_hidden_layers=1), {"x": folder}))
            assert torch.allclose(got, want, atol=1e-5), turn
            if turn == 0:
                first = len(counts)
    assert len(counts) == first > 0  # nothing was compiled again


_one_layer = {}


def some(loras, number):
    """The adapters for a model of one layer."""
    if number not in _one_layer:
        folder = loras[number].parent / f"one_{number}"

        def build():
            return tiny_llama(num_hidden_layers=1)

        _one_layer[number] = peft_lora(folder, number, build, target_modules=LAYERS)
    return _one_layer[number]


def test_a_forward_that_fails_lets_the_next_one_run(loras):
    model = compose(tiny_llama(), {"x": loras[0]}, slots=2).eval()
    want = logits_of(model)
    with pytest.raises(Exception):  # noqa: B017 (whatever the model says about such ids)
        model(input_ids=torch.full((1, 3), 10**6))
    assert torch.equal(logits_of(model), want)
    block = tuner_of(model).model.model.layers[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**PROMPT)
    handle.remove()
    assert torch.equal(logits_of(model), want)
    live(model).swap("x", loras[1])
    assert live(model).free == 1  # no request was left behind


def test_another_adapter_beside_it_is_left_alone(loras):
    model = compose(tiny_llama(), {"x": loras[0]}, slots=4).eval()
    model.add_adapter("other", molora.MoloraConfig.from_recipe("molora", experts={"num": 2, "rank": 2}))
    model.set_adapter("other")
    assert same(scores(model), scores(tiny_llama()))  # fresh experts change nothing
    model.set_adapter("default")
    assert same(scores(model), pure(loras[0]))


def test_leases_count_tables_not_slots():
    leases = Leases(3, {"a": 0})
    first = leases.acquire()
    leases.flip({"a": 1})
    second = leases.acquire()
    leases.flip({"a": 2})
    assert leases.free() == []
    with pytest.raises(ConfigError, match="2 requests still use"):
        leases.take(0.01)
    first.release()
    first.release()  # twice is once
    assert leases.free() == [0] and leases.take(0) == 0
    second.release()
    assert leases.free() == [0, 1]


def test_what_changes_on_disk_between_two_swaps_is_read_anew(loras, tmp_path):
    """The same layout is not checked twice; other values, another scale or damage must be seen all the same."""
    folder = peft_lora(tmp_path / "here", 5, r=4, target_modules=LAYERS)
    model = compose(tiny_llama(), {"x": loras[0]}, slots=2).eval()

    def check():
        live(model).swap("x", folder)
        want = peft_says(folder)
        with molora.using_experts(model, "x"):
            assert (logits(model) - want).abs().max() < 2e-6 * want.abs().max()
        return want

    first = check()
    change_tensors(folder, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    second = check()
    change_config(folder, lora_alpha=3)
    assert not torch.allclose(first, second) and not torch.allclose(second, check())
    before = logits(model)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    change_tensors(folder, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(LoadError, match=r"up_proj.lora_B.weight' holds NaN or Inf"):
        live(model).swap("x", folder)
    change_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    with pytest.raises(LoadError, match="NaN"):
        live(model).swap("x", folder)
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LoadError, match="truncated"):
        live(model).swap("x", folder)
    (folder / CONFIG).unlink()
    with pytest.raises(LoadError, match=r"adapter_config.json is missing"):
        live(model).swap("x", folder)
    assert torch.equal(logits(model), before)
    half = peft_lora(tmp_path / "half", 6, dtype=torch.bfloat16, r=3, target_modules=["v_proj"])
    live(model).swap("x", half)
    with molora.using_experts(model, "x"):
        assert (logits(model) - peft_says(half)).abs().max() < 1e-5
