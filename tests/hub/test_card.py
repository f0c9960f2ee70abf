"""The card: round trips, strict reading, every problem at once, and files that try to do harm."""

import hashlib
from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.errors import ConfigError, LoadError
from molora.fingerprint import fingerprint
from molora.hub.card import CARD, MAX_CARD, AdapterCard, Embedding, hash_files, read_card

SHA = hashlib.sha256(b"").hexdigest()
FULL = {
    "format": 1,
    "task": "sentiment",
    "base": "a/minilm",
    "description": "Rates films.\nIn two lines: é, 你好, 'quotes' and a # sign.",
    "licence": "apache-2.0",
    "authors": ["A. Person", "no"],
    "data": ["imdb", "1.5"],
    "metrics": {"accuracy": 0.91, "imdb": {"accuracy": 0.91, "rows": 100}},
    "prompts": ["This film was a joy.", "- not a list", "null"],
    "embedding": {"embedder": "minilm", "values": [0.1, -2.5e-05, 3]},
    "fingerprint": {"structure": "ab", "samples": {"norm": {"dtype": "float32", "values": [1.0, 0.1, *[0] * 6]}}},
    "files": {"adapter_model.safetensors": SHA},
}


def test_a_full_card_survives_its_text():
    card = AdapterCard.from_dict(FULL)
    assert card.embedding == Embedding("minilm", (0.1, -2.5e-05, 3))
    assert AdapterCard.from_yaml(card.to_yaml()) == card
    assert yaml.safe_load(card.to_yaml()) == FULL  # what any other YAML reader sees
    assert card.to_dict() == FULL


texts = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" \n"), max_size=40)
numbers = st.floats(-1e299, 1e299) | st.integers(-(10**9), 10**9)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        AdapterCard,
        **dict.fromkeys(("task", "base", "description", "licence"), texts),
        **dict.fromkeys(("authors", "data", "prompts"), st.lists(texts, max_size=3)),
        metrics=st.dictionaries(texts, numbers | st.dictionaries(texts, numbers, max_size=2), max_size=3),
        embedding=st.none()
        | st.builds(lambda v: {"embedder": "e", "values": v}, st.lists(numbers, min_size=1).filter(any)),
    )
)
def test_any_card_survives_its_text(card):
    """Empty mappings and texts are left out and come back as the default, which they are; {} inside metrics stays."""
    assert AdapterCard.from_yaml(card.to_yaml()) == card


def test_a_fingerprint_of_a_model_survives():
    import torch

    made = fingerprint([("a.b", 2, 3)], {"norm": torch.randn(64), "w": torch.randn(8, 8).bfloat16()})
    card = AdapterCard(fingerprint=made)
    assert AdapterCard.from_yaml(card.to_yaml()).fingerprint == made


def test_floats_and_numbers_in_lines_that_people_read():
    lines = AdapterCard.from_dict(FULL).to_yaml().splitlines()
    assert "  values: [0.1, -2.5e-05, 3]" in lines
    assert "- imdb" in lines
    assert lines[0] == "format: 1"


WRONG = {
    "task": 3,
    "licence": "bad\x00byte",
    "description": "x" * 20_001,
    "authors": "A. Person",
    "data": ["ok", 7],
    "metrics": {"accuracy": "high", "loss": float("nan"), 3: 1.0, "by": {"a": True}},
    "prompts": ["x"] * 1_001,
    "embedding": {"embedder": "e", "values": [float("inf")]},
    "fingerprint": {"structure": "x"},
    "files": {"../x": SHA, "y": "zz", "a/b": SHA, ".hidden": SHA, "c:d": SHA},
    "license": "apache-2.0",
}


def test_every_problem_at_once():
    with pytest.raises(ConfigError) as error:
        AdapterCard.from_dict(WRONG)
    text = str(error.value)
    for needle in (
        "key 'license'; did you mean 'licence'",
        "task must be text, got 3",
        r"licence holds characters that cannot be shown: '\x00'",
        "description has 20,001 characters, 20,000 are allowed",
        "authors must be a list of texts, got 'A. Person'",
        "data [1] must be text, got 7",
        "metrics ['accuracy'] must be a finite number under a text, got 'high'",
        "metrics ['loss'] must be a finite number under a text, got nan",
        "metrics has the key 3, which is no text",
        "metrics ['by', 'a'] must be a finite number under a text, got True",
        "prompts has 1,001 entries, 1,000 are allowed",
        "embedding values must be finite numbers",
        "fingerprint is no fingerprint of a base model",
        "files names '../x', which is no plain file name",
        "files names 'a/b', which is no plain file name",
        "files names '.hidden', which is no plain file name",
        "files names 'c:d', which is no plain file name",
        "files ['y'] must be a sha256 in hexadecimal, got 'zz'",
    ):
        assert f"  - {needle}" in text, needle
    assert text.splitlines()[0] == "this card cannot be used: 18 problems"
    with pytest.raises(ConfigError, match="no such key: 'taks'; did you mean 'task'"):
        AdapterCard().replace(taks="x")


@pytest.mark.parametrize(
    "embedding",
    [
        {"embedder": "", "values": [1]},
        {"embedder": "e", "values": []},
        {"embedder": "e", "values": [0, 0]},
        {"embedder": "e", "values": [True]},
        {"embedder": "e", "values": ["1"]},
        {"values": [1]},
        [1, 2],
        {"embedder": "e", "values": [1], "norm": 2},
        {"embedder": "e", "values": [1] * 16_385},
    ],
)
def test_embeddings_that_are_none(embedding):
    with pytest.raises(ConfigError, match="embedding"):
        AdapterCard.from_dict({"embedding": embedding})


BAD_YAML = {
    "a: 1\na: 2": "key 'a' is there twice",
    "a: &x [1]\nb: *x": "anchors and aliases are not allowed",
    "a: &a [x,x]\nb: &b [*a,*a,*a,*a]": "anchors and aliases are not allowed",
    "a: !!python/object/apply:os.system ['true']": "could not determine a constructor",
    "a: [": "not readable YAML",
    "[" * 3000: "not readable YAML",
    "a: 2001-99-99": "not readable YAML",
    "{[1]: 2}": "not readable YAML",
    "- a": "a card is a mapping of keys, got list",
    "": "a card is a mapping of keys, got NoneType",
    "format: 2": "this molora reads format 1; update molora",
    "format: true": "this molora reads format 1",
    "a: \x07": "not readable YAML",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_yaml_that_is_no_card(text, tmp_path):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(LoadError) as error:
        read_card(tmp_path)
    assert BAD_YAML[text] in str(error.value)


def test_files_that_are_no_card(tmp_path):
    with pytest.raises(LoadError, match=r"card\.yaml is missing; write one, or add the adapter"):
        read_card(tmp_path)
    (tmp_path / CARD).write_bytes(b"task: \xff\xfe")
    with pytest.raises(LoadError, match="cannot be read"):
        read_card(tmp_path)
    with (tmp_path / CARD).open("wb") as file:
        file.truncate(MAX_CARD + 1)
    with pytest.raises(LoadError, match="bytes, 2,000,000 are allowed"):
        read_card(tmp_path)
    (tmp_path / CARD).unlink()
    (tmp_path / "elsewhere").write_text("task: x")
    (tmp_path / CARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match="missing"):
        read_card(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_make_anything_but_a_card_or_a_load_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / CARD).write_bytes(content)
    with suppress(LoadError):
        assert isinstance(read_card(folder), AdapterCard)


def test_hashes_and_digest(tmp_path):
    for name, content in {"b": b"2", "a": b"1" * 3_000_000, CARD: b"not counted"}.items():
        (tmp_path / name).write_bytes(content)
    files = hash_files(tmp_path)
    assert files == {"a": hashlib.sha256(b"1" * 3_000_000).hexdigest(), "b": hashlib.sha256(b"2").hexdigest()}
    digest = AdapterCard(files=files).digest
    assert digest == hashlib.sha256("".join(f"{n}\0{s}\n" for n, s in sorted(files.items())).encode()).hexdigest()
    assert AdapterCard(files=dict(reversed(files.items())), task="other").digest == digest
    assert AdapterCard(files={**files, "b": SHA}).digest != digest
    assert AdapterCard(files={"a": files["b"], "b": files["a"]}).digest != digest
