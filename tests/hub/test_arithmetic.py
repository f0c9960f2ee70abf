"""Arithmetic of adapters against dense matrices, scipy, PEFT's add_weighted_adapter, and every other factoring."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import molora
from molora.errors import ConfigError, LoadError
from molora.hub import arithmetic as ar
from molora.hub.clusters import cluster
from tests.adapters import WEIGHTS, change_tensors, logits
from tests.hub.loras import SIZES, Q, V, lora
from tests.posthoc.mixtures import save_lora
from tests.tiny import tiny_llama


def dense(change, path):
    """(d_out, d_in) of a change, zero where it does not touch the layer."""
    d_in, d_out = SIZES[path]
    if path not in change.layers:
        return np.zeros((d_out, d_in))
    A, B = change.layers[path]
    return (B @ A).numpy()


def dense_of_folder(folder, path, scale):
    """The same from the file, by plain numpy."""
    tensors = load_file(folder / WEIGHTS)
    A, B = (tensors.get(f"base_model.model.{path}.lora_{part}.weight") for part in "AB")
    d_in, d_out = SIZES[path]
    return np.zeros((d_out, d_in)) if A is None else scale * B.double().numpy() @ A.double().numpy()


@pytest.fixture
def three(tmp_path):
    """LoRAs of different ranks, alphas and layers, with their scales."""
    return [
        (lora(tmp_path / "a", 1, rank=2, alpha=4), 2.0),
        (lora(tmp_path / "b", 2, rank=5, alpha=3, paths=(Q,)), 3 / 5),
        (lora(tmp_path / "c", 3, rank=3, alpha=6, paths=(V,), use_rslora=True), 6 / 3**0.5),
    ]


def regauged(folder, seed=0):
    """The same LoRA with other factors: G A and B G^-1."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensors):
        for name in [n for n in tensors if ".lora_A." in n]:
            A, other = tensors[name], name.replace("lora_A", "lora_B")
            G = torch.randn(len(A), len(A), generator=generator, dtype=torch.float64) + 2 * torch.eye(len(A))
            tensors[name] = (G @ A.double()).contiguous()
            tensors[other] = (tensors[other].double() @ torch.linalg.inv(G)).contiguous()

    change_tensors(folder, change)
    return folder


def test_a_mix_is_the_sum_of_the_dense_changes(three):
    weights = [0.7, -1.3, 0.25]
    mixed = ar.mix([folder for folder, _ in three], weights)
    for path in (Q, V):
        want = sum(w * dense_of_folder(folder, path, s) for (folder, s), w in zip(three, weights, strict=True))
        np.testing.assert_allclose(dense(mixed, path), want, atol=1e-12)
    assert mixed.ranks == {Q: 2 + 5, V: 2 + 3}
    assert ar.mix([folder for folder, _ in three], [1, 0, 0]).ranks == {Q: 2, V: 2}


def test_average_concatenation_and_negation(three):
    folders = [folder for folder, _ in three]
    for path in (Q, V):
        total = sum(dense_of_folder(folder, path, scale) for folder, scale in three)
        np.testing.assert_allclose(dense(ar.average(folders), path), total / 3, atol=1e-12)
        np.testing.assert_allclose(dense(ar.concatenate(folders), path), total, atol=1e-12)
        np.testing.assert_allclose(dense(ar.negate(folders[0]), path), -dense_of_folder(folders[0], path, 2.0))
    nothing = ar.concatenate([folders[0], ar.negate(folders[0])])
    assert nothing.norm < 1e-12 < ar.read_change(folders[0]).norm


def test_similarity_is_the_cosine_of_the_dense_changes(three):
    changes = [ar.read_change(folder) for folder, _ in three]
    flat = np.stack([np.concatenate([dense(change, path).ravel() for path in (Q, V)]) for change in changes])
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    found = ar.similarity(changes).numpy()
    np.testing.assert_allclose(found, unit @ unit.T, atol=1e-12)
    assert found[1, 2] == 0  # no layer in common
    np.testing.assert_allclose([change.norm for change in changes], np.linalg.norm(flat, axis=1))
    both = ar.similarity([changes[0], ar.negate(changes[0])])
    torch.testing.assert_close(both, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_compression_is_the_best_of_its_rank_and_reports_its_error(three, rank):
    mixed = ar.average([folder for folder, _ in three])
    small = ar.compress(mixed, rank)
    lost = whole = 0.0
    for path in (Q, V):
        full, got = dense(mixed, path), dense(small.change, path)
        U, s, Vt = scipy.linalg.svd(full, full_matrices=False)
        np.testing.assert_allclose(got, (U[:, :rank] * s[:rank]) @ Vt[:rank], atol=1e-10)
        np.testing.assert_allclose(small.errors[path], np.linalg.norm(full - got) / np.linalg.norm(full), atol=1e-10)
        lost, whole = lost + np.linalg.norm(full - got) ** 2, whole + np.linalg.norm(full) ** 2
        assert small.change.ranks[path] <= rank
    np.testing.assert_allclose(small.error, (lost / whole) ** 0.5, atol=1e-10)
    assert (small.error > 1e-3) == (rank < 7)


def test_copies_compress_to_the_rank_of_one_and_tolerance_chooses_the_rank(three):
    folder = three[0][0]
    again = ar.compress(ar.average([folder] * 4))
    assert again.change.ranks == {Q: 2, V: 2} and again.error < 1e-12
    loose = ar.compress(ar.average([f for f, _ in three]), tolerance=0.5)
    assert max(loose.errors.values()) <= 0.5 and loose.change.ranks[Q] < 7


def test_another_factoring_of_the_same_adapters_changes_nothing(tmp_path):
    plain = [lora(tmp_path / f"p{seed}", seed, rank=3, dtype=torch.float64) for seed in range(4)]
    other = [regauged(lora(tmp_path / f"o{seed}", seed, rank=3, dtype=torch.float64), seed) for seed in range(4)]
    A, G = (load_file(folder / WEIGHTS)[f"base_model.model.{Q}.lora_A.weight"] for folder in (plain[0], other[0]))
    assert (A - G).abs().max() > 0.05
    torch.testing.assert_close(ar.similarity(plain), ar.similarity(other))
    for path in (Q, V):
        for made in (ar.average, lambda x: ar.compress(ar.average(x), 2).change, lambda x: ar.negate(x[0])):
            np.testing.assert_allclose(dense(made(plain), path), dense(made(other), path), atol=1e-12)
    assert cluster(plain, 2).labels == cluster(other, 2).labels
    # which the mean of the factors does not survive
    factors = [
        sum(load_file(f / WEIGHTS)[f"base_model.model.{Q}.lora_B.weight"] for f in folders)
        @ sum(load_file(f / WEIGHTS)[f"base_model.model.{Q}.lora_A.weight"] for f in folders)
        for folders in (plain, other)
    ]
    assert (factors[0] - factors[1]).norm() > 0.1 * factors[0].norm()


def test_averages_of_factors_are_refused(three):
    folders = [folder for folder, _ in three]
    for call in (lambda: ar.average(folders, space="factors"), lambda: ar.mix(folders, [1, 1, 1], space="linear")):
        with pytest.raises(ConfigError, match="no mean of LoRAs; space='delta' is exact"):
            call()


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_the_saved_sum_is_pefts_weighted_adapter(tmp_path, combination):
    folders = [save_lora(tmp_path / str(n), n, r=r, lora_alpha=alpha) for n, r, alpha in ((1, 4, 8), (2, 3, 9))]
    weights = [0.6, 1.4]
    theirs = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], "b")
    rank = {"svd_rank": 3} if combination == "svd" else {}
    theirs.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=combination, **rank)
    theirs.set_adapter("sum")
    mine = ar.mix(folders, weights)
    if combination == "svd":
        mine = ar.compress(mine, 3).change
    folder = ar.save_change(mine, tmp_path / "sum")
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    want = logits(theirs.eval())
    assert (want - logits(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), want, atol=1e-5, rtol=1e-5)
    layers = [m for m in loaded.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    assert {m.r["default"] for m in layers} == ({7} if combination == "cat" else {3})


def test_layers_of_different_ranks_survive_saving_exactly_where_they_belong(tmp_path):
    ours = [
        save_lora(tmp_path / "x", 1, r=2, target_modules=["q_proj", "down_proj"]),
        save_lora(tmp_path / "y", 2, r=5, target_modules=["q_proj", "v_proj"], use_rslora=True),
    ]
    mixed = ar.average(ours)
    assert set(mixed.ranks.values()) == {2, 5, 7}
    back = ar.read_change(ar.save_change(mixed, tmp_path / "saved"))
    assert back.ranks == mixed.ranks
    torch.testing.assert_close(ar.similarity([mixed, back]), torch.ones(2, 2, dtype=torch.float64))
    assert abs(back.norm - mixed.norm) < 1e-6 * mixed.norm
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
    mixture = molora.import_peft(tiny_llama(), ours).eval()  # uniform gates
    torch.testing.assert_close(logits(loaded), logits(mixture), atol=1e-5, rtol=1e-5)


def test_negation_saved_takes_away_what_the_adapter_adds(tmp_path):
    folder = save_lora(tmp_path / "x", 1)
    model = PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()
    undone = PeftModel.from_pretrained(model, ar.save_change(ar.negate(folder), tmp_path / "minus")).eval()
    torch.testing.assert_close(logits(undone), logits(tiny_llama()), atol=1e-5, rtol=1e-5)


def test_loaded_adapters_are_what_their_folders_are(tmp_path):
    folders = [save_lora(tmp_path / f"lora_{n}", n, r=n + 1) for n in (1, 2)]
    want = [ar.read_change(folder) for folder in folders]
    plain = PeftModel.from_pretrained(tiny_llama(), folders[0])
    plain.load_adapter(folders[1], "second")
    mixture = molora.import_peft(tiny_llama(), folders)
    for got in (
        [ar.change_of(plain), ar.change_of(plain, "second")],
        [ar.change_of(mixture, expert=0), ar.change_of(mixture, expert="lora_2")],
    ):
        for mine, theirs in zip(got, want, strict=True):
            assert mine.layers.keys() == theirs.layers.keys() and mine.ranks == theirs.ranks
            for path in mine.layers:
                torch.testing.assert_close(
                    mine.layers[path][1] @ mine.layers[path][0], theirs.layers[path][1] @ theirs.layers[path][0]
                )
    with pytest.raises(ConfigError, match="say which expert"):
        ar.change_of(mixture)
    with pytest.raises(ConfigError, match="plain LoRA"):
        ar.change_of(plain, expert=0)
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        ar.change_of(plain, "secnd")
    dora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(LoadError, match="DoRA"):
        ar.change_of(dora)


def spread_of(points, labels):
    groups = [points[[i for i, label in enumerate(labels) if label == g]] for g in set(labels)]
    return sum(((group - group.mean(0)) ** 2).sum() for group in groups)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_clusters_are_the_best_partition_of_the_dense_directions(tmp_path, groups):
    changes = [ar.read_change(lora(tmp_path / str(seed), seed)) for seed in range(4)]
    changes += [ar.mix([changes[0], changes[3]], [1.0, 0.4]), ar.mix([changes[1], changes[2]], [0.8, 0.3])]
    flat = np.stack([np.concatenate([dense(change, path).ravel() for path in (Q, V)]) for change in changes])
    points = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    every = (p for p in itertools.product(range(groups), repeat=6) if len(set(p)) == groups)
    best = min(spread_of(points, partition) for partition in every)
    found = cluster(changes, groups)
    assert len(found.members) == groups and sorted(itertools.chain(*found.members)) == list(range(6))
    np.testing.assert_allclose([found.spread, spread_of(points, found.labels)], best, atol=1e-12)


def test_planted_families_are_found_whatever_their_size(tmp_path):
    roots = [ar.read_change(lora(tmp_path / f"root{seed}", seed)) for seed in range(3)]
    noise = [ar.read_change(lora(tmp_path / f"noise{seed}", 50 + seed)) for seed in range(9)]
    family = [ar.mix([roots[n % 3], noise[n]], [10.0 ** (n // 3 - 1), 0.03 * 10.0 ** (n // 3 - 1)]) for n in range(9)]
    found = cluster(family, 3)
    assert found.labels == (0, 1, 2) * 3
    assert cluster([family[0]] * 3, 2).spread == pytest.approx(0, abs=1e-12)  # copies, and no group is empty
    assert len(cluster([family[0]] * 3, 2).members) == 2


def test_what_does_not_belong_together_is_told_at_once(tmp_path):
    one = lora(tmp_path / "one", 1)
    alien = lora(tmp_path / "alien", 2, base_model_name_or_path="other/base", task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match=r"other/base, tiny/llama(.|\n)*task_type differs"):
        ar.average([one, alien])
    A, B = ar.read_change(one).layers[Q]
    narrow = ar.Change("narrow", {Q: (A[:, :-1], B)})
    with pytest.raises(ConfigError, match=r"\(32, 32\) in 'one' and \(32, 31\) in 'narrow'"):
        ar.similarity([one, narrow])
    silent = ar.Change("silent", {Q: (A, B * 0)})
    with pytest.raises(ConfigError, match="'silent' changes nothing"):
        ar.similarity([one, silent])
    for weights in ([1.0], [1.0, float("nan")], [0.0, 0.0]):
        with pytest.raises(ConfigError, match="weights"):
            ar.mix([one, one], weights)
    with pytest.raises(ConfigError, match="list of adapters"):
        ar.average(one)
    with pytest.raises(ConfigError, match="1 to 1 groups"):
        cluster([one], 2)
    with pytest.raises(ConfigError, match="rank >= 1"):
        ar.compress(one, 0)
    big = ar.mix([one], [1e9])
    with pytest.raises(ConfigError, match=r"does not fit into torch\.float16"):
        ar.save_change(big, tmp_path / "big", dtype=torch.float16)
    assert not (tmp_path / "big").exists()
