"""Models of every kind that is served, and how the tests ask them."""

import transformers as tf

from molora.serve.request import Sampling
from tests import tiny
from tests.serve.loras import LLAMA

GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)


def tiny_mistral():
    """Return a model whose attention slides over six tokens."""
    options = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = tf.MistralConfig(vocab_size=tiny.VOCAB, num_key_value_heads=2, sliding_window=6, **options)
    return tiny._build(tf.MistralForCausalLM, config, 0)


def tiny_hybrid():
    """Return a model with layers of attention and of a gated convolution."""
    options = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    layers = ["conv", "full_attention", "conv"]
    config = tf.Lfm2Config(vocab_size=tiny.VOCAB, num_hidden_layers=3, layer_types=layers, **options, **tiny.SPECIAL)
    return tiny._build(tf.Lfm2ForCausalLM, config, 0)


MODELS = {
    "llama": (tiny.tiny_llama, LLAMA),
    "gpt2": (tiny.tiny_gpt2, ["c_attn", "c_fc"]),
    "mistral": (tiny_mistral, LLAMA),
    "moe": (tiny.tiny_qwen3_moe, ["q_proj", "v_proj"]),
    "mamba": (tiny.tiny_mamba, ["in_proj", "x_proj"]),
    "hybrid": (tiny_hybrid, ["q_proj", "v_proj", "in_proj"]),
    "t5": (tiny.tiny_t5, ["q", "v", "wo"]),
}


def answers(engine, requests):
    """Return the tokens of all requests, sent together."""
    streams = [engine.submit(request) for request in requests]
    found = []
    for stream in streams:
        chunks = list(stream)
        assert chunks[-1].error is None, chunks[-1].error
        found.append([token.id for chunk in chunks for token in chunk.tokens])
    return found
