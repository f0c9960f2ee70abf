"""Decisions per prompt: made from prompt tokens only, once, the same in training, in prefill and in cached decoding."""

import copy

import pytest
import torch

import molora
from tests.test_tuner import make_experts_act
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba, tiny_t5

RECIPE = {
    "experts": {"num": 4, "rank": 2},
    "selector": {"name": "top_k", "k": 2},
    "granularity": "prompt",
}
PROMPT = torch.tensor([[5, 9, 33, 7, 41, 8]])
ANSWER = torch.tensor([[12, 60, 3, 25]])


def wrapped(build=tiny_llama, **changes):
    torch.manual_seed(3)
    return make_experts_act(molora.wrap(build(), RECIPE, **changes)).eval()


def decisions(model, **batch):
    with molora.record(model) as log:
        out = model(**batch)
    return {name: routing.gates for name, routing in log.items()}, out


def sequence(prompt, answer):
    ids = torch.cat([prompt, answer], 1)
    return {"input_ids": ids, "labels": torch.cat([torch.full_like(prompt, -100), answer], 1)}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba], ids=lambda f: f.__name__)
@pytest.mark.parametrize("share", ["site", "group", "block", "model"])
@pytest.mark.parametrize("pool", ["mean", "last", "max", "attention"])
def test_teacher_forced_equals_cached(build, share, pool):
    model = wrapped(build, share=share, pool=pool)
    forced, out = decisions(model, **sequence(PROMPT, ANSWER))
    with molora.record(model) as log:
        step = model(input_ids=PROMPT, use_cache=True)
        logits = [step.logits]
        for token in ANSWER.T:
            name = "cache_params" if build is tiny_mamba else "past_key_values"
            step = model(input_ids=token[:, None], use_cache=True, **{name: step[name]})
            logits.append(step.logits)
    assert_same(forced, {name: routing.gates for name, routing in log.items()})
    torch.testing.assert_close(torch.cat(logits, 1), out.logits, rtol=1e-4, atol=1e-5)


def test_the_answer_changes_no_decision():
    model = wrapped()
    first, _ = decisions(model, **sequence(PROMPT, ANSWER))
    other, _ = decisions(model, **sequence(PROMPT, ANSWER + 11))
    longer, _ = decisions(model, **sequence(PROMPT, ANSWER.repeat(1, 2)))
    moved, _ = decisions(model, **sequence(PROMPT + 1, ANSWER))
    assert_same(first, other, rtol=0, atol=0)
    assert_same(first, longer)
    assert any(not torch.allclose(first[name], moved[name]) for name in first)


@pytest.mark.parametrize("granularity", ["prompt", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [1, 5])
def test_padding_changes_nothing(granularity, side, amount):
    """Trap 5: neither the decision, nor the losses, nor the logits of real tokens."""
    losses = [
        {"name": name, "weight": 1.0} for name in ("switch_balance", "router_z", "importance", "entropy", "tsallis")
    ]
    model = wrapped(granularity=granularity, losses=losses)
    batch = sequence(PROMPT, ANSWER)
    pad = torch.full((1, amount), 77)
    order = (lambda a, b: torch.cat([b, a], 1)) if side == "left" else (lambda a, b: torch.cat([a, b], 1))
    ones = torch.ones_like(batch["input_ids"])
    padded = {
        "input_ids": order(batch["input_ids"], pad),
        "labels": order(batch["labels"], torch.full_like(pad, -100)),
        "attention_mask": order(ones, torch.zeros_like(pad)),
    }
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    plain, out = decisions(model, **batch)
    wide, wide_out = decisions(model, **padded)
    real = slice(amount, None) if side == "left" else slice(0, ones.shape[1])
    assert_same(plain, {n: g if granularity == "prompt" else g[:, real] for n, g in wide.items()}, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide_out.logits[:, real], out.logits, rtol=1e-4, atol=1e-5)
    model.train()
    torch.testing.assert_close(model(**padded).aux_loss, model(**batch).aux_loss, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_decide_alone():
    model = wrapped()
    both, _ = decisions(model, input_ids=torch.cat([PROMPT, PROMPT + 20]))
    alone, _ = decisions(model, input_ids=PROMPT + 20)
    assert_same({name: gates[1:] for name, gates in both.items()}, alone)


def test_interleaved_generations_keep_their_own_decision():
    model = wrapped().requires_grad_(False)
    other = (PROMPT + 20) % 90
    first, second = model(input_ids=PROMPT, use_cache=True), model(input_ids=other, use_cache=True)
    cache = copy.deepcopy(first.past_key_values)
    late = model(input_ids=ANSWER[:, :1], past_key_values=first.past_key_values).logits
    fresh = model(input_ids=PROMPT, use_cache=True)
    torch.testing.assert_close(late, model(input_ids=ANSWER[:, :1], past_key_values=fresh.past_key_values).logits)
    model(input_ids=ANSWER[:, :1], past_key_values=second.past_key_values)
    with pytest.raises(molora.RoutingError, match="cache"):
        model(input_ids=ANSWER[:, :1], past_key_values=cache)


def test_encoder_decoder_decides_from_the_source_and_the_start_token():
    model = wrapped(tiny_t5)
    mask = torch.ones_like(PROMPT)
    short, _ = decisions(model, input_ids=PROMPT, attention_mask=mask, labels=ANSWER)
    other, _ = decisions(model, input_ids=PROMPT, attention_mask=mask, labels=ANSWER + 9)
    assert_same(short, other, rtol=0, atol=0)
    pad = torch.full((1, 3), 50)
    padded, _ = decisions(
        model,
        input_ids=torch.cat([PROMPT, pad], 1),
        attention_mask=torch.cat([mask, torch.zeros_like(pad)], 1),
        labels=ANSWER,
    )
    assert_same(short, padded, rtol=1e-4, atol=1e-5)


def test_explicit_prompt_mask():
    """Several turns: what counts as prompt can be told, and must fit the input."""
    model = wrapped()
    ids = torch.cat([PROMPT, ANSWER], 1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, : PROMPT.shape[1]] = True
    told, _ = decisions(model, input_ids=ids, prompt_mask=mask)
    labelled, _ = decisions(model, **sequence(PROMPT, ANSWER))
    assert_same(told, labelled)
    with pytest.raises(molora.RoutingError, match="prompt_mask"):
        model(input_ids=ids, prompt_mask=mask[:, 1:])
