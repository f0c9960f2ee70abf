"""hf-simple stays within its memory; vectors and classes are those of each prompt alone."""

import pytest
import torch
import transformers as tf

from molora.serve.backends.decoding import Decoder
from molora.serve.backends.simple import Simple
from molora.serve.engine.engine import Engine
from molora.serve.request import Base, Request, ServeError, Weighted
from tests import tiny
from tests.serve.kinds import GREEDY, MODELS, answers
from tests.serve.loras import generated, make_loras, make_store, prompts_of

# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "mamba", "t5"])
def test_caches_stay_within_their_bytes(kind, monkeypatch):
    model = MODELS[kind][0]()
    probe = Simple(model, kv_bytes=1 << 20)
    budget = 4 * (24 * probe.per_token + probe.per_row)  # four rows of 24 tokens
    seen, step = [], Simple.step

    def measured(self):
        events = step(self)
        seen.append((len(self.running()), sum(Decoder._bytes(batch.state) for batch in self._batches)))
        return events

    monkeypatch.setattr(Simple, "step", measured)
    engine = Engine(model, tiny.tiny_tokenizer(), backend="hf-simple", kv_bytes=budget, max_batch=16)
    try:
        prompts = prompts_of(24, seed=6)
        found = answers(engine, [Request(prompt, Base(), GREEDY) for prompt in prompts])
        assert found == [generated(model, prompt, 8) for prompt in prompts]
    finally:
        engine.close()
    assert max(taken for _, taken in seen) <= budget
    assert max(rows for rows, _ in seen) >= 4  # and it is made use of


def test_a_model_that_cannot_be_padded_gets_rows_of_one_length(monkeypatch):
    model = tiny.tiny_llama()
    monkeypatch.setattr(Decoder, "takes_padding", lambda self: False)
    begin, lengths = Decoder.begin, []

    def watched(self, prompts):
        lengths.append({len(prompt) for prompt in prompts})
        return begin(self, prompts)

    monkeypatch.setattr(Decoder, "begin", watched)
    engine = Engine(model, tiny.tiny_tokenizer(), backend="hf-simple", kv_bytes=1 << 20)
    try:
        prompts = prompts_of(12, seed=7, longest=3)
        found = answers(engine, [Request(prompt, Base(), GREEDY) for prompt in prompts])
    finally:
        engine.close()
    assert found == [generated(model, prompt, 8) for prompt in prompts]
    assert all(len(one) == 1 for one in lengths) and len(lengths) < 14


# --- embeddings and classes ----------------------------------------------------------------------------------------


def test_vectors_are_pooled_hidden_states_of_each_prompt_alone():
    base = tiny.tiny_bert_classifier()
    targets = ["query", "value", "dense"]
    loras = make_loras(base, targets, count=3)
    store = make_store(base, loras, targets=targets)
    engine = Engine(store.model, tiny.tiny_tokenizer(), store, max_batch=4)
    try:
        assert "does not generate" in engine.report[0]
        with pytest.raises(ServeError, match="does not generate"):
            engine.submit(Request([5]))
        prompts = prompts_of(7, seed=8)
        for name in (None, "a0", "a2"):
            program = Base() if name is None else Weighted(((name, 1.0),))
            if name is not None:
                loras.set_adapter(name)
            model = base if name is None else loras
            vectors, classes = engine.embed(prompts, program).values, engine.classify(prompts, program).values
            for prompt, vector, told in zip(prompts, vectors, classes, strict=True):
                with torch.no_grad():
                    out = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
                mean = out.hidden_states[-1][0].mean(0)
                torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(told, out.logits[0].softmax(-1), rtol=1e-4, atol=1e-5)
        with pytest.raises(ServeError, match="no pooling of its own"):
            engine.embed(prompts, pooling="model")
        with pytest.raises(ServeError, match="pooling must be one of"):
            engine.embed(prompts, pooling="max")
    finally:
        engine.close()
        store.close()


def test_decoders_and_encoders_of_pairs_embed_too():
    for kind in ("llama", "t5", "mamba"):
        model = MODELS[kind][0]()
        engine = Engine(model, tiny.tiny_tokenizer(), backend="hf-simple", kv_bytes=1 << 20)
        prompts = prompts_of(4, seed=9)
        try:
            found = {pooling: engine.embed(prompts, pooling=pooling).values for pooling in ("mean", "first", "last")}
            for row, prompt in enumerate(prompts):
                ids = torch.tensor([prompt])
                with torch.no_grad():
                    inner = model.get_encoder() if kind == "t5" else model.base_model
                    hidden = inner(input_ids=ids)[0][0]
                for pooling, expected in (("mean", hidden.mean(0)), ("first", hidden[0]), ("last", hidden[-1])):
                    torch.testing.assert_close(
                        found[pooling][row], expected / expected.norm(), rtol=1e-4, atol=1e-5, msg=f"{kind} {pooling}"
                    )
            with pytest.raises(ServeError, match="has no classes"):
                engine.classify(prompts)
        finally:
            engine.close()


def test_a_model_with_a_pooler_uses_it():
    model = tiny._build(tf.BertModel, tiny.tiny_bert_classifier().config, 0)
    engine = Engine(model, tiny.tiny_tokenizer())
    try:
        found = engine.embed([[5, 6, 7], [8]], pooling="model").values
        with torch.no_grad():
            expected = torch.cat([model(input_ids=torch.tensor([ids])).pooler_output for ids in ([5, 6, 7], [8])])
        torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    finally:
        engine.close()
