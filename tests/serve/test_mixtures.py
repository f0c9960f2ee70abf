"""Routed mixtures in a store: which are served, that they decide as on their own, and that they come and go cleanly."""

import pytest
import torch

import molora
from molora.config import recipe_names
from molora.control import routed_layers, trace_of
from molora.errors import ConfigError, LoadError
from molora.files import WEIGHTS
from molora.routing.rows import Rows
from molora.routing.trace import Pass
from molora.routing.types import Context
from molora.serve.request import ServeError
from molora.serve.store.mixtures import misplaced, needs_whole_prompt, try_out, why_not_served
from tests import tiny
from tests.serve.adapters import peft_logits, peft_lora
from tests.serve.test_store import fetch, make, state  # noqa: F401  (a fixture)


def mixture(folder, recipe="mixtral", seed=0, std=0.3, **changes):
    """Save a mixture of random numbers; returns what it computes on its own."""
    torch.manual_seed(seed)
    model = molora.wrap(tiny.tiny_llama(), recipe, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora" in name:
                parameter.normal_(std=std)
    molora.save(model, folder)
    fresh = molora.load(tiny.tiny_llama(), folder).eval()

    def compute(ids):
        with torch.no_grad():
            return fresh(input_ids=ids, use_cache=False).logits

    return compute


def run(store, ids, rows):
    trace = trace_of(store.model)
    trace.rows = rows
    try:
        with torch.no_grad():
            return store.model(input_ids=ids, use_cache=False).logits
    finally:
        trace.rows = None


@pytest.fixture
def ids():
    return torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(2))


def test_mixtures_beside_slots_decide_as_on_their_own(make, tmp_path, ids):  # noqa: F811
    store = make(slots={8: 2})
    alone = {
        name: mixture(tmp_path / name, recipe, seed)
        for seed, (name, recipe) in enumerate({"one": "mixtral", "two": "milora"}.items())
    }
    folder = peft_lora(tmp_path / "plain", 7)
    for name in alone:
        entry = store.register(name, tmp_path / name)
        assert entry.kind == "mixture" and entry.packed == (name == "one")
    store.register("plain", folder)
    assert store.lease(["one"]) is None
    store.told.until(lambda: state(store, "one") == "warm")
    assert "routed_1" not in store.model.peft_config  # only the engine's thread touches the modules
    one, two, plain = fetch(store, "one"), fetch(store, "two"), fetch(store, "plain")
    assert one.rows["one"].slot is None and one.rows["one"].adapter != two.rows["two"].adapter
    mask = torch.eye(3)[:, :, None, None]
    gates = torch.zeros(3, 1, 2)
    gates[2, 0, plain.rows["plain"].slot] = 1.0
    rows = {one.rows["one"].adapter: Rows(mask=mask[0]), two.rows["two"].adapter: Rows(mask=mask[1])}
    together = run(store, ids, rows | {plain.rows["plain"].adapter: Rows(gates=gates)})
    for row, compute in enumerate([*alone.values(), lambda some: peft_logits(folder, some)]):
        assert torch.allclose(together[row : row + 1], compute(ids[row : row + 1]), atol=3e-5)
    store.unregister("one")
    assert not store.between_steps()  # it is in use
    again = run(store, ids, {one.rows["one"].adapter: Rows(mask=torch.ones(3, 1, 1))})
    assert torch.allclose(again, alone["one"](ids), atol=3e-5)
    one.release()
    assert store.between_steps() and one.rows["one"].adapter not in store.model.peft_config
    assert not store.between_steps()
    base = run(store, ids, {})
    assert torch.equal(base, run(store, ids, None))
    want = tiny.tiny_llama()(input_ids=ids, use_cache=False).logits
    assert torch.equal(base, want)
    for adapter in (two, plain):
        adapter.release()


def test_more_mixtures_than_places_are_served_in_turn(make, tmp_path, ids):  # noqa: F811
    store = make(slots={2: 1}, mixtures=1)
    alone = {f"m{seed}": mixture(tmp_path / f"m{seed}", seed=seed, target_modules=["q_proj"]) for seed in range(3)}
    for name in alone:
        store.register(name, tmp_path / name)
    for _ in range(2):
        for name, compute in alone.items():
            with fetch(store, name) as lease:
                rows = {lease.rows[name].adapter: Rows(mask=torch.ones(3, 1, 1))}
                assert torch.allclose(run(store, ids, rows), compute(ids), atol=3e-5)
    assert len(store.model.peft_config) == 2 and store.counters()["evictions"] == 5
    kept = [name for name, _ in store.model.named_parameters() if "molora_router" in name and "slots_2" not in name]
    assert all(f".routed_{3}." in name for name in kept) and kept


def test_what_the_model_tells_too_late_harms_nobody(make, tmp_path, ids):  # noqa: F811
    store = make(slots={2: 1}, remember_failure=1000.0)
    mixture(tmp_path / "words", target_modules=["embed_tokens", "q_proj"])
    mixture(tmp_path / "good", target_modules=["q_proj"])
    mixture(tmp_path / "far", "speech_moe2", target_modules=["q_proj"])  # its routers ask for a speaker's features
    for name in ("words", "far", "good"):
        store.register(name, tmp_path / name)
        assert store.lease([name]) is None
    fetch(store, "good").release()
    with pytest.raises(ServeError, match=r"'model.embed_tokens' is no linear layer"):
        store.lease(["words"])
    with pytest.raises(ServeError, match="router_extra"):
        fetch(store, "far")
    assert sorted(store.model.peft_config) == ["routed_3", "slots_2"]
    want = tiny.tiny_llama()(input_ids=ids, use_cache=False).logits
    assert torch.equal(run(store, ids, {}), want)


def test_mixtures_of_another_base_and_damaged_ones(make, tmp_path):  # noqa: F811
    store = make()
    torch.manual_seed(0)
    molora.save(molora.wrap(tiny.tiny_llama(seed=9), "mixtral"), tmp_path / "other")
    mixture(tmp_path / "huge", std=1e8)
    mixture(tmp_path / "cut")
    data = (tmp_path / "cut" / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(data[:-4])
    for name in ("other", "huge"):
        store.register(name, tmp_path / name)
    with pytest.raises(LoadError):
        store.register("cut", tmp_path / "cut")
    for name, why in (("other", "has other values"), ("huge", "stay below")):
        with pytest.raises(ServeError, match=why) as told:
            fetch(store, name)
        assert told.value.status == 400


def test_files_that_change_between_check_and_use(make, tmp_path):  # noqa: F811
    store = make()
    mixture(tmp_path / "m", target_modules=["q_proj"])
    store.register("m", tmp_path / "m")
    store.lease(["m"])
    store.told.until(lambda: state(store, "m") == "warm")
    mixture(tmp_path / "m", seed=5, target_modules=["q_proj"])
    with pytest.raises(ServeError, match="changed"):
        fetch(store, "m")
    assert list(store.model.peft_config) == ["slots_2", "slots_8"]


def test_mixtures_in_memory_are_refused(make):  # noqa: F811
    with pytest.raises(ConfigError, match="served from a folder"):
        make().register("m", ({"peft_type": "MOLORA"}, {"x": torch.zeros(1)}))


# --- which recipes ----------------------------------------------------------------------------------------------------

REFUSED = {
    "mixlora": "whole MLPs",
    "poly": "routes by task",
    "smear": "no sums of low-rank pairs",
    "mov": "no sums of low-rank pairs",
    "attention_aware": "attention weights",
}


@pytest.mark.parametrize("recipe", sorted(REFUSED))
def test_recipes_that_rows_cannot_express(recipe):
    assert REFUSED[recipe] in why_not_served(molora.MoloraConfig.from_recipe(recipe))


def test_other_reasons():
    build = molora.MoloraConfig.from_recipe
    for changes, why in (
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"native_experts": True}, "native experts"),
        ({"experts": {"num": 2, "names": ["a", "free:1"]}}, "1 slots for experts to come"),
        ({"layers": [{"match": "q_proj", "experts": {"form": "ia3"}}]}, "form 'ia3'"),
        ({"scorer": {"name": "noisy_view"}}, "changes what the experts read"),
    ):
        assert why in (why_not_served(build("molora", **changes)) or ""), why
    assert why_not_served(build("molora")) is None


def _input(layer, tokens, generator):
    return torch.randn(1, tokens, layer.d_in, generator=generator)


@pytest.mark.parametrize("recipe", recipe_names())
def test_packed_tokens_of_two_requests_are_routed_as_apart(recipe):
    """For every recipe that says it can be packed: layer by layer, the tokens of two requests do not meet."""
    config = molora.MoloraConfig.from_recipe(recipe)
    if why_not_served(config) is not None or needs_whole_prompt(config):
        pytest.skip("not packed")
    model = molora.wrap(tiny.tiny_llama(), config, adapter_name="mix").eval()
    assert misplaced(model, "mix") == []
    if recipe.startswith("speech_moe"):
        with pytest.raises(LoadError, match="router_extra"):
            try_out(model, "mix")
        return
    try_out(model, "mix")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mix." in name:
                parameter.normal_(std=0.3)
    layers = routed_layers(model, "mix")
    generator = torch.Generator().manual_seed(4)
    first = {path: _input(layer, 3, generator) for path, layer in layers.items()}
    second = {path: _input(layer, 4, generator) for path, layer in layers.items()}
    ids = torch.randint(3, 90, (1, 7), generator=generator)

    def apply(inputs, tokens):
        torch.manual_seed(0)
        trace, new = trace_of(model), Pass()
        new.contexts = {"main": Context(token_ids=tokens, progress=1.0, memory=new.memory)}
        trace.open(new)
        trace.rows = {"mix": Rows(mask=torch.ones(1, 1, 1))}
        try:
            with torch.no_grad():
                return {path: layer(inputs[path]) for path, layer in layers.items()}
        finally:
            trace.rows = None
            trace.close(None)

    apart = [apply(first, ids[:, :3]), apply(second, ids[:, 3:])]
    both = {path: torch.cat([first[path], second[path]], 1) for path in layers}
    together = apply(both, ids)
    for path in layers:
        want = torch.cat([apart[0][path], apart[1][path]], 1)
        assert torch.allclose(together[path], want, atol=1e-4), path
