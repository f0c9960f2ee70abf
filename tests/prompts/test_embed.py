"""Embedders: unit vectors, each text once, no padding or adapter in them; and they know which vectors compare."""

import pytest
import torch
from torch.nn import functional as F

import molora
from molora.errors import ConfigError
from molora.prompts.embed import build_embedder
from molora.prompts.embedder import Embedder, as_embedder
from molora.prompts.registry import embedders
from molora.routing.rows import Rows
from tests.adapters import wrapped
from tests.tiny import tiny_bert_classifier, tiny_llama, tiny_t5, tiny_tokenizer

TEXTS = ["a good film .", "the team is bad", "what", "how is the market , the price of the stock ?"]


def by_hand(body, texts, tokenizer):
    """One text at a time, so without any padding."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(body(input_ids=ids).last_hidden_state[0].mean(0))
    return F.normalize(torch.stack(found), dim=-1)


@pytest.mark.parametrize(
    ("build", "body"),
    [
        (tiny_llama, lambda model: model.model),
        (tiny_bert_classifier, lambda model: model.base_model),
        (tiny_t5, lambda model: model.encoder),
    ],
)
def test_base_is_the_mean_over_real_tokens(build, body):
    model, tokenizer = build(), tiny_tokenizer()
    embed = build_embedder({"name": "base", "batch_size": 3}, model, tokenizer)
    found = embed(TEXTS)
    assert found.dtype == torch.float32 and found.shape == (4, 32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(found, by_hand(body(model), TEXTS, tokenizer), atol=1e-5, rtol=1e-4)


def test_base_reads_another_layer():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    found = build_embedder({"name": "base", "layer": 1}, model, tokenizer)(TEXTS[:1])
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, F.normalize(states.mean(1), dim=-1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="layer 9 is not one of the 3"):
        build_embedder({"name": "base", "layer": 9}, model, tokenizer)(["a"])


@pytest.mark.parametrize("kind", ["molora", "served", "peft"])
def test_base_is_blind_to_adapters_and_leaves_the_model_as_it_was(kind):
    tokenizer = tiny_tokenizer()
    expected = by_hand(tiny_llama().model, TEXTS, tokenizer)
    plain = build_embedder("base", tiny_llama(), tokenizer)
    if kind == "peft":
        import peft

        model = peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
    else:
        model = wrapped()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    experts = model.peft_config["default"].experts["num"] if kind == "served" else 1
    rows = {"default": Rows(torch.ones(1, 1, experts))}
    if kind == "served":
        molora.control.trace_of(model).rows = rows
    before = model(input_ids=ids).logits
    assert not torch.allclose(before, tiny_llama()(input_ids=ids).logits, atol=1e-3)
    model.train()
    embed = build_embedder("base", model, tokenizer)
    torch.testing.assert_close(embed(TEXTS), expected, atol=1e-5, rtol=1e-4)
    assert model.training and embed.digest == plain.digest
    assert torch.equal(model.eval()(input_ids=ids).logits, before)
    if kind == "served":
        assert molora.control.trace_of(model).rows is rows


def test_another_base_has_another_digest():
    tokenizer = tiny_tokenizer()
    digests = {build_embedder("base", tiny_llama(seed), tokenizer).digest for seed in (0, 0, 1)}
    digests.add(build_embedder({"name": "base", "layer": 1}, tiny_llama(), tokenizer).digest)
    assert len(digests) == 3


def test_left_padding_of_a_tokenizer_changes_nothing():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    expected = build_embedder("base", model, tokenizer)(TEXTS)
    tokenizer.padding_side = "left"
    torch.testing.assert_close(build_embedder("base", model, tokenizer)(TEXTS), expected)
    tokenizer.pad_token = None
    torch.testing.assert_close(build_embedder("base", model, tokenizer)(TEXTS), expected, atol=1e-5, rtol=1e-4)


class Counting(Embedder):
    def __init__(self, cached=10):
        super().__init__("counting", {}, "", cached)
        self.seen = []

    def embed(self, texts):
        self.seen += texts
        return [[len(text), 1.0] for text in texts]


def test_each_text_is_embedded_once_and_the_oldest_is_forgotten():
    embed = Counting(cached=2)
    first = embed(["a", "bb", "a"])
    assert embed.seen == ["a", "bb"] and torch.equal(first[0], first[2])
    assert torch.equal(embed(["a"]), first[:1]) and embed.seen == ["a", "bb"]
    embed(["ccc"])
    embed(["bb"])
    assert embed.seen == ["a", "bb", "ccc", "bb"]
    assert embed([]).shape == (0, 0)


def test_words_need_no_model_and_compare_by_shared_words():
    embed = build_embedder({"name": "words", "size": 256})
    one, near, far, nothing = embed(["the cup final was won", "who won the CUP final", "my landlord gave notice", "?!"])
    assert one @ near > 0.4 > abs(float(one @ far)) and not nothing.any()
    assert torch.equal(build_embedder({"name": "words", "size": 256})(["the cup final was won"])[0], one)


def test_any_function_is_an_embedder():
    embed = as_embedder(lambda texts: [[3.0, 4.0]] * len(texts))
    assert embed.name == "given" and embed(["x"]).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert as_embedder(embed) is embed
    with pytest.raises(ConfigError, match="function from texts"):
        as_embedder("words")


@pytest.mark.parametrize("made", [[[float("nan")]], [[1.0], [2.0]], [1.0], [[]]])
def test_vectors_that_are_none_are_refused(made):
    with pytest.raises(ConfigError, match=r"must return \(1, d\)"):
        as_embedder(lambda texts: made)(["x"])


def test_calls_that_cannot_be_meant_are_refused(tmp_path):
    assert {"base", "sentence", "words"} <= set(embedders)
    with pytest.raises(ConfigError, match="list of texts"):
        build_embedder("words")("one text")
    with pytest.raises(ConfigError, match="give the model"):
        build_embedder("base")
    with pytest.raises(ConfigError, match="did you mean 'sentence'"):
        build_embedder("sentense")
    with pytest.raises(ConfigError, match="no folder with a config"):
        build_embedder({"name": "sentence", "path": str(tmp_path)})
    with pytest.raises(ConfigError, match="size"):
        build_embedder({"name": "words", "size": 1})


def encoder(folder, pooling):
    import json

    tiny_bert_classifier().base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return {"name": "sentence", "path": str(folder)}


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_sentence_pools_as_its_folder_says(pooling, tmp_path):
    embed = build_embedder(encoder(tmp_path / "encoder", pooling))
    body, tokenizer = tiny_bert_classifier().base_model, tiny_tokenizer()
    expected = by_hand(body, TEXTS, tokenizer)
    if pooling == "cls_token":
        states = [body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in TEXTS]
        expected = F.normalize(torch.stack(states), dim=-1)
    torch.testing.assert_close(embed(TEXTS), expected, atol=1e-5, rtol=1e-4)
    assert embed.digest == build_embedder({"name": "sentence", "path": embed.options["path"]}).digest


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert_classifier])
def test_texts_without_tokens_harm_no_others(build):
    embed = build_embedder("base", build(), tiny_tokenizer())
    alone = embed(["", " "])
    assert torch.isfinite(alone).all() and torch.equal(alone[0], alone[1])
    again = build_embedder("base", build(), tiny_tokenizer())(["", *TEXTS])
    torch.testing.assert_close(again[1:], embed(TEXTS), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again[0], alone[0], atol=1e-5, rtol=1e-4)


def test_other_poolings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="pools by pooling_mode_max_tokens"):
        build_embedder(encoder(tmp_path / "encoder", "max_tokens"))
