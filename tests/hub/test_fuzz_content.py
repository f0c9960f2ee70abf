"""Fuzzing of configs, cards and fingerprints from elsewhere: only the documented errors."""

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import molora
from molora import ConfigError, LoadError
from molora.files import WEIGHTS, read_config
from molora.fingerprint import conflicts
from molora.hub.card import CARD, AdapterCard, read_card
from molora.hub.verify import check_folder
from tests.adapters import CONFIG, wrapped
from tests.hub.fuzzing import JSON, TEXTS, fuzz, nothing_strange
from tests.test_interchange import peft_lora
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return peft_lora(tmp_path_factory.mktemp("lora"), 1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return molora.save(wrapped(), tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def folder(lora, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    for name in (CONFIG, WEIGHTS):
        (path / name).write_bytes((lora / name).read_bytes())
    return path


# --- configs ----------------------------------------------------------------------------------------------------------


def keys_of(folder):
    return sorted(json.loads((folder / CONFIG).read_text()))


@fuzz(100)
@given(data=st.data())
def test_configs_of_loras(lora, folder, data):
    config = json.loads((lora / CONFIG).read_text())
    keys = st.sampled_from([*keys_of(lora), "surprise", "layer_replication", "use_rslora", "rank_pattern"])
    config.update(data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=3)))
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes())
    base = tiny_llama()
    verdict = check_folder(folder, base=base)
    nothing_strange(verdict)
    if verdict.ok:
        molora.import_peft(base, [folder])
    else:
        with suppress(LoadError, ConfigError):
            molora.import_peft(base, [folder])  # it has no limits of its own


@fuzz(60)
@given(data=st.data())
def test_configs_of_mixtures(mixture, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m")
    config = json.loads((mixture / CONFIG).read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(keys_of(mixture)), JSON, min_size=1, max_size=2))
    for key, value in changes.items():
        if isinstance(config[key], dict) and isinstance(value, dict) and data.draw(st.booleans()):
            inner = data.draw(st.dictionaries(st.sampled_from(sorted(config[key]) or ["x"]), JSON, max_size=2))
            value = {**config[key], **inner}
        config[key] = value
    (path / CONFIG).write_text(json.dumps(config))
    (path / WEIGHTS).write_bytes((mixture / WEIGHTS).read_bytes())
    nothing_strange(check_folder(path, base=tiny_llama()))


@fuzz(100)
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"r": ' + b"9" * 5_000 + b"}")
def test_config_files_from_nowhere(folder, content):
    (folder / CONFIG).write_bytes(content)
    with suppress(LoadError):
        read_config(folder / CONFIG)
    verdict = check_folder(folder)
    assert not verdict.ok
    nothing_strange(verdict)


CARD_KEYS = st.sampled_from(
    ["task", "base", "authors", "metrics", "embedding", "fingerprint", "files", "prompts", "format"]
)


# --- cards ------------------------------------------------------------------------------------------------------------


@fuzz(200)
@given(text=st.text(max_size=40) | JSON.map(json.dumps) | st.text(alphabet="{}[]&*!:,- \n'\"|>%@`#?ab01", max_size=40))
@example(text="a: &a [x, x]\nb: *a")
@example(text="task: !!python/object/apply:os.system [ls]")
@example(text="? {a: 1}\n: 2")
@example(text="[" * 5_000)
@example(text="metrics: {a: .inf}")
@example(text="files: {a.json: 2026-99-99}")
@example(text="=: 1")
def test_cards_from_nowhere(folder, text):
    try:
        card = AdapterCard.from_yaml(text)
    except ConfigError:
        card = None
    else:
        assert AdapterCard.from_yaml(card.to_yaml()) == card
    (folder / CARD).write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(LoadError):
        read_card(folder)
    nothing_strange(check_folder(folder))
    (folder / CARD).unlink()


@fuzz(200)
@given(content=st.dictionaries(CARD_KEYS, JSON, max_size=4))
def test_card_content(content):
    try:
        card = AdapterCard.from_dict(content)
    except ConfigError:
        return
    assert AdapterCard.from_yaml(card.to_yaml()).to_dict() == card.to_dict()


@fuzz(100)
@given(saved=JSON, samples=st.dictionaries(TEXTS, JSON, max_size=2))
def test_fingerprints(saved, samples):
    for one in (saved, {"structure": "x", "samples": samples}):
        assert conflicts(one, {"structure": "y", "samples": {}})
