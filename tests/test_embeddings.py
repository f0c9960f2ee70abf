"""Routed embeddings: against PEFT's lora_embedding, plain loops, and what must stay as it is (a tied head)."""

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import molora
from molora.embeddings import EmbeddingBank, RoutedEmbedding
from molora.errors import ConfigError
from tests.tiny import SPECIAL, VOCAB, _build, tiny_gpt2, tiny_inputs, tiny_llama, tiny_t5

ONE = {"experts": {"num": 1, "rank": 3, "alpha": 6}, "target_modules": ["embed_tokens"]}
FOUR = {
    "experts": {"num": 4, "rank": 2, "alpha": 4},
    "selector": {"name": "top_k", "k": 2, "normalise": "sum1"},
    "target_modules": ["embed_tokens"],
}


def tied_llama():
    return tiny_llama(tie_word_embeddings=True)


def tiny_gemma():  # scales what it looks up
    config = tf.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **SPECIAL,
    )  # fmt: skip
    return _build(tf.Gemma3ForCausalLM, config, 0)


def shaken(model, recipe, **changes):
    model = molora.wrap(model, recipe, **changes).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = (2.0 if "router" in name else 0.3) * torch.randn(parameter.shape, generator=generator)
    return model


def the_layer(model):
    (layer,) = [module for module in model.modules() if isinstance(module, RoutedEmbedding)]
    return layer


@pytest.mark.parametrize("build", [tiny_llama, tied_llama, tiny_gemma], ids=["llama", "tied", "gemma"])
def test_one_expert_is_pefts_embedding_lora(build):
    model, inputs = shaken(build(), ONE), tiny_inputs(build())
    lora = get_peft_model(build(), LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens"])).eval()
    own = lora.base_model.model.model.embed_tokens
    A, B = the_layer(model).molora_bank["default"].pair(0)
    own.lora_embedding_A["default"].data, own.lora_embedding_B["default"].data = A, B
    mine, theirs = (m(**inputs, labels=inputs["input_ids"]) for m in (model, lora))
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    assert (mine.logits - build()(**inputs).logits).abs().max() > 0.01
    mine.loss.backward()
    theirs.loss.backward()
    bank = the_layer(model).molora_bank["default"]
    torch.testing.assert_close(bank.A.grad, own.lora_embedding_A["default"].grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(bank.Bt.grad.t(), own.lora_embedding_B["default"].grad, atol=1e-6, rtol=1e-4)
    assert bank.A.grad.abs().max() > 1e-4


@pytest.mark.parametrize("form", ["lora", "rank", "shared_a"])
@torch.no_grad()
def test_equals_a_loop_over_tokens(form):
    experts = {"form": form, "num": 4, "rank": 1 if form == "rank" else 2, "scaling": 2.0}
    model = shaken(tiny_llama(), FOUR | {"experts": experts})
    layer, ids = the_layer(model), tiny_inputs(tiny_llama())["input_ids"]
    with molora.record(model) as log:
        model(input_ids=ids)
    gates, out = log["model.embed_tokens"].gates, layer(ids)
    bank, table = layer.molora_bank["default"], layer.base_layer.weight
    router = layer.molora_router["default"].scorer.weight
    for row in range(2):
        for place in range(7):
            token = ids[row, place]
            probs = torch.softmax(router @ table[token], 0)
            best = probs.topk(2)
            expected, total = table[token].clone(), best.values.sum()
            for e, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                A, B = bank.pair(e)
                expected += p / total * 2.0 * B @ A[:, token]
                torch.testing.assert_close(gates[row, place, e], p / total)
            torch.testing.assert_close(out[row, place], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equal_ids_get_equal_gates():
    model = shaken(tiny_llama(), FOUR)
    with molora.record(model) as log:
        model(input_ids=torch.tensor([[5, 9, 5, 40], [40, 5, 7, 9]]))
    gates = log["model.embed_tokens"].gates
    assert torch.equal(gates[0, 0], gates[0, 2]) and torch.equal(gates[0, 0], gates[1, 1])
    assert torch.equal(gates[0, 3], gates[1, 0])
    assert len({tuple(row) for row in (gates.flatten(0, 1) != 0).int().tolist()}) > 1


@torch.no_grad()
def test_hash_gates_look_at_the_id_itself():
    hashed = {"scorer": {"name": "hash", "seed": 3}, "selector": {"name": "top_k", "k": 1, "normalise": "sum1"}}
    model = shaken(tiny_llama(), FOUR | hashed)
    ids = torch.arange(4, VOCAB)[None]
    with molora.record(model) as log:
        model(input_ids=ids)
    chosen = log["model.embed_tokens"].gates[0].argmax(-1)
    with molora.record(model) as log:
        model(input_ids=ids.flip(1))
    assert torch.equal(log["model.embed_tokens"].gates[0].argmax(-1).flip(0), chosen)
    assert chosen.bincount(minlength=4).min() > 5
    layer = the_layer(model)
    A, B = layer.molora_bank["default"].pair(int(chosen[10]))
    expected = layer.base_layer.weight[14] + 2 * B @ A[:, 14]
    torch.testing.assert_close(seen_embedding(model, ids)[0, 10], expected, atol=1e-5, rtol=1e-5)


def seen_embedding(model, ids):
    """What the embedding hands on in a forward of the whole model, where token ids are known."""
    seen = []
    hook = the_layer(model).register_forward_hook(lambda _, args, out: seen.append(out))
    model(input_ids=ids)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_pinned_rows_are_their_own_experts():
    model, inputs = shaken(tiny_llama(), FOUR), tiny_inputs(tiny_llama())
    each = []
    for expert in (1, 2):
        with molora.pin(model, torch.eye(4)[expert]):
            each.append(model(**inputs).logits)
    with molora.pin(model, torch.eye(4)[[1, 2]][:, None]):
        both = model(**inputs).logits
    torch.testing.assert_close(both, torch.stack([each[0][0], each[1][1]]), atol=1e-6, rtol=1e-6)


def test_a_tied_head_stays_what_it_was():
    model = shaken(tied_llama(), FOUR)
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    assert torch.equal(base.lm_head.weight, tied_llama().lm_head.weight)
    hidden = torch.randn(3, 32)
    assert torch.equal(base.lm_head(hidden), tied_llama().lm_head(hidden))
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    inputs = tiny_inputs(base)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert base.lm_head.weight.grad is None
    tied = molora.wrap(tied_llama(), ONE)
    with pytest.raises(ConfigError, match=r"'model.embed_tokens' is tied to 'lm_head', which merging would change"):
        tied.merge_and_unload()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
@torch.no_grad()
def test_a_constant_mixture_merges_and_leaves_again(build):
    untied = build(**{"tie_word_embeddings": False}) if build is tiny_llama else build()
    model, inputs = shaken(untied, ONE), tiny_inputs(untied)
    if build is tiny_gemma:
        with pytest.raises(ConfigError, match="is tied to"):
            model.merge_adapter()
        return
    expected = model(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "targets"),
    [(tied_llama, ["embed_tokens", "q_proj"]), (tiny_gpt2, ["wte", "wpe", "c_attn"]), (tiny_t5, ["embed_tokens", "q"])],
    ids=["llama", "gpt2", "t5"],
)
@pytest.mark.parametrize("granularity", ["token", "prompt"])
def test_fresh_trained_saved_copied_generated(build, targets, granularity, tmp_path):
    recipe = FOUR | {"target_modules": targets, "granularity": granularity}
    recipe["losses"] = [{"name": "switch_balance", "weight": 0.1}]
    inputs = tiny_inputs(build())
    with torch.no_grad():
        fresh = molora.wrap(build(), recipe).eval()
        torch.testing.assert_close(fresh(**inputs).logits, build()(**inputs).logits, atol=1e-6, rtol=1e-6)
    model = shaken(build(), recipe).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**{**inputs, "labels": inputs.get("labels", inputs["input_ids"])}).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.gradient_checkpointing_disable()
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        molora.save(model, tmp_path / "a")
        for other in (molora.load(build(), tmp_path / "a").eval(), copy.deepcopy(model)):
            torch.testing.assert_close(other(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
        loaded = PeftModel.from_pretrained(build(), tmp_path / "a").eval()
        torch.testing.assert_close(loaded(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(**inputs).logits, build()(**inputs).logits, atol=0, rtol=0)
        kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        prompt = {key: value for key, value in inputs.items() if key != "labels"}
        assert torch.equal(loaded.generate(**prompt, **kwargs), loaded.generate(**prompt, **kwargs, use_cache=False))


@torch.no_grad()
def test_an_expert_leaves_as_pefts_embedding_lora(tmp_path):
    model = shaken(tiny_llama(), FOUR, target_modules=["embed_tokens", "q_proj"])
    inputs = tiny_inputs(model)
    molora.export_peft(model, tmp_path / "lora", gates=[0.0, 0.25, 0.0, -1.0])
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    with molora.pin(model, torch.tensor([0.0, 0.25, 0.0, -1.0])):
        torch.testing.assert_close(lora(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ConfigError, match="dropout cannot act on token ids"):
        EmbeddingBank(10, 4, [2], dropout=0.1)
    report = molora.report(
        molora.wrap(
            tiny_llama(), {"experts": {"form": "module"}, "share": "block"}, target_modules=["embed_tokens", "q_proj"]
        )
    )
    assert "experts of form 'module' cannot act on Embedding" in report.skipped["model.embed_tokens"]


def test_columns_learn_from_their_first_occurrence_on():
    torch.manual_seed(0)
    bank = EmbeddingBank(10, 4, [2, 2])
    assert bank.A.abs().max() == 0 and bank.Bt.std() > 0.3
    gates = torch.tensor([0.5, 0.5])
    bank.look_up(torch.tensor([[3, 7, 3]]), gates, padding_idx=7).sum().backward()
    moved = bank.A.grad.abs().sum(0).nonzero().flatten().tolist()
    assert moved == [3], "only ids that occur learn, and padding never does"
