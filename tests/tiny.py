"""Tiny random models for the tests: real transformers architectures of a few layers, built offline.

Every builder is deterministic: the same call gives the same weights; the caller's random state is untouched.
`changes` are passed to the model's config, so `tiny_llama(num_hidden_layers=3)` is what it looks like.
Token ids of `tiny_tokenizer`: 0 pad, 1 bos, 2 eos, 3 unk; all text models share them and `VOCAB` entries.
"""

from pathlib import Path

import torch
import transformers as tf

VOCAB = 96
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

# The tiny tokenizer's words; others become <unk>. 4 special tokens + words + fillers = VOCAB entries.
WORDS = (
    "the a an is are was it this that of to in on and or not good bad great poor film movie book song "
    "team match goal player bank market stock price virus doctor patient drug star planet atom cell "
    "what who why how question answer yes no one two three four five six . , ? ! :"
).split()


def _build(cls: type, config: tf.PretrainedConfig, seed: int) -> tf.PreTrainedModel:
    """`cls(config)` in float32 and eval mode, with weights drawn from `seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).to(torch.float32).eval()


def tiny_llama(seed: int = 0, **changes) -> tf.LlamaForCausalLM:
    """A causal decoder with `nn.Linear` layers, grouped-query attention and rotary positions."""
    options = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **SPECIAL,
    )
    return _build(tf.LlamaForCausalLM, tf.LlamaConfig(**(options | changes)), seed)


def tiny_gpt2(seed: int = 0, **changes) -> tf.GPT2LMHeadModel:
    """A causal decoder whose layers are `Conv1D` (weights stored transposed); dropout off."""
    options = dict(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    )
    return _build(tf.GPT2LMHeadModel, tf.GPT2Config(**(options | changes)), seed)


def tiny_t5(seed: int = 0, **changes) -> tf.T5ForConditionalGeneration:
    """An encoder-decoder; dropout off; decoding starts from the pad token, as T5 does."""
    options = dict(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return _build(tf.T5ForConditionalGeneration, tf.T5Config(**(options | changes)), seed)


def tiny_bert_classifier(num_labels: int = 3, seed: int = 0, **changes) -> tf.BertForSequenceClassification:
    """An encoder with a classification head; dropout off."""
    options = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        num_labels=num_labels,
    )
    return _build(tf.BertForSequenceClassification, tf.BertConfig(**(options | changes)), seed)


def tiny_vit_classifier(num_labels: int = 3, seed: int = 0, **changes) -> tf.ViTForImageClassification:
    """A vision encoder over 16 x 16 RGB images in 4 x 4 patches (17 positions with the class token)."""
    options = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_channels=3,
        num_labels=num_labels,
    )
    return _build(tf.ViTForImageClassification, tf.ViTConfig(**(options | changes)), seed)


def tiny_mamba(seed: int = 0, **changes) -> tf.MambaForCausalLM:
    """A state-space causal model; the pure PyTorch path."""
    options = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=4,
        **SPECIAL,
    )
    return _build(tf.MambaForCausalLM, tf.MambaConfig(**(options | changes)), seed)


def tiny_qwen3_moe(seed: int = 0, **changes) -> tf.Qwen3MoeForCausalLM:
    """A mixture-of-experts decoder whose experts are 3-D parameters, not `nn.Linear` modules."""
    options = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        **SPECIAL,
    )
    return _build(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**(options | changes)), seed)


def tiny_inputs(model: tf.PreTrainedModel, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs without padding for `model(**inputs)`: ids (batch, length), or pixels for a ViT."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.model_type == "vit":
        size = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    ids = torch.randint(UNK + 1, config.vocab_size, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["labels"] = torch.randint(UNK + 1, config.vocab_size, (batch, length), generator=generator)
    return inputs


def tiny_tokenizer(tmp_path: Path | str | None = None) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer with VOCAB entries, bos in front; saved and loaded back if a folder is given."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    names += [f"w{i}" for i in range(VOCAB - len(names))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )
    if tmp_path is None:
        return tokenizer
    folder = Path(tmp_path) / "tokenizer"
    tokenizer.save_pretrained(folder)
    return tf.PreTrainedTokenizerFast.from_pretrained(folder)


def save_tiny(model: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerFast | None, path: Path | str) -> Path:
    """Write a folder for `AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained`; returns it."""
    path = Path(path)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path
