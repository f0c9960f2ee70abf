"""K-shot selection: scores by examples and rationales, difference in what adapters do, and the mixture after it."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora import ConfigError
from molora.control import routed_layers
from molora.posthoc import kshot
from tests.adapters import logits
from tests.posthoc.mixtures import mixture_of, save_lora, save_loras, trainable
from tests.tiny import tiny_inputs, tiny_llama


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 5)


def rotated(folder, to, seed=7):
    """The same LoRA in another factorisation: A -> Q A, B -> B Q^T."""
    import shutil

    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in tensors:
        if "lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            rank = tensors[name].shape[0]
            Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
            tensors[name], tensors[partner] = Q @ tensors[name], (tensors[partner] @ Q.T).contiguous()
    save_file(tensors, to / "adapter_model.safetensors", {"format": "pt"})
    return to


def pinned(model, expert, number):
    return molora.pin(model, torch.eye(number)[expert])


# --- difference -------------------------------------------------------------------------------------------------------


def test_a_copy_in_another_factorisation_has_similarity_one(loras, tmp_path):
    copy = rotated(loras[0], tmp_path / "copy")
    assert (logits(mixture_of([copy])) - logits(mixture_of([loras[0]]))).abs().max() < 1e-5  # the same function
    raw = []
    for part in ("A", "B"):
        key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
        a, b = (load_file(f / "adapter_model.safetensors")[key].flatten() for f in (loras[0], copy))
        raw.append(float(torch.nn.functional.cosine_similarity(a, b, dim=0).abs()))
    assert max(raw) < 0.6  # what comparing tensors would say
    similar = kshot.similarity(mixture_of([loras[0], copy, loras[1]]))
    assert float(similar[0, 1]) == pytest.approx(1.0, abs=1e-6)
    assert similar[0, 2] < 0.2
    torch.testing.assert_close(similar.diagonal(), torch.ones(3, dtype=torch.float64))


def test_similarity_is_the_cosine_of_the_whole_weight_changes(loras, tmp_path):
    others = [
        save_lora(tmp_path / "wide", 11, r=6),
        save_lora(tmp_path / "mlp", 12, target_modules=["up_proj", "q_proj"]),
    ]
    folders = [loras[0], *others]
    model = mixture_of(folders)
    whole = []
    for expert in range(3):
        gates = torch.eye(3)[expert]
        banks = [layer.molora_bank["default"] for layer in routed_layers(model).values()]
        whole.append(torch.cat([bank.delta_weight(gates).detach().double().flatten() for bank in banks]))
    want = torch.stack([torch.stack([(a @ b).abs() / a.norm() / b.norm() for b in whole]) for a in whole])
    torch.testing.assert_close(kshot.similarity(model), want, atol=1e-6, rtol=1e-5)


def test_the_most_different_group_is_found_among_all(loras, tmp_path):
    generator = torch.Generator().manual_seed(3)
    half = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    similar = half + half.T
    found = kshot.most_diverse(similar, 4)

    def total(group):
        return sum(float(similar[i, j]) for i in group for j in group if i < j)

    assert total(found) == pytest.approx(min(total(group) for group in itertools.combinations(range(7), 4)))
    assert set(kshot.most_diverse(similar, 2, among=[5, 1, 3])) <= {5, 1, 3}
    copy = rotated(loras[0], tmp_path / "copy")
    assert kshot.most_diverse(kshot.similarity(mixture_of([loras[0], copy, loras[1], loras[2]])), 3) != (0, 1, 2)
    with pytest.raises(ConfigError, match="there are 3 experts"):
        kshot.most_diverse(similar[:3, :3], 4)
    with pytest.raises(ConfigError, match="make a shorter list"):
        kshot.most_diverse(torch.zeros(60, 60), 8)


# --- scores -----------------------------------------------------------------------------------------------------------


def planted(model, number, expert=0, rows=6):
    """Inputs, and what one expert finds likeliest at each position, as labels of the position after."""
    inputs = tiny_inputs(tiny_llama(), batch=rows, length=10)
    with torch.no_grad(), pinned(model, expert, number):
        answers = model(**inputs).logits.argmax(-1)
    return inputs, torch.cat([torch.full_like(answers[:, :1], -100), answers[:, :-1]], 1)


def test_an_expert_is_right_on_what_it_says_itself(loras):
    model = mixture_of(loras)
    inputs, labels = planted(model, 5, expert=3)
    accuracy, perplexity = kshot.score_experts(model, [{**inputs, "labels": labels}], [{**inputs, "labels": labels}])
    assert accuracy[3] == 1.0 and (accuracy[[0, 1, 2, 4]] < 0.5).all()
    assert perplexity.argmin() == 3
    with torch.no_grad(), pinned(model, 3, 5):
        rows = [{k: v[i : i + 1] for k, v in inputs.items()} | {"labels": labels[i : i + 1]} for i in range(6)]
        want = sum(math.exp(float(model(**row).loss)) for row in rows) / 6  # transformers' own loss
    assert float(perplexity[3]) == pytest.approx(want, rel=1e-5)


def test_a_blind_guesser_ranks_below_an_expert_that_knows_why(loras):
    """Both are right, but one of them finds the rationale no likelier than anything else."""
    model = mixture_of(loras[:2])
    inputs, labels = planted(model, 2, expert=1, rows=24)  # the rationale is that of expert 1
    with torch.no_grad(), pinned(model, 0, 2):
        guess = model(**inputs).logits.argmax(-1)[:, :-1]
    agree = torch.cat([torch.zeros(24, 1, dtype=torch.bool), guess == labels[:, 1:]], 1)  # where both say the same
    rows = agree.any(1)
    assert rows.sum() >= 2
    answers = torch.where(agree, labels, -100)
    pick = {name: tensor[rows] for name, tensor in inputs.items()}
    accuracy, perplexity = kshot.score_experts(
        model, [{**pick, "labels": answers[rows]}], [{**pick, "labels": labels[rows]}]
    )
    assert accuracy.tolist() == [1.0, 1.0] and perplexity[1] < perplexity[0]
    assert kshot.rank(accuracy, perplexity) == [1, 0]
    uniform = torch.tensor([1.0, 96.0], dtype=torch.float64)  # a rationale of 96 tokens at random
    for mix in (0.01, 0.5, 1.0):
        assert kshot.rank(torch.ones(2), uniform.flip(0), mix) == [1, 0]
    assert kshot.rank(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 96.0]), 0.0) == [1, 0]


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_nearest_to_the_mean_of_the_shots_without_near_copies():
    generator = torch.Generator().manual_seed(0)
    shots, pool = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    found = kshot.nearest(shots, pool, 10)
    distances = [float((item - shots.mean(0)).norm()) for item in pool]
    assert found == sorted(range(40), key=lambda i: distances[i])[:10]
    crowded = torch.cat([pool, pool[:20] * 3.0 + 0.01 * torch.randn(20, 8, generator=generator)])
    kept = kshot.deduplicate(crowded, 0.1)
    unit = torch.nn.functional.normalize(crowded, dim=-1)
    cosines = unit @ unit.T
    assert all(1 - cosines[i, j] >= 0.1 - 1e-6 for i in kept for j in kept if i != j)
    dropped = set(range(60)) - set(kept)
    assert dropped >= set(range(40, 60))  # every scaled copy
    assert all(any(1 - cosines[i, j] < 0.1 for j in kept if j < i) for i in dropped)  # each for a reason


# --- the mixture ------------------------------------------------------------------------------------------------------


def test_the_best_and_most_different_become_a_trained_top_2_mixture(loras, tmp_path):
    copy = rotated(loras[0], tmp_path / "copy")
    folders = [*loras[:4], copy]
    model = mixture_of(folders)
    inputs, labels = planted(model, 5)
    batch = {**inputs, "labels": labels}
    found = kshot.select(model, [batch], [batch], shortlist=4, size=3)
    assert {0, 4} <= set(found.shortlist) and not {0, 4} <= set(found.chosen)  # one of the two copies
    want = {expert: logits_of(model, expert, 5) for expert in found.chosen}
    kshot.build(model, examples=[batch], rationales=[batch], shortlist=4, size=3)
    config = model.peft_config["default"]
    assert config.experts["num"] == 3
    assert config.experts["names"] == [folders[expert].name for expert in found.chosen]
    for slot, expert in enumerate(found.chosen):
        torch.testing.assert_close(logits_of(model, slot, 3), want[expert], atol=1e-6, rtol=1e-6)
    with molora.record(model) as log, torch.no_grad():
        model(**inputs)
    assert all((routing.gates != 0).sum(-1).eq(2).all() for routing in log.values())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    before, losses = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    for _ in range(8):
        loss = model.train()(**batch).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model) and {name.rpartition(".")[2] for name in moved} == {"A", "Bt", "weight"}
    molora.save(model.eval(), tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved")), logits(model))


def logits_of(model, expert, number):
    with pinned(model, expert, number):
        return logits(model)


def test_experts_of_different_ranks_and_layers_are_kept_exactly(loras, tmp_path):
    folders = [
        loras[0],
        save_lora(tmp_path / "wide", 21, r=6, use_rslora=True),
        save_lora(tmp_path / "mlp", 22, r=2, target_modules=["down_proj"], lora_alpha=5),
    ]
    model = mixture_of(folders)
    want = [logits_of(model, expert, 3) for expert in (2, 0)]
    kshot.build(model, experts=[2, 0], k=1, train_experts=False)
    for slot, one in enumerate(want):
        torch.testing.assert_close(logits_of(model, slot, 2), one, atol=1e-6, rtol=1e-6)
    assert all(".molora_router." in name for name in trainable(model))
    molora.save(model, tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved")), logits(model))


def test_any_score_of_the_model_may_take_the_place_of_examples(loras):
    model = mixture_of(loras)
    want = [float(logits_of(model, expert, 5).std()) for expert in range(5)]
    found = kshot.select(model, score=lambda m: float(logits(m).std()), shortlist=3, size=2)
    assert found.accuracy.tolist() == pytest.approx(want)
    assert list(found.shortlist) == sorted(range(5), key=lambda expert: -want[expert])[:3]
    kshot.build(model, score=lambda m: float(logits(m).std()), shortlist=3, size=2)
    assert model.peft_config["default"].experts["names"] == [loras[expert].name for expert in found.chosen]
    with pytest.raises(ConfigError, match="either examples"):
        kshot.select(mixture_of(loras))


def test_wrong_numbers_are_told_and_change_nothing(loras):
    model = mixture_of(loras)
    before = logits(model)
    with pytest.raises(ConfigError, match="give either examples or a score to select by, or experts"):
        kshot.build(model)
    with pytest.raises(ConfigError, match="there is no expert 7, only 0 to 4"):
        kshot.build(model, experts=[0, 7])
    with pytest.raises(ConfigError, match="k must be between 1 and the number of experts that are kept, 2, got 3"):
        kshot.build(model, experts=[0, 1], k=3)
    inputs, labels = planted(model, 5)
    with pytest.raises(ConfigError, match="size must be between 1 and shortlist 8 and the number of experts 5, got 6"):
        kshot.select(model, [{**inputs, "labels": labels}], size=6)
    assert torch.equal(logits(model), before)
