"""Base models and tokenizers: what is loaded, and how clearly the rest is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig

from molora.errors import ConfigError
from molora.train.models import fresh_to_save, load_base, load_config, load_tokenizer, longest
from molora.train.tasks import LabelMap
from tests.tiny import EOS, tiny_tokenizer

LABELS = LabelMap({"mood": ("bad", "good"), "topic": ("a", "b", "c")})


def test_a_missing_model(world, tmp_path):
    with pytest.raises(ConfigError, match=r"model folder './nowhere' does not exist"):
        load_config("./nowhere")
    with pytest.raises(ConfigError, match="is a file"):
        load_config(world["mood"])
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_config(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no model folder 'nobody/nothing'.*HF_HUB_OFFLINE is set") as error:
        load_config("nobody/nothing")
    assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ConfigError, match="needs code of its own, which molora never runs"):
        load_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_pad_tokens(world, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "eos")
    assert load_tokenizer(str(tmp_path / "eos")).pad_token_id == EOS
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match="neither a pad nor an eos token"):
        load_tokenizer(str(tmp_path / "none"))
    shutil.copytree(world["llama"], tmp_path / "llama")
    for file in (tmp_path / "llama").glob("token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"cannot load the tokenizer.*tokenizer\.save_pretrained"):
        load_tokenizer(str(tmp_path / "llama"))


def test_a_model_without_a_pad_token_can_classify_batches(world, tmp_path):
    shutil.copytree(world["llama"], tmp_path / "llama")
    config = AutoConfig.from_pretrained(tmp_path / "llama")
    config.pad_token_id = None
    config.save_pretrained(tmp_path / "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    base = load_base(str(tmp_path / "llama"), "seq_cls", label_map=LABELS)
    assert base.model.config.pad_token_id == EOS
    batch = base.tokenizer(["good film", "a bad bad film"], padding=True, return_tensors="pt")
    together = base.model(**batch).logits
    alone = base.model(**base.tokenizer(["good film"], return_tensors="pt")).logits
    torch.testing.assert_close(together[:1], alone)


def test_new_heads_are_named_and_those_that_peft_forgets_are_saved(world):
    base = load_base(world["bert"], "seq_cls", label_map=LABELS)
    assert base.fresh == ["bert.pooler.dense", "classifier"]
    assert base.notes == ["new in this model, trained and saved whole: bert.pooler.dense, classifier"]
    assert base.model.config.id2label[2] == "topic/a"
    assert fresh_to_save(base.fresh, None) == ["bert.pooler.dense"]
    assert fresh_to_save(base.fresh, ["pooler"]) == []
    assert fresh_to_save(["classifier.out_proj", "score"], None) == []
    assert load_base(world["llama"], "causal_lm").fresh == []


def test_a_head_of_another_size_is_made_anew(world, tmp_path):
    base = load_base(world["bert"], "seq_cls", label_map=LABELS)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    other = load_base(str(tmp_path), "seq_cls", label_map=LabelMap({"mood": ("bad", "good")}))
    assert other.fresh == ["classifier"]
    assert other.model.config.num_labels == 2
    assert load_base(str(tmp_path), "seq_cls", label_map=LABELS).fresh == []


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_bases_keep_new_modules_in_full(world, quantize):
    bnb = pytest.importorskip("bitsandbytes")
    packed = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}[quantize]
    base = load_base(world["bert"], "seq_cls", label_map=LABELS, quantize=quantize)
    assert isinstance(base.model.get_submodule("bert.encoder.layer.0.attention.self.query"), packed)
    for path in ("classifier", "bert.pooler.dense"):
        module = base.model.get_submodule(path)
        assert type(module) is torch.nn.Linear
        assert module.weight.dtype == torch.float32


def test_how_long_rows_may_be():
    tokenizer = tiny_tokenizer()
    assert longest(tokenizer, GPT2Config(n_positions=64)) == 64
    assert longest(tokenizer, LlamaConfig(max_position_embeddings=4096)) == 128
    tokenizer.model_max_length = int(1e30)
    assert longest(tokenizer, LlamaConfig(max_position_embeddings=4096)) == 4096
