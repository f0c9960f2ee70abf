"""Slots: LoRAs of any rank beside each other in one frozen model, each exactly what PEFT makes of it."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.control import trace_of
from molora.errors import ConfigError
from molora.files import WEIGHTS, look
from molora.lora_files import Lora, Pair, read_lora
from molora.routing.rows import Rows
from molora.serve.store.slots import LARGEST, Place, Slots, rank_of, too_large
from tests import tiny
from tests.serve.adapters import ALL, peft_logits, peft_lora


def logits(model, ids, gates):
    """Logits with these gates, {adapter: (B, 1, E)}."""
    trace = trace_of(model)
    trace.rows = {name: Rows(gates=told) for name, told in gates.items()}
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        trace.rows = None


def put(slots, folder, slot):
    """Write a folder into a slot of its bucket; returns the place."""
    lora = Lora("one", look(folder))
    assert read_lora(lora, slots.sizes) == [] and slots.problems(lora) == []
    place = Place(slots.bucket_for(rank_of(lora.pairs)), slot)
    slots.write(place, lora.pairs, dict(lora.contents.read()))
    return place


def gates_of(slots, places):
    """Gates that give row i the place i alone; None: nothing."""
    gates = {name: torch.zeros(len(places), 1, count) for name, count in slots.buckets.items()}
    for row, place in enumerate(places):
        if place is not None:
            gates[place.adapter][row, 0, place.slot] = 1.0
    return gates


@pytest.fixture
def ids():
    return torch.randint(3, 90, (6, 7), generator=torch.Generator().manual_seed(5))


def test_fresh_slots_change_nothing_and_nothing_can_be_trained(ids):
    with torch.no_grad():
        base = tiny.tiny_llama()(input_ids=ids, use_cache=False).logits
    slots = Slots(tiny.tiny_llama().train(), {8: 3, 2: 2})
    assert not slots.model.training and not any(p.requires_grad for p in slots.model.parameters())
    with torch.no_grad():
        assert torch.equal(slots.model(input_ids=ids, use_cache=False).logits, base)
    everything = {name: torch.ones(6, 1, count) for name, count in slots.buckets.items()}
    assert torch.equal(logits(slots.model, ids, everything), base)  # zero, not merely not asked for


def test_memory_is_what_the_ranks_take():
    slots = Slots(tiny.tiny_llama(), {4: 3, 16: 2})
    ranks = 4 * 3 + 16 * 2
    assert slots.nbytes == 4 * ranks * sum(d_in + d_out for p, (d_in, d_out) in slots.sizes.items() if p != "lm_head")
    assert list(slots.buckets.items()) == [("slots_4", 3), ("slots_16", 2)]


def test_the_smallest_bucket_that_holds_a_rank():
    slots = Slots(tiny.tiny_llama(), {16: 1, 2: 1, 8: 1}, ["q_proj"])
    assert [slots.bucket_for(r) for r in (1, 2, 3, 8, 9, 16)] == [f"slots_{r}" for r in (2, 2, 8, 8, 16, 16)]
    with pytest.raises(ConfigError, match="rank is 17, and there are slots for ranks up to 2, 8, 16"):
        slots.bucket_for(17)


def test_mixed_ranks_scales_and_targets_equal_peft(tmp_path, ids):
    folders = [
        peft_lora(tmp_path / "r2", 1, rank=2, targets=ALL),
        peft_lora(tmp_path / "r8", 2, rank=8, lora_alpha=3.5),
        peft_lora(tmp_path / "r16", 3, rank=16, targets=["v_proj"], use_rslora=True),
        peft_lora(tmp_path / "r5", 4, rank=5, targets=ALL, alpha_pattern={"q_proj": 1}, rank_pattern={"up_proj": 7}),
        peft_lora(tmp_path / "half", 5, rank=1, targets=["o_proj", "k_proj"]),
    ]
    half = {name: tensor.bfloat16() for name, tensor in load_file(folders[4] / WEIGHTS).items()}
    save_file(half, folders[4] / WEIGHTS, {"format": "pt"})
    slots = Slots(tiny.tiny_llama(), {2: 2, 8: 2, 16: 1})
    places = [put(slots, folder, slot) for folder, slot in zip(folders, (0, 1, 0, 0, 1), strict=True)]
    assert [place.adapter for place in places] == ["slots_2", "slots_8", "slots_16", "slots_8", "slots_2"]
    together = logits(slots.model, ids, gates_of(slots, [*places, None]))
    base = logits(slots.model, ids, {})
    for row, folder in enumerate(folders):
        want = peft_logits(folder, ids[row : row + 1])
        assert torch.allclose(together[row : row + 1], want, atol=3e-5), folder.name
        assert not torch.allclose(want, base[row : row + 1], atol=1e-2)
    assert torch.allclose(together[5], base[5], atol=1e-6)


def test_weights_of_adapters_in_several_buckets_add_up(tmp_path, ids):
    """PEFT's own sum of adapters (combination by concatenation, exact) is the judge."""
    from peft import PeftModel

    first, second = peft_lora(tmp_path / "a", 1, rank=2), peft_lora(tmp_path / "b", 2, rank=8)
    slots = Slots(tiny.tiny_llama(), {2: 1, 8: 1})
    one, two = put(slots, first, 0), put(slots, second, 0)
    gates = {one.adapter: torch.full((6, 1, 1), 0.7), two.adapter: torch.full((6, 1, 1), 0.4)}
    peft = PeftModel.from_pretrained(tiny.tiny_llama(), first, adapter_name="a")
    peft.load_adapter(second, adapter_name="b")
    peft.add_weighted_adapter(["a", "b"], [0.7, 0.4], "mix", combination_type="cat")
    peft.set_adapter("mix")
    with torch.no_grad():
        want = peft.eval()(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits(slots.model, ids, gates), want, atol=3e-5)


def test_nothing_of_the_last_one_stays_in_a_slot(tmp_path, ids):
    slots = Slots(tiny.tiny_llama(), {8: 1})
    put(slots, peft_lora(tmp_path / "wide", 1, rank=8, targets=ALL), 0)
    narrow = peft_lora(tmp_path / "narrow", 2, rank=3, targets=["k_proj"])
    place = put(slots, narrow, 0)
    assert torch.allclose(logits(slots.model, ids, gates_of(slots, [place] * 6)), peft_logits(narrow, ids), atol=3e-5)


def test_a_write_that_broke_off_leaves_nothing_behind_for_the_next(tmp_path, ids):
    slots = Slots(tiny.tiny_llama(), {8: 1})
    lora = Lora("one", look(peft_lora(tmp_path / "wide", 1, rank=8, targets=ALL)))
    read_lora(lora, slots.sizes)
    tensors = dict(lora.contents.read())
    del tensors[list(tensors)[-1]]
    with pytest.raises(KeyError):
        slots.write(Place("slots_8", 0), lora.pairs, tensors)
    narrow = peft_lora(tmp_path / "narrow", 2, rank=3, targets=["k_proj"])
    place = put(slots, narrow, 0)
    assert torch.allclose(logits(slots.model, ids, gates_of(slots, [place] * 6)), peft_logits(narrow, ids), atol=3e-5)


def test_the_largest_numbers_that_are_let_in_never_reach_other_rows(tmp_path, ids):
    slots = Slots(tiny.tiny_llama(), {8: 2})
    good, huge = peft_lora(tmp_path / "good", 1, rank=8), peft_lora(tmp_path / "huge", 2, rank=8, targets=ALL)
    tensors = {name: torch.full_like(tensor, LARGEST / 2) for name, tensor in load_file(huge / WEIGHTS).items()}
    save_file(tensors, huge / WEIGHTS, {"format": "pt"})
    first = put(slots, good, 0)
    alone = logits(slots.model, ids, gates_of(slots, [first] * 6))
    second = put(slots, huge, 1)
    beside = logits(slots.model, ids, gates_of(slots, [first, second, first, None, first, first]))
    for row in (0, 2, 4, 5):
        assert torch.allclose(beside[row], alone[row], atol=1e-6)
    assert torch.isfinite(beside[3]).all()


def test_numbers_that_could_overflow_are_named():
    lora = Lora("one", None, {"p": Pair("A", "B", 1, 100.0)})
    tensors = {"A": torch.tensor([[2 * LARGEST]]), "B": torch.tensor([[LARGEST / 10]]), "n": torch.tensor([10**9])}
    assert [problem.split("'")[1] for problem in too_large(tensors, lora.pairs)] == ["A", "B"]
    assert [problem.split("'")[1] for problem in too_large(tensors)] == ["A"]
    assert too_large({"A": torch.tensor([math.nan])}) and too_large({"A": torch.tensor([1e30]).half()})


def test_targets_bound_what_is_served(tmp_path):
    slots = Slots(tiny.tiny_llama(), {8: 1}, ["q_proj", "v_proj"])
    assert {path.rpartition(".")[2] for path in slots.paths} == {"q_proj", "v_proj"}
    lora = Lora("one", look(peft_lora(tmp_path / "a", rank=9)))
    read_lora(lora, slots.sizes)
    problems = "\n".join(slots.problems(lora))
    assert "layer 'model.layers.0.mlp.down_proj' has no slots" in problems and "rank is 9" in problems
    with pytest.raises(ConfigError, match="'q_prj' ends no linear layer's name; did you mean 'q_proj'"):
        Slots(tiny.tiny_llama(), {8: 1}, ["q_prj"])


def test_all_linear_leaves_the_head_alone():
    slots = Slots(tiny.tiny_llama(), {8: 1})
    assert "lm_head" in slots.sizes and "lm_head" not in slots.paths and len(slots.paths) == len(slots.sizes) - 1


def test_models_of_other_layers(ids):
    """GPT-2 stores its weights transposed; a BERT classifier reads both ways."""
    for model in (tiny.tiny_gpt2(), tiny.tiny_bert_classifier(), tiny.tiny_t5()):
        inputs = tiny.tiny_inputs(model)
        with torch.no_grad():
            base = model(**inputs).logits
            slots = Slots(model, {2: 2, 4: 1})
            for writer in slots._writers.values():
                for bank in writer.banks.values():
                    bank.Bt.normal_()  # with A zero: nothing
            assert torch.equal(slots.model(**inputs).logits, base)
            for writer in slots._writers.values():
                for bank in writer.banks.values():
                    bank.A.normal_()
            assert torch.equal(slots.model(**inputs).logits, base)  # no row asks for it
            trace_of(slots.model).rows = {"slots_4": Rows(gates=torch.ones(2, 1, 1))}
            assert not torch.allclose(slots.model(**inputs).logits, base, atol=1e-2)
        assert not any("modules_to_save" in name for name, _ in slots.model.named_modules())


def test_slots_join_a_model_that_has_a_mixture(ids):
    model = molora.wrap(tiny.tiny_llama(), "mixtral", target_modules=["q_proj"])
    slots = Slots(model, {2: 2})
    assert slots.model is model
    with torch.no_grad():
        base = tiny.tiny_llama()(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)  # nothing acts on its own


def test_slots_that_cannot_be_are_all_named():
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*rank 0.*0 slots of rank 4.*True slots of rank 8"):
        Slots(tiny.tiny_llama(), {0: 1, 4: 0, 8: True})
    with pytest.raises(ConfigError, match="there is no bucket"):
        Slots(tiny.tiny_llama(), {})
    with pytest.raises(ConfigError, match="modules_to_save"):
        Slots(molora.wrap(tiny.tiny_bert_classifier(), "mixtral"), {8: 1})
    from peft import LoraConfig, get_peft_model

    foreign = get_peft_model(tiny.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"adapters of type .*LORA"):
        Slots(foreign, {8: 1})
