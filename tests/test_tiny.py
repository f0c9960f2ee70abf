"""The tiny models that other tests stand on: they build, run, repeat themselves, and can be saved."""

import pytest
import torch
import transformers as tf

from tests import tiny

BUILDERS = {
    "llama": tiny.tiny_llama,
    "gpt2": tiny.tiny_gpt2,
    "t5": tiny.tiny_t5,
    "bert": tiny.tiny_bert_classifier,
    "vit": tiny.tiny_vit_classifier,
    "mamba": tiny.tiny_mamba,
    "qwen3_moe": tiny.tiny_qwen3_moe,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_builds_runs_and_repeats(name):
    before = torch.get_rng_state()
    model, again = BUILDERS[name](), BUILDERS[name]()
    assert torch.equal(before, torch.get_rng_state()), "a builder moved the caller's random state"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    inputs = tiny.tiny_inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    with torch.no_grad():
        assert torch.equal(logits, again(**inputs).logits)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_flow(name):
    model = BUILDERS[name]().train()
    model(**tiny.tiny_inputs(model)).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_changes_reach_the_config():
    assert len(tiny.tiny_llama(num_hidden_layers=3).model.layers) == 3
    assert tiny.tiny_bert_classifier(num_labels=5).classifier.out_features == 5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "qwen3_moe", "t5"])
def test_generates(name):
    model = BUILDERS[name]()
    inputs = {k: v for k, v in tiny.tiny_inputs(model).items() if k != "labels"}
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 1


def test_tokenizer(tmp_path):
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    assert len(tokenizer) == tiny.VOCAB
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("The film is zzz.")["input_ids"]
    assert ids[0] == tiny.BOS and ids[-2] == tiny.UNK
    assert tokenizer.decode(ids[1:4]) == "the film is"


def test_saved_folder_loads(tmp_path):
    model = tiny.tiny_bert_classifier(num_labels=4)
    folder = tiny.save_tiny(model, tiny.tiny_tokenizer(), tmp_path / "bert")
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = tf.AutoTokenizer.from_pretrained(folder)(["a good film", "bad"], padding=True, return_tensors="pt")
    inputs = {k: tokens[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded.eval()(**inputs).logits)
