"""Average activation: means against plain loops, padding left out, and a planted library found again."""

import pytest
import torch

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.posthoc.average import build, mean_inputs
from molora.routing.types import Context
from tests.posthoc.library import library
from tests.posthoc.toy import Library, Toy
from tests.tiny import tiny_inputs, tiny_llama


def padded_batch(seed=0):
    batch = tiny_inputs(tiny_llama(), batch=3, length=6, seed=seed)
    batch["attention_mask"] = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return batch


def inputs_seen(model, batch, path):
    seen = []
    hook = routed_layers(model)[path].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("expert", [None, 1, "lora2"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_means_are_those_of_a_plain_loop_over_real_tokens(tmp_path, expert, pool):
    model = molora.import_peft(tiny_llama(), library(tmp_path)).eval()
    batches = [padded_batch(0), padded_batch(1)]
    found = mean_inputs(model, batches, expert, pool=pool)
    assert found.keys() == routed_layers(model).keys()
    gates = torch.zeros(3)
    if expert is not None:
        gates[1 if expert == 1 else 2] = 1.0
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        kept = []
        for batch in batches:
            with molora.pin(model, gates):
                x = inputs_seen(model, batch, path)
            for row, mask in zip(x, batch["attention_mask"].bool(), strict=True):
                kept += [row[mask][-1]] if pool == "last" else list(row[mask])
        torch.testing.assert_close(found[path], torch.stack(kept).mean(0), atol=1e-5, rtol=1e-5)


def test_scores_are_scaled_dot_products_with_unit_means(tmp_path):
    model = molora.import_peft(tiny_llama(), library(tmp_path)).eval()
    data = {"lora0": [padded_batch(0)], 2: [padded_batch(5)]}
    means = [mean_inputs(model, batches, expert) for expert, batches in data.items()]
    build(model, data=data, top_k=2)
    for path, layer in routed_layers(model).items():
        x = torch.randn(2, 5, layer.d_in)
        scores = torch.stack([x @ m[path] / m[path].norm() / layer.d_in**0.5 for m in means], -1)
        gates = layer.molora_router["default"](x, Context()).gates
        torch.testing.assert_close(gates[..., [0, 2]], torch.softmax(scores, -1), atol=1e-5, rtol=1e-5)
        assert (gates[..., 1] == 0).all()  # it has no data


def test_it_finds_the_clusters_of_a_planted_library(tmp_path):
    tasks = Library(tmp_path)
    model = molora.import_peft(Toy(), tasks.folders).eval()
    build(model, data={e: tasks.batches(e) for e in range(tasks.count)}, top_k=1, measure="norm")
    for task in range(tasks.count):
        x = tasks.inputs(task, rows=50)
        with torch.no_grad(), molora.record(model) as log:
            model(x=x)
        assert (log["layer"].gates.argmax(-1) == task).float().mean() > 0.95


def test_it_is_saved_and_loaded(tmp_path):
    model = build(molora.import_peft(tiny_llama(), library(tmp_path)), data={0: [padded_batch()], 1: [padded_batch(3)]})
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**padded_batch(7)).logits, model.eval()(**padded_batch(7)).logits)


def test_what_cannot_be_is_said(tmp_path):
    model = molora.import_peft(tiny_llama(), library(tmp_path))
    with pytest.raises(ConfigError, match="3 problems") as error:
        build(model, data={"nobody": [], 7: []}, measure="length")
    assert "'nobody' is unknown" in str(error.value) and "expert 7 does not exist" in str(error.value)
    with pytest.raises(ConfigError, match="no batches to average over"):
        build(model, data={0: []})
    with pytest.raises(ConfigError, match="known: mean, last"):
        build(model, data={0: [padded_batch()]}, pool="max")
    with pytest.raises(ConfigError, match="no expert has data"):
        build(model, data={})
    assert model.training  # as it was
