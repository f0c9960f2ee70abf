"""Search: filters, words, meaning, and what adapters do, against plain matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from molora.errors import ConfigError, LoadError
from molora.hub.deltas import cosine, inner, read_deltas
from molora.hub.store import Hub
from tests.adapters import wrapped
from tests.hub.loras import SIZES, Q, V, lora, write
from tests.tiny import tiny_llama

CARDS = {
    "news": ("topic", "Sorts headlines.", "a/minilm"),
    "films": ("sentiment", "Says whether a review is kind.", "a/minilm"),
    "law": ("topic", "Finds the field of a contract.", "b/llama"),
}


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "hub")
    for seed, (name, (task, description, base)) in enumerate(CARDS.items()):
        hub.add(lora(tmp_path / name, seed=seed), name, {"task": task, "description": description, "base": base})
    return hub


def names(hits):
    return [hit.entry.name for hit in hits]


# --- filters ----------------------------------------------------------------------------------------------------------


def test_filters(hub, tmp_path):
    hub.add(wrapped(), "mix", task="Topic")
    assert names(hub.search(task="TOPIC")) == ["law", "mix", "news"]
    assert names(hub.search(base="a/minilm")) == names(hub.search(base="MiniLM")) == ["films", "news"]
    assert names(hub.search(base="x/minilm")) == names(hub.search(base="mini")) == []
    assert names(hub.search(kind="mixture")) == ["mix"]
    assert names(hub.search(kind="lora", task="topic", base="llama")) == ["law"]
    assert names(hub.search("headlines contract", task="topic", base="a/minilm")) == ["news"]
    assert names(hub.search(limit=2)) == ["films", "law"]
    hub.add(tmp_path / "news", "news", hub.get("news").card.replace(task="sentiment"))
    assert names(hub.search(task="topic")) == ["law", "mix"]  # only the newest version counts
    assert [str(hit.entry.ref) for hit in hub.search(task="topic", all_versions=True)] == ["law@1", "mix@1", "news@1"]
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        hub.search(limit=0)
    with pytest.raises(ConfigError, match="by text or by like, not by both"):
        hub.search("x", like="news")


def test_a_base_model_is_known_by_its_weights(hub, tmp_path):
    hub.add(lora(tmp_path / "x"), "seed0", base_model=tiny_llama())
    hub.add(lora(tmp_path / "x"), "seed1", base_model=tiny_llama(seed=1))
    assert names(hub.search(base=tiny_llama())) == ["seed0"]
    assert names(hub.search(base=tiny_llama().bfloat16())) == ["seed0"]  # the same base in another precision
    model = tiny_llama(seed=2)
    model.config._name_or_path = "somewhere/b/llama"
    assert names(hub.search(base=model)) == []
    model.config._name_or_path = "b/llama"  # cards without a fingerprint go by name
    assert names(hub.search(base=model)) == ["law"]


def test_words_rank(hub):
    hits = hub.search("headlines reviews topic")
    assert names(hits)[0] == "news" and set(names(hits)) == {"news", "law"}
    assert [hit.by for hit in hits] == ["words"] * 2
    assert hits[0].score > hits[1].score > 0
    assert names(hub.search("review")) == ["films"]


# --- meaning ----------------------------------------------------------------------------------------------------------


class Bag:
    """Counts the words of a small vocabulary: a meaning that can be computed by hand."""

    name, words = "bag", ("headlines", "review", "contract", "kind")

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return [[0.25 + text.count(word) for word in self.words] for text in texts]


def cos(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    return float(a @ b / (a.norm() * b.norm()))


def test_meaning_is_the_cosine_to_the_descriptions(hub):
    bag = Bag()
    hits = hub.search("a contract review", embedder=bag)
    (query,) = bag(["a contract review"])
    want = {name: cos(query, bag([description])[0]) for name, (_, description, _) in CARDS.items()}
    assert {hit.entry.name: hit.score for hit in hits} == pytest.approx(want)
    assert names(hits) == sorted(want, key=lambda name: (-want[name], name))
    assert {hit.by for hit in hits} == {"meaning"}


def test_embeddings_in_cards_are_used_when_they_are_of_this_embedder(hub, tmp_path):
    stored = {"embedder": "bag", "values": [0.0, 0.0, 0.0, 1.0]}
    hub.add(tmp_path / "news", "stored", description="not looked at", embedding=stored)
    hub.add(tmp_path / "news", "other", description="headlines", embedding={"embedder": "else", "values": [1.0]})
    hub.add(tmp_path / "news", "silent")
    bag = Bag()
    hits = {hit.entry.name: hit.score for hit in hub.search("kind", embedder=bag)}
    assert "not looked at" not in bag.asked and "headlines" in bag.asked
    assert hits["stored"] == pytest.approx(cos([0.25, 0.25, 0.25, 1.25], stored["values"]))
    assert "silent" not in hits  # nothing is said of it
    assert (
        hub.search("kind", embedder=lambda texts: torch.tensor(Bag()(texts)), embedder_name="bag")[0].score
        == hits["stored"]
    )
    with pytest.raises(ConfigError, match=r"'stored@1' was embedded by 'bag' with 4 numbers, this embedder gives 2"):
        hub.search("kind", embedder=lambda texts: [[1.0, 2.0]] * len(texts), embedder_name="bag")
    for wrong in ([1.0], [[1.0]], [[float("nan")]] * 5, [[[1.0]]]):
        with pytest.raises(ConfigError, match="must return"):
            hub.search("kind", embedder=lambda texts, w=wrong: w)
    with pytest.raises(ConfigError, match="needs the text"):
        hub.search(embedder=bag)


# --- what adapters do -------------------------------------------------------------------------------------------------


def matrices(folder, alpha_over_r):
    """s B A per layer, by plain products over the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.{}.lora_{}.weight"
    return {
        path: alpha_over_r * tensors[stem.format(path, "B")].double() @ tensors[stem.format(path, "A")].double()
        for path in SIZES
        if stem.format(path, "A") in tensors
    }


def plain_cosine(a, b):
    """Of the weights of a whole model, zero where an adapter has no layer."""
    flat = [torch.cat([one.get(p, torch.zeros(SIZES[p][::-1])).double().flatten() for p in SIZES]) for one in (a, b)]
    return cos(*(vector.tolist() for vector in flat))


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    paths=st.sampled_from([(Q, V), (Q,)]),
    alpha=st.floats(0.5, 8),
)
def test_cosine_is_that_of_the_matrices(tmp_path_factory, ranks, paths, alpha):
    folder = tmp_path_factory.mktemp("c")
    a = lora(folder / "a", seed=1, rank=ranks[0], alpha=alpha)
    b = lora(folder / "b", seed=2, rank=ranks[1], paths=paths)
    mine, theirs = read_deltas(a), read_deltas(b)
    want = [matrices(a, alpha / ranks[0]), matrices(b, 4 / ranks[1])]
    for found, expected in zip((mine, theirs), want, strict=True):
        for path, (A, B) in found.items():
            torch.testing.assert_close(B @ A, expected[path])
    assert cosine(mine, theirs) == pytest.approx(plain_cosine(*want), abs=1e-6)
    assert cosine(mine, mine) == pytest.approx(1.0)
    assert inner(mine, mine) == pytest.approx(sum(float(m.square().sum()) for m in want[0].values()))


def test_scales_of_peft(tmp_path):
    """rslora and alpha patterns, against what PEFT itself multiplies."""
    config = {"alpha_pattern": {"v_proj": 3.0}, "use_rslora": True, "rank_pattern": {}}
    folder = lora(tmp_path / "a", rank=4, alpha=6.0, **config)
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    layers = dict(model.get_base_model().named_modules())
    for path, (A, B) in read_deltas(folder).items():
        torch.testing.assert_close((B @ A).float(), layers[path].get_delta_weight("default"))


def test_like(hub, tmp_path):
    A, B = (torch.randn(shape) for shape in ((2, 32), (32, 2)))
    stem = f"base_model.model.{Q}.lora_"

    def planted(name, A, B, **config):
        folder = write(
            tmp_path / name, {f"{stem}A.weight": A, f"{stem}B.weight": B}, r=A.shape[0], lora_alpha=2, **config
        )
        return hub.add(folder, name)

    turn = torch.linalg.qr(torch.randn(2, 2))[0] * 3
    planted("query-lora", A, B)
    planted("same", turn @ A, 5 * B @ torch.linalg.inv(turn))  # other factors, another length, the same direction
    planted("opposite", A, -B)
    planted("half", torch.cat([A, torch.randn(2, 32)]), torch.cat([B, torch.zeros(32, 2)], 1) + 0.0)
    planted("mixed", A + 0.3 * torch.randn(2, 32), B)
    hub.add(wrapped(), "mix")
    hub.add(lora(tmp_path / "elsewhere", paths=(V,)), "elsewhere")
    scores = {hit.entry.name: hit.score for hit in hub.search(like="query-lora")}
    assert scores["same"] == pytest.approx(1.0) and scores["half"] == pytest.approx(1.0)
    assert scores["opposite"] == pytest.approx(-1.0)
    assert 0.7 < scores["mixed"] < 0.999
    assert abs(scores["law"]) < 0.3
    assert not {"query-lora", "mix", "elsewhere"} & set(scores)
    assert cosine({}, {}) is None and cosine(read_deltas(tmp_path / "same"), {Q: (A.double() * 0, B.double())}) is None
    order = names(hub.search(like="query-lora"))
    assert set(order[:2]) == {"same", "half"} and order[2] == "mixed" and order[-1] == "opposite"
    assert names(hub.search(like="query-lora@1", limit=3, task="topic")) == sorted(
        ("law", "news"), key=lambda name: -scores[name]
    )
    with pytest.raises(LoadError, match="type 'MOLORA'; only LORA adapters"):
        hub.search(like="mix")
