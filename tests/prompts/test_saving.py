"""A saved selector chooses exactly as it did, in a new object; damaged folders and other embedders are refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora.errors import LoadError, MoloraError
from molora.prompts.embed import build_embedder
from molora.prompts.registry import guards, prompt_selectors
from molora.prompts.saving import SELECTOR, VECTORS, load_selector, save_selector, saved_embedder, wants_model
from molora.prompts.selector import PromptSelector
from tests.prompts.planted import Planted, examples
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPTS = ["art:900", "law:900", "news:900", "weather:1"]


@pytest.fixture
def folder(tmp_path):
    selector = PromptSelector(build_embedder("words")).fit(examples("art", "law"), {"art": "ab" * 32})
    return save_selector(selector, tmp_path / "selector")


@pytest.mark.parametrize("method", list(prompt_selectors))
@pytest.mark.parametrize("guard", [None, *guards])
def test_what_is_loaded_chooses_exactly_as_what_was_saved(method, guard, tmp_path):
    texts = examples("art", "law", "news")
    selector = PromptSelector(Planted(), method, guard=guard, top_k=2, temperature=0.2).fit(texts, {"art": "ab" * 32})
    folder = save_selector(selector, tmp_path / "selector")
    assert sorted(path.name for path in folder.iterdir()) == [VECTORS, SELECTOR]
    loaded = load_selector(folder, Planted())
    for allowed in (None, {"art", "law"}, {"news"}, ()):
        assert loaded.select(PROMPTS, allowed) == selector.select(PROMPTS, allowed)
    assert loaded.digest == selector.digest and loaded.sources == {"art": "ab" * 32}
    again = save_selector(loaded, tmp_path / "again")
    for name in (VECTORS, SELECTOR):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_it_builds_its_own_embedder(folder):
    loaded = load_selector(folder)
    assert loaded.embedder.name == "words" and loaded.select(["law 901"])[0].names == ("law",)
    assert not wants_model(folder) and saved_embedder(folder) == {"name": "words", "size": 1024}


def test_it_says_that_it_wants_a_model(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    embed = build_embedder({"name": "base", "layer": 1}, model, tokenizer)
    selector = PromptSelector(embed).fit({"a": ["good film"], "b": ["bad market"]})
    folder = save_selector(selector, tmp_path / "selector")
    assert wants_model(folder) and saved_embedder(folder)["layer"] == 1
    loaded = load_selector(folder, model=model, tokenizer=tokenizer)
    assert loaded.select(["film"]) == selector.select(["film"])
    with pytest.raises(MoloraError, match="give the model"):
        load_selector(folder)
    with pytest.raises(LoadError, match="do not compare"):
        load_selector(folder, model=tiny_llama(seed=1), tokenizer=tokenizer)


def test_another_embedder_is_refused(folder, tmp_path):
    with pytest.raises(LoadError, match="do not compare"):
        load_selector(folder, build_embedder({"name": "words", "size": 512}))
    own = save_selector(
        PromptSelector(lambda texts: [[1.0, len(t)] for t in texts]).fit({"a": ["x"]}), tmp_path / "own"
    )
    with pytest.raises(LoadError, match="embedder of your own"):
        load_selector(own)
    assert saved_embedder(own) is None and not wants_model(own)
    assert load_selector(own, lambda texts: [[1.0, len(t)] for t in texts]).names == ("a",)


def test_every_setting_and_example_is_in_the_version():
    def version(method="centroid", texts=None, embed=None, **options):
        return PromptSelector(embed or Planted(), method, **options).fit(texts or examples("a", "b")).version

    versions = [
        version(),
        version("knn"),
        version({"name": "knn", "neighbours": 3}),
        version(guard=None),
        version(guard={"name": "nearest", "rate": 0.1}),
        version(top_k=2),
        version(temperature=0.5),
        version(texts=examples("a", "b", number=29)),
        version(texts=examples("a", "c")),
        version(embed=Planted(noise=0.26)),
    ]
    assert len(set(versions)) == len(versions) and version() == versions[0] and len(versions[0]) == 12


def spoil_weights(folder):
    tensors = load_file(folder / VECTORS)
    save_file({**tensors, "examples": tensors["examples"] + 1}, folder / VECTORS)


def spoil_yaml(folder, old, new):
    text = (folder / SELECTOR).read_text()
    assert old in text
    (folder / SELECTOR).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "not the file that selector.yaml describes"),
        (lambda f: (f / VECTORS).write_bytes((f / VECTORS).read_bytes()[:-5]), "selector.safetensors"),
        (lambda f: (f / VECTORS).unlink(), "missing"),
        (lambda f: (f / SELECTOR).unlink(), "no usable selector.yaml"),
        (lambda f: (f / SELECTOR).write_text("[1, 2"), "not readable YAML"),
        (lambda f: (f / SELECTOR).write_text("a: 1"), "must have the keys"),
        (lambda f: (f / SELECTOR).write_bytes(b"\xff\xfe"), "utf-8"),
        (lambda f: spoil_yaml(f, "format: 1", "format: 2"), "has format 2"),
        (lambda f: spoil_yaml(f, "name: art", "name: bar"), "changed by hand"),
        (lambda f: spoil_yaml(f, "top_k: 1", "top_k: 2"), "changed by hand"),
        (lambda f: spoil_yaml(f, "examples: 30", "examples: 31"), "cannot|no prompt selector"),
        (lambda f: spoil_yaml(f, "top_k: 1", "top_l: 1"), "no prompt selector"),
        (lambda f: spoil_yaml(f, "size: 1024", "size: 512"), "do not compare"),
        (lambda f: spoil_yaml(f, "size: 1024", "size: big"), "no prompt selector"),
    ],
)
def test_damaged_folders_are_refused(spoil, message, folder):
    spoil(folder)
    with pytest.raises(MoloraError, match=message):
        load_selector(folder)


def test_nan_is_refused(folder):
    import hashlib

    tensors = load_file(folder / VECTORS)
    tensors["examples"][0, 0] = torch.nan
    before = hashlib.sha256((folder / VECTORS).read_bytes()).hexdigest()
    save_file(tensors, folder / VECTORS)
    spoil_yaml(folder, before, hashlib.sha256((folder / VECTORS).read_bytes()).hexdigest())
    with pytest.raises(LoadError, match="NaN or Inf"):
        load_selector(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LoadError, match="molora prompts fit"):
        load_selector(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_the_old_selector_or_the_new_one(folder, tmp_path):
    old, found = load_selector(folder).digest, []
    new = PromptSelector(build_embedder("words"), guard=None).fit({"new": ["x y", "z"]})
    for step in range(4):  # 1 rename of the draft and 2 of its files
        copy = shutil.copytree(folder, tmp_path / f"copy{step}")
        code = save_and_die(new, copy, step)
        loaded = load_selector(copy)
        found.append((code, loaded.names))
        assert loaded.names == ("new",) or loaded.digest == old
        assert not [path for path in copy.iterdir() if path.name == ".incoming"]
    assert found == [(9, ("art", "law")), (9, ("new",)), (9, ("new",)), (0, ("new",))]


def save_and_die(selector, folder, step):
    """Save in a child process that dies at its rename number `step`; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, rename, left = 1, os.replace, [step]

    def replace(*names):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return rename(*names)

    try:
        os.replace = replace
        save_selector(selector, folder)
        code = 0
    finally:
        os._exit(code)


def test_no_text_is_kept(folder):
    told = (folder / SELECTOR).read_text() + (folder / VECTORS).read_bytes().decode("latin-1")
    assert not any(text in told for text in examples("art", "law")["law"])
    json.dumps(load_selector(folder).settings)
