"""X-LoRA against PEFT's own, against plain LoRA, and what generation, saving and checkpointing must keep."""

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model

import molora
from molora import ConfigError, RoutingError
from molora.posthoc import xlora
from molora.posthoc.rerouting import routers_of
from tests.adapters import logits
from tests.posthoc.mixtures import mixture_of, save_loras, trainable
from tests.tiny import tiny_bert_classifier, tiny_gpt2, tiny_inputs, tiny_llama, tiny_mamba, tiny_qwen3_moe, tiny_t5


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3, target_modules=["q_proj", "v_proj", "down_proj"])


def xlora_of(loras, seed=0, **options):
    model = xlora.build(mixture_of(loras), **{"depth": 2, "width": 16, **options})
    generator = torch.Generator().manual_seed(seed)
    for parameter in routers_of(model)[0].parameters():  # decisions that differ between tokens
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gates_of(model, inputs):
    with molora.record(model) as log, torch.no_grad():
        model(**inputs)
    return next(iter(log.values())).gates


def peft_xlora(loras, head, **options):
    base = tiny_llama()
    base.config.use_cache = False
    folders = {str(number): str(folder) for number, folder in enumerate(loras)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=folders, xlora_size=16, **options)
    model = get_peft_model(base, config)
    layers = [layer for layer in model.base_model.internal_xlora_classifier.layers if hasattr(layer, "weight")]
    for theirs, ours in zip(layers, head.maps, strict=True):
        theirs.load_state_dict(ours.state_dict())
    return model.eval()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("per_layer", [False, True])
def test_it_computes_what_pefts_xlora_does(loras, depth, per_layer):
    mine = xlora_of(loras, depth=depth, per_layer=per_layer, temperature=0.7, weight=1.3)
    head = routers_of(mine)[0].scorer
    theirs = peft_xlora(loras, head, xlora_depth=depth, layerwise_scalings=per_layer, softmax_temperature=0.7)
    theirs.base_model.set_global_scaling_weight(1.3)
    want = logits(theirs)
    assert (want - logits(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(mine), want, atol=2e-6, rtol=2e-6)


def test_top_k_without_division_is_pefts_and_with_it_a_softmax_of_the_k_logits_of_each_token(loras):
    mine = xlora_of(loras, top_k=2, renormalise=False)
    head = routers_of(mine)[0].scorer
    theirs = peft_xlora(loras, head, xlora_depth=2, top_k_lora=2)
    torch.testing.assert_close(logits(mine), logits(theirs), atol=2e-6, rtol=2e-6)
    # PEFT's softmax over the k is right when it is the only softmax
    theirs = peft_xlora(loras, head, xlora_depth=2, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)
    mine = xlora_of(loras, top_k=2)
    torch.testing.assert_close(logits(mine), logits(theirs), atol=2e-6, rtol=2e-6)
    gates = gates_of(mine, tiny_inputs(tiny_llama(), batch=2, length=3))
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3))  # per token, not 1 / 6 over the batch
    assert (gates != 0).sum(-1).eq(2).all()


def test_one_adapter_is_plain_lora_exactly(loras):
    mine = xlora_of(loras[:1])
    with molora.pin(mixture_of(loras[:1]), torch.ones(1)):
        pass
    plain = mixture_of(loras[:1])
    assert torch.equal(logits(mine), logits(plain))
    theirs = logits(PeftModel.from_pretrained(tiny_llama(), loras[0]).eval())
    torch.testing.assert_close(logits(mine), theirs, atol=2e-6, rtol=2e-6)


def test_identical_copies_are_one_lora(loras):
    copies = xlora_of([loras[0]] * 4)
    assert gates_of(copies, tiny_inputs(tiny_llama())).std(-1).max() > 0.05  # the head does prefer some
    torch.testing.assert_close(logits(copies), logits(mixture_of(loras[:1])), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("top_k", [None, 2])
def test_rows_and_later_tokens_do_not_reach_a_decision(loras, top_k):
    model, inputs = xlora_of(loras, top_k=top_k), tiny_inputs(tiny_llama(), batch=2, length=6)
    both = gates_of(model, inputs)
    alone = gates_of(model, {name: tensor[:1] for name, tensor in inputs.items()})
    torch.testing.assert_close(both[:1], alone)
    later = {**inputs, "input_ids": inputs["input_ids"].clone()}
    later["input_ids"][:, 4:] = 50
    changed = gates_of(model, later)
    torch.testing.assert_close(changed[:, :4], both[:, :4])
    assert (changed[:, 4:] - both[:, 4:]).abs().max() > 1e-3


def test_the_decision_is_the_head_on_the_states_of_the_bare_model(loras):
    model, inputs = xlora_of(loras), tiny_inputs(tiny_llama())
    with torch.no_grad():
        states = tiny_llama()(**inputs, output_hidden_states=True).hidden_states[-1]
        first, second = routers_of(model)[0].scorer.maps
        want = torch.softmax(second(torch.relu(first(states))), -1)
    torch.testing.assert_close(gates_of(model, inputs), want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_head_learns_also_under_gradient_checkpointing(loras, checkpointing):
    model = xlora_of(loras, dropout=0.0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = tiny_inputs(tiny_llama())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == trainable(model) == {name for name in learning if ".molora_router." in name}
    assert len(learning) == 4 and all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)
    plain = xlora_of(loras, dropout=0.0).train()
    plain(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name])


def test_reentrant_checkpointing_is_refused_and_not_silently_wrong(loras):
    model = xlora_of(loras, dropout=0.0).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs = tiny_inputs(tiny_llama())
    with pytest.raises(RoutingError, match="use_reentrant"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_training_the_head_lowers_the_loss_and_saving_keeps_it(loras, tmp_path):
    model = xlora.build(mixture_of(loras)).train()
    inputs = tiny_inputs(tiny_llama())
    with torch.no_grad(), molora.pin(model, torch.tensor([0.0, 1.0, 0.0])):
        labels = model(**inputs).logits.argmax(-1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert gates_of(model.eval(), inputs)[..., 1].min() > 0.7  # it found the expert
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].scorer["name"] == "xlora"


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_caches_is_generation_without(loras, beams):
    model = xlora_of(loras, top_k=2, per_layer=True)
    inputs = tiny_inputs(tiny_llama(), batch=2, length=5)
    inputs["attention_mask"][0, :2] = 0  # padding on the left
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with torch.no_grad():
        slow = model.generate(**inputs, **options, use_cache=False)
        fast = model.generate(**inputs, **options, use_cache=True)
    assert slow.shape == (2, 13) and torch.equal(slow, fast)


def test_a_step_of_generation_reads_one_token_in_each_pass(loras):
    model, seen = xlora_of(loras), []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    model.generate(**tiny_inputs(tiny_llama(), length=5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert seen == [5, 5, 1, 1, 1, 1, 1, 1]


def test_cached_decoding_gives_the_logits_of_the_whole_text(loras):
    model, inputs = xlora_of(loras), tiny_inputs(tiny_llama(), length=6)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5)


def test_caches_that_cannot_be_followed_are_refused(loras):
    model, ids = xlora_of(loras), tiny_inputs(tiny_llama())["input_ids"]
    bare = tiny_llama()(ids, use_cache=True).past_key_values
    with pytest.raises(RoutingError, match="cache"):
        model(input_ids=ids[:, :1], past_key_values=bare)
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with molora.pin(model, torch.ones(3)):
        model(input_ids=ids[:, 4:5], past_key_values=cache, use_cache=True)
    with pytest.raises(RoutingError, match="holds 5 tokens, but this router has followed only 4"):
        model(input_ids=ids[:, 5:6], past_key_values=cache, use_cache=True)
    with pytest.raises(RoutingError, match="StaticCache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")


def test_the_model_without_its_adapter_is_the_base_also_in_generation(loras):
    model, inputs = xlora_of(loras), tiny_inputs(tiny_llama())
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits(tiny_llama()))
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(**inputs, **options), tiny_llama().generate(**inputs, **options))


def test_a_classifier_that_reads_both_ways(tmp_path):
    folders = save_loras(tmp_path, 2, tiny_bert_classifier, target_modules=["query", "value"])
    model = xlora.build(mixture_of(folders, tiny_bert_classifier)).eval()
    inputs = tiny_inputs(tiny_bert_classifier())
    gates = gates_of(model, inputs)
    with torch.no_grad():
        states = tiny_bert_classifier()(**inputs, output_hidden_states=True).hidden_states[-1]
        want = torch.softmax(routers_of(model)[0].scorer.maps[0](states), -1)
    torch.testing.assert_close(gates, want)


@pytest.mark.parametrize(
    ("build", "targets"),
    [(tiny_gpt2, ["c_attn"]), (tiny_mamba, ["in_proj"]), (tiny_qwen3_moe, ["q_proj", "v_proj"])],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_other_architectures_give_their_last_states(tmp_path, build, targets):
    model = xlora.build(mixture_of(save_loras(tmp_path, 2, build, target_modules=targets), build)).eval()
    inputs = {"input_ids": tiny_inputs(build())["input_ids"]}
    with torch.no_grad():
        states = build()(**inputs, output_hidden_states=True).hidden_states[-1]
        want = torch.softmax(routers_of(model)[0].scorer.maps[0](states), -1)
    torch.testing.assert_close(gates_of(model, inputs), want)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    if build is tiny_mamba:  # a state-space cache, which no second one can follow
        with pytest.raises(RoutingError, match="use_cache=False"):
            model.generate(**inputs, **options)
        model.generate(**inputs, **options, use_cache=False)
    else:
        fast, slow = (model.generate(**inputs, **options, use_cache=cache) for cache in (True, False))
        assert torch.equal(fast, slow)


def test_the_first_pass_makes_no_logits(loras):
    model, seen = xlora_of(loras), []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: seen.append(1))
    logits(model)
    assert len(seen) == 1


def test_a_quantised_base(loras):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = tiny_llama()
    for block in base.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(block.self_attn, name)
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            setattr(block.self_attn, name, new.to("cpu"))
    model = xlora.build(molora.import_peft(base, loras)).train()
    inputs = tiny_inputs(tiny_llama())
    with torch.no_grad(), model.disable_adapter():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    want = torch.softmax(routers_of(model)[0].scorer.maps[0](states.float()), -1)
    torch.testing.assert_close(gates_of(model.eval(), inputs), want.detach())


def test_what_cannot_work_is_told_and_changes_nothing(loras, tmp_path):
    model = mixture_of(loras)
    before = logits(model)
    with pytest.raises(ConfigError, match="top_k must be between 1 and the number of experts 3, got 4"):
        xlora.build(model, top_k=4)
    with pytest.raises(ConfigError, match="depth >= 1"):
        xlora.build(model, depth=0)
    assert torch.equal(logits(model), before)
    folders = save_loras(tmp_path, 2, tiny_t5, target_modules=["q", "v"])
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        xlora.build(mixture_of(folders, tiny_t5))
