"""RoMA: the pull towards correctly answered neighbours, in closed form and in a model."""

import pytest
import torch

import molora
from molora import AuxLossError, ConfigError
from molora.posthoc import roma
from molora.posthoc.rerouting import routers_of
from molora.posthoc.roma import Roma, imitation, neighbours
from tests.posthoc.mixtures import mixture_of, save_loras, trainable
from tests.tiny import tiny_inputs, tiny_llama


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3, build)


def build():
    return tiny_llama(num_hidden_layers=3)


def small(loras, layers=2):
    model = mixture_of(loras, build)
    generator = torch.Generator().manual_seed(0)
    for router in routers_of(model):
        router.scorer.weight.data = torch.randn(router.scorer.weight.shape, generator=generator)
    return roma.build(model, layers=layers)


# --- closed forms -----------------------------------------------------------------------------------------------------


def drawn(rows=1, k=3):
    r = torch.randn(rows, 2, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(rows, k, 2, 4, dtype=torch.float64)
    return r, targets, torch.softmax(torch.randn(rows, k, dtype=torch.float64), -1)


def test_the_gradient_is_two_lambda_times_the_weighted_differences():
    r, targets, W = drawn(rows=5)
    weight = 0.7
    (weight * imitation(r, targets, W)).backward()
    for i in range(5):
        want = 2 * weight * sum(W[i, j] * (r[i] - targets[i, j]) for j in range(3)).detach() / 5  # a mean over rows
        torch.testing.assert_close(r.grad[i], want)


def test_targets_get_no_gradient():
    r, targets, W = drawn()
    imitation(r, targets.requires_grad_(), W).backward()
    assert targets.grad is None and r.grad.abs().max() > 0


def test_the_loss_is_zero_only_where_every_neighbour_is_met():
    r, targets, W = drawn()
    assert imitation(r, r.detach()[:, None].expand(-1, 3, -1, -1), W) == 0
    assert imitation(r, targets, W) > 0
    one_off = r.detach()[:, None].repeat(1, 3, 1, 1)
    one_off[0, 2, 1, 3] += 0.1
    assert float(imitation(r, one_off, W).detach()) == pytest.approx(0.01 * float(W[0, 2]))


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_one_step_of_half_the_inverse_weight_lands_on_the_weighted_mean(weight):
    r, targets, W = drawn()
    (weight * imitation(r, targets, W)).backward()
    landed = r.detach() - r.grad / (2 * weight)
    torch.testing.assert_close(landed, (W[..., None, None] * targets).sum(1))


def test_neighbours_are_the_nearest_with_a_kernel_that_sums_to_one():
    generator = torch.Generator().manual_seed(1)
    of, among = torch.randn(4, 6, generator=generator), torch.randn(9, 6, generator=generator)
    numbers, weights = neighbours(of, among, 3, width=0.8)
    for i in range(4):
        d = [float((of[i] - other).norm()) for other in among]
        order = sorted(range(9), key=lambda j: d[j])[:3]
        assert numbers[i].tolist() == order
        kernel = torch.tensor([d[j] ** 2 for j in order]).div(-2 * 0.8**2).exp()
        torch.testing.assert_close(weights[i], kernel / kernel.sum())
    # far away the kernel itself is 0, its share is not; and nobody is his own neighbour
    _, far = neighbours(of + 1e3, among, 3, width=0.8)
    torch.testing.assert_close(far.sum(1), torch.ones(4))
    numbers, _ = neighbours(among, among, 2, without=list(range(9)))
    assert all(i not in row for i, row in enumerate(numbers.tolist()))
    with pytest.raises(ConfigError, match="no other sample to imitate"):
        neighbours(of[:1], among[:1], 3, without=[0])


# --- in a model -------------------------------------------------------------------------------------------------------


def samples(number=8):
    inputs = tiny_inputs(build(), batch=number, length=6)
    inputs["attention_mask"][1, 4:] = 0  # padding on the right
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    generator = torch.Generator().manual_seed(5)
    return inputs, torch.randn(number, 4, generator=generator)


def all_right(batch):
    return torch.ones(len(batch["input_ids"]), dtype=torch.bool)


def test_only_routers_of_the_last_blocks_are_tuned(loras):
    model = small(loras, layers=2)
    names = trainable(model)
    assert names and all(".molora_router." in name for name in names)
    assert {name.split(".layers.")[1][0] for name in names} == {"1", "2"}
    tuner = Roma(model, layers=2, weight=5.0)
    inputs, embeddings = samples()
    tuner.collect([(inputs, embeddings)], all_right)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    loss = tuner.loss(inputs, embeddings, range(8))
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names


def test_what_is_stored_is_the_routing_of_the_last_real_token_of_what_went_right(loras):
    model = small(loras)
    inputs, embeddings = samples()
    right = torch.tensor([True, True, False, True, False, False, True, True])
    tuner = Roma(model, layers=2)
    assert tuner.collect([(inputs, embeddings)], lambda batch: right) == 5 and tuner.ids == [0, 1, 3, 6, 7]
    with molora.record(model) as log, torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    last = torch.full((8,), 5)
    last[1] = 3
    want = torch.stack([log[site].probs[torch.arange(8), last] for site in tuner.sites], 1)
    torch.testing.assert_close(tuner._targets, want[right])
    assert len(tuner.sites) == 4  # q_proj and v_proj of two blocks
    # by default an answer is right when every label is the likeliest token
    with torch.no_grad():
        answers = model(inputs["input_ids"], inputs["attention_mask"]).logits.argmax(-1)
    labels = torch.full_like(answers, -100)
    labels[:, 1:4] = answers[:, :3]
    labels[4:, 2] += 1
    assert tuner.collect([({**inputs, "labels": labels}, embeddings)]) == 4 and tuner.ids == [0, 1, 2, 3]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_the_cross_entropy_plus_the_weighted_pull(loras, checkpointing):
    model = small(loras)
    inputs, embeddings = samples()
    tuner = Roma(model, layers=2, weight=0.9, width=1.0)
    tuner.collect([(inputs, embeddings)], all_right)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = tuner.loss(inputs, embeddings, range(8))
    loss.backward()
    with torch.no_grad():
        rows = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(8)]
        task = torch.stack([model(**row).loss for row in rows]).mean()  # transformers' own loss, row by row
    targets = tuner._targets
    pull = 0.0
    for i in range(8):
        d = (embeddings[i] - embeddings).norm(dim=-1)
        d[i] = torch.inf
        nearest = d.topk(3, largest=False)
        W = torch.softmax(-(nearest.values**2) / 2, -1)
        pull += sum(
            float(w * (targets[i] - targets[j]).square().sum()) for w, j in zip(W, nearest.indices, strict=True)
        )
    assert pull > 0.1
    torch.testing.assert_close(loss.detach(), task + 0.9 * pull / 8, atol=1e-5, rtol=1e-5)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_checkpointing_changes_no_gradient_and_the_reentrant_kind_is_refused(loras):
    grads = []
    for kind in (None, False, True):
        model = small(loras)
        inputs, embeddings = samples()
        tuner = Roma(model, layers=2, weight=3.0)
        tuner.collect([(inputs, embeddings)], all_right)
        model.train()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        if kind:
            with pytest.raises(AuxLossError, match="use_reentrant"):
                tuner.loss(inputs, embeddings, range(8))
            continue
        tuner.loss(inputs, embeddings, range(8)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_tuning_brings_neighbours_together(loras):
    model = small(loras)
    inputs, embeddings = samples()
    tuner = Roma(model, layers=2, weight=20.0)
    tuner.collect([(inputs, embeddings)], all_right)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    pulls = []
    for _ in range(25):
        with tuner._reading():
            model.train()(inputs["input_ids"], inputs["attention_mask"])
        pulls.append(float(tuner.imitation(tuner._routing(), embeddings, range(8)).detach()))
        optimizer.zero_grad()
        tuner.loss(inputs, embeddings, range(8)).backward()
        optimizer.step()
    assert pulls[-1] < 0.7 * pulls[0]


def test_what_cannot_work_is_told(loras):
    model = small(loras)
    with pytest.raises(ConfigError, match="layers must be a whole number >= 1, got 0"):
        Roma(model, layers=0)
    tuner = Roma(model)
    inputs, embeddings = samples()
    with pytest.raises(ConfigError, match=r"call collect\(samples\) first"):
        tuner.loss(inputs, embeddings)
    with pytest.raises(ConfigError, match="answered none of 8 samples correctly"):
        tuner.collect([(inputs, embeddings)], lambda batch: torch.zeros(8, dtype=torch.bool))
    from molora.posthoc import lorahub

    with pytest.raises(ConfigError, match="nothing to learn"):
        roma.build(lorahub.build(mixture_of(loras, build), weights=[1, 1, 1]))
