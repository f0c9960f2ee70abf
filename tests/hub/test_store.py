"""The library: what comes in and out, names and versions, checks, differences, and being killed at any step."""

import json
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import molora
from molora.compat.layers import linear_sizes
from molora.errors import ConfigError, LoadError
from molora.fingerprint import of_model
from molora.hub.card import CARD, AdapterCard, hash_file
from molora.hub.compare import compare
from molora.hub.disk import STATE
from molora.hub.names import MAX_NAME, Ref, parse, why_not_name
from molora.hub.store import Hub
from tests.adapters import CONFIG, WEIGHTS, change_config, change_tensors, logits, wrapped
from tests.hub.loras import Q, lora
from tests.tiny import tiny_inputs, tiny_llama

FIELDS = {"task": "topic", "description": "Sorts headlines.", "licence": "apache-2.0"}


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "hub")


@pytest.fixture
def source(tmp_path):
    return lora(tmp_path / "source")


def tree(root):
    """Every file of a library but its index and locks, with its content."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith((".index", ".lock", ".git"))
    }


# --- in and out -------------------------------------------------------------------------------------------------------


def test_add_and_get(hub, source):
    entry = hub.add(source, "news", **FIELDS, metrics={"accuracy": 0.9})
    assert (entry.ref, entry.kind, entry.rank) == (Ref("news", 1), "lora", 2)
    assert entry.folder == hub.root / "news" / "1"
    assert sorted(path.name for path in entry.folder.iterdir()) == [CONFIG, WEIGHTS, CARD]
    for name in (CONFIG, WEIGHTS):
        assert (entry.folder / name).read_bytes() == (source / name).read_bytes()
        assert entry.card.files[name] == hash_file(source / name)
    assert entry.card.base == "tiny/llama"  # of the config
    assert entry.card.metrics == {"accuracy": 0.9}
    assert entry.parameters == 2 * 32 + 32 * 2 + 2 * 32 + 16 * 2
    assert entry.bytes == (source / WEIGHTS).stat().st_size
    assert hub.get("news") == hub.get("news@1") == hub.list()[0] == entry
    assert Hub(hub.root).get("news") == entry
    assert hub.verify("news") == {Ref("news", 1): []} == hub.verify()
    PeftModel.from_pretrained(tiny_llama(), entry.folder)  # a PEFT folder like any other
    json.dumps(entry.to_dict())


def test_versions(hub, source, tmp_path):
    hub.add(source, "news", **FIELDS)
    assert hub.add(source, "news", **FIELDS).version == 1  # nothing new
    assert hub.add(source, "news", **FIELDS | {"description": "Better said."}).version == 2
    assert hub.add(lora(tmp_path / "b", seed=1), "news").version == 3
    assert hub.add(lora(tmp_path / "c", seed=2), "news", version=7).version == 7
    assert [entry.version for entry in hub.list(all_versions=True)] == [1, 2, 3, 7]
    assert [entry.version for entry in hub.list()] == [7]
    assert hub.get("news").version == 7
    assert hub.get("news@2").card.description == "Better said."
    assert hub.get("news@1").digest == hub.get("news@2").digest != hub.get("news@3").digest
    with pytest.raises(ConfigError, match="has a version 3 already, and versions never change"):
        hub.add(source, "news", version=3)
    with pytest.raises(ConfigError, match=r"has no version 5; it has: 1, 2, 3, 7"):
        hub.get("news@5")
    # the number of a removed version is never given again, not even when all are gone
    assert hub.remove("news@7") == [Ref("news", 7)]
    assert hub.get("news").version == 3
    with pytest.raises(ConfigError, match="version 7 of 'news' was removed"):
        hub.add(source, "news", version=7)
    assert hub.add(lora(tmp_path / "d", seed=3), "news").version == 8
    hub.remove("news", all_versions=True)
    assert hub.list() == [] and not (hub.root / "news").exists()
    assert Hub(hub.root).add(source, "news").version == 9


def test_aliases(hub, source, tmp_path):
    hub.add(source, "news")
    hub.add(lora(tmp_path / "b", seed=1), "news", alias="best")
    hub.alias("fresh", "news")
    hub.alias("old", "news@1")
    hub.alias("older", "old")  # stands for the version itself, not for the other alias
    assert hub.aliases() == {"best": ("news", 2), "fresh": ("news", None), "old": ("news", 1), "older": ("news", 1)}
    hub.add(lora(tmp_path / "c", seed=2), "news")
    assert [hub.get(name).version for name in ("best", "fresh", "old", "fresh@1")] == [2, 3, 1, 1]
    assert [entry.aliases for entry in hub.list(all_versions=True)] == [("old", "older"), ("best",), ("fresh",)]
    assert hub.get("fresh").aliases == ("fresh",)
    with pytest.raises(ConfigError, match="'old' is an alias of news@1; write news@2"):
        hub.get("old@2")
    with pytest.raises(
        ConfigError, match="not removed: 2 problems\n  - alias 'old' stands for news@1; remove it first"
    ):
        hub.remove("news@1")
    assert hub.remove("old") == [Ref("old")]
    hub.remove("older")
    assert hub.remove("news@1") == [Ref("news", 1)]
    with pytest.raises(ConfigError, match=r"has versions 2, 3; name one, such as news@2"):
        hub.remove("news")
    for taken in ("news", "NEWS"):
        with pytest.raises(ConfigError, match=f"alias '{taken}' is the name of an adapter"):
            hub.alias(taken, "news")
    with pytest.raises(ConfigError, match="'best' is an alias already"):
        hub.add(source, "best")
    with pytest.raises(ConfigError, match=r"adapter 'nws' is unknown; did you mean 'news'\? known: best, fresh, news"):
        hub.get("nws")
    assert hub.verify() == {Ref("news", 2): [], Ref("news", 3): []}


def test_cards_come_from_a_mapping_a_file_an_object_or_the_folder(hub, source, tmp_path):
    card = AdapterCard(**FIELDS, prompts=["a"])
    (tmp_path / "my.yaml").write_text(card.to_yaml())
    made = [hub.add(source, f"a{i}", card=c).card for i, c in enumerate((card, card.to_dict(), tmp_path / "my.yaml"))]
    assert made[0] == made[1] == made[2] == card.replace(base="tiny/llama", files=made[0].files)
    # the folder of another library: its card comes along, and its hashes must be right
    first = hub.get("a0").folder
    assert hub.add(first, "copy").card == made[0]
    assert hub.add(first, "other", task="x").card.task == "x"
    shutil.copytree(first, tmp_path / "touched")
    change_config(tmp_path / "touched", r=3)
    with pytest.raises(LoadError, match=r"adapter_config\.json has other content than its card says"):
        hub.add(tmp_path / "touched", "touched")
    with pytest.raises(ConfigError, match="no such key: 'lisence'; did you mean 'licence'"):
        hub.add(source, "b", lisence="x")
    with pytest.raises(ConfigError, match="cannot be read"):
        hub.add(source, "b", card=tmp_path / "gone.yaml")


def test_a_mixture_from_a_model_and_from_its_folder(hub, tmp_path):
    model = wrapped(seed=3)
    entry = hub.add(model, "mix", **FIELDS)
    assert (entry.kind, entry.rank) == ("mixture", 3)
    assert torch.equal(logits(molora.load(tiny_llama(), entry.folder)), logits(model))
    assert entry.card.fingerprint == model.peft_config["default"].fingerprint
    molora.save(model, tmp_path / "saved")
    (tmp_path / "saved" / "training.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"not added: training\.json"):
        again = hub.add(tmp_path / "saved", "mix2")
    assert again.card.files[WEIGHTS] == entry.card.files[WEIGHTS]
    assert "training.json" not in again.card.files


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_plain_lora_from_a_model(hub, adapter):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=3), adapter_name=adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    entry = hub.add(model, "plain", adapter=adapter)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), entry.folder)), logits(model))
    # the fingerprint is that of the base, although LoRAs are in it
    assert entry.card.fingerprint == of_model(tiny_llama(), linear_sizes)[0]


def test_a_folder_with_its_base(hub, source):
    entry = hub.add(source, "news", base_model=tiny_llama())
    assert hub.search(base=tiny_llama())[0].entry == entry
    assert hub.search(base=tiny_llama(seed=1)) == []


def test_links_to_blobs_are_copied_as_files(hub, source, tmp_path):
    """A snapshot in the cache of huggingface_hub holds links."""
    linked, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    linked.mkdir(parents=True)
    source.rename(blobs)
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(Path("../../blobs") / name)
    folder = hub.add(linked, "news").folder
    assert not any(path.is_symlink() for path in folder.iterdir())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_adapters_leave_nothing_behind(hub, source, tmp_path):
    hub.add(source, "good")
    before = tree(hub.root)
    bad = lora(tmp_path / "nan", seed=1)
    change_tensors(bad, lambda tensors: tensors[f"base_model.model.{Q}.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(LoadError, match="NaN"):
        hub.add(bad, "bad")
    (bad / WEIGHTS).write_bytes((bad / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(LoadError, match="truncated"):
        hub.add(bad, "bad")
    (bad / WEIGHTS).rename(bad / "adapter_model.bin")
    with pytest.raises(LoadError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub.add(bad, "bad")
    with pytest.raises(LoadError, match="there is no folder"):
        hub.add(tmp_path / "gone", "bad")
    with pytest.raises(ConfigError, match="holds no molora adapter"):
        hub.add(tiny_llama(), "bad")
    assert tree(hub.root) == before
    assert [p.name for p in hub.root.iterdir() if p.name.startswith((".draft", ".trash"))] == []


BAD_NAMES = (
    "", ".", "..", "../x", "a/b", "a\\b", "/etc", "a..b", "~", "-a", "1", "0", ".hidden", "a.", "a b", "a@2", "a\x00b",
    "a\n", "naïve", "нews", "ｎews", "a\u202eb", "😀", "x" * (MAX_NAME + 1), "CON", "nul.txt", "Lpt1", "latest",
    "index", None, 3, "%2e%2e", "C:x",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_that_are_none(name, hub, source):
    assert why_not_name(name)
    with pytest.raises(ConfigError, match="name"):
        hub.add(source, name)
    assert not hub.root.exists()  # nothing was even begun
    if isinstance(name, str) and "@" not in name:
        with pytest.raises(ConfigError):
            hub.get(name)


def test_a_name_that_could_be_is_offered():
    assert "such as 'naive-cafe'" in why_not_name("naïve café")
    assert "such as 'a1'" in why_not_name("1")
    assert "such as 'my-con'" in why_not_name("con")
    assert why_not_name(unicodedata.normalize("NFC", "é")).endswith("such as 'e'")
    assert all(why_not_name(name) is None for name in ("a", "A-b_c.d", "x" * MAX_NAME, "llama-3.1-8b", "a.b.c"))
    assert parse("a@12") == ("a", 12)
    for ref in ("a@", "a@0", "a@01", "a@x", "a@-1", "a@1@2", "a@1.0", "a@9999999999", "a@١"):
        with pytest.raises(ConfigError, match="write a@1, with a whole number"):
            parse(ref)


def test_names_that_would_be_mixed_up(hub, source):
    hub.add(source, "News")
    with pytest.raises(ConfigError, match="'news' differs from adapter 'News' by case alone"):
        hub.add(source, "news")
    for segment in ("q_proj", "layers", "model", "lora_A"):
        with pytest.raises(ConfigError, match=f"'{segment}' is a part of the adapter's tensor names"):
            hub.add(source, segment)


def test_a_library_that_is_not_there(tmp_path):
    for look in (Hub.list, Hub.verify, Hub.search, lambda hub: hub.get("a")):
        with pytest.raises(LoadError, match="there is no library at"):
            look(Hub(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="there is no library at"):
        Hub(tmp_path / "file").list()
    with pytest.raises(ConfigError, match="no library can be made"):
        Hub(tmp_path / "file" / "x").add(lora(tmp_path / "a"), "a")


# --- damage -----------------------------------------------------------------------------------------------------------


def test_verify_sees_every_kind_of_damage(hub, source, tmp_path):
    for i in range(8):
        hub.add(source, f"a{i}")
    flipped = bytearray((hub.root / "a0/1" / WEIGHTS).read_bytes())
    flipped[-3] ^= 1  # one bit of one weight: a valid file, and no NaN
    (hub.root / "a0/1" / WEIGHTS).write_bytes(flipped)
    change_config(hub.root / "a1/1", lora_alpha=400)
    (hub.root / "a2/1" / CONFIG).unlink()
    (hub.root / "a3/1" / "extra.json").write_text("{}")
    (hub.root / "a4/1" / CARD).write_text("taks: x")
    (hub.root / "a5/1" / CONFIG).rename(tmp_path / "config")
    (hub.root / "a5/1" / CONFIG).symlink_to(tmp_path / "config")
    (hub.root / "b").symlink_to(hub.root / "a7")
    (hub.root / "c/x").mkdir(parents=True)
    (hub.root / "nul").mkdir()
    (hub.root / "a7/2").symlink_to(hub.root / "a7/1")
    (hub.root / STATE).write_text("aliases: {gone: a9, a7: a6, late: a7@4}")
    found = {str(ref): problems for ref, problems in hub.verify().items()}
    assert found["a6@1"] == found["a7@1"] == []
    for name, needle in {
        "a0": f"{WEIGHTS} has other content than its card says",
        "a1": f"{CONFIG} has other content than its card says",
        "a2": f"{CONFIG} is missing",
        "a3": "extra.json is not in the card",
        "a4": "key 'taks'; did you mean 'task'",
        "a5": f"'{CONFIG}' is a link",
    }.items():
        assert any(needle in problem for problem in found[f"{name}@1"]), (name, found[f"{name}@1"])
        assert hub.verify(f"{name}@1") == {Ref(name, 1): found[f"{name}@1"]}
    library = "\n".join(found[""])
    for needle in (
        "folder 'b': it is a link",
        "folder 'c/x': no version",
        "folder 'nul': adapter name 'nul' is reserved",
        "folder 'a7/2': no version",
        "alias 'gone' stands for a9, which is not there",
        "alias 'late' stands for a7@4, which is not there",
        "alias 'a7' hides the adapter of that name",
    ):
        assert needle in library
    assert len(found[""]) == 7


def test_damaged_adapters_are_listed_but_not_given_out(hub, source):
    hub.add(source, "a")
    hub.add(source, "b")
    (hub.root / "a/1" / WEIGHTS).write_bytes(b"")
    assert [(entry.name, bool(entry.problems)) for entry in hub.list()] == [("a", True), ("b", False)]
    assert [hit.entry.name for hit in hub.search()] == ["b"]
    with pytest.raises(LoadError, match=r"adapter 'a@1' is damaged: .*truncated"):
        hub.get("a")
    assert hub.remove("a") == [Ref("a", 1)]


@pytest.mark.parametrize(
    "text", ["aliases: [", "aliases: [a]", "removed: {a: x}", "other: 1", "aliases: {a: a@x}", b"\xff"]
)
def test_a_damaged_state_is_told(text, hub, source):
    hub.add(source, "a")
    (hub.root / STATE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoadError, match=r"library\.yaml' is damaged"):
        hub.get("a")
    before = tree(hub.root)
    with pytest.raises(LoadError, match=r"library\.yaml' is damaged"):
        hub.add(source, "b")
    assert tree(hub.root) == before
    assert any("is damaged" in problem for problem in hub.verify()[Ref("")])


# --- differences ------------------------------------------------------------------------------------------------------


def test_diff(hub, tmp_path):
    hub.add(lora(tmp_path / "a"), "a", **FIELDS)
    b = lora(tmp_path / "b", alpha=8.0)
    A = f"base_model.model.{Q}.lora_A.weight"

    def change(tensors):
        tensors[A] = 2 * tensors[A]
        tensors["base_model.model.new"] = torch.ones(1)

    change_tensors(b, change)
    shutil.copytree(hub.get("a").folder, tmp_path / "plain")
    found = compare(tmp_path / "plain", b)
    assert found.only_b == ["base_model.model.new"] and found.only_a == []
    assert found.config["lora_alpha"] == (4.0, 8.0)
    assert found.card["task"] == ("topic", "(not there)")
    (changed,) = found.changed
    before = load_file(tmp_path / "plain" / WEIGHTS)[A].double()
    assert changed.name == A
    assert changed.largest == pytest.approx(float(before.abs().max()))
    assert changed.relative == pytest.approx(0.5)  # |2a - a| / |2a|
    assert found.equal == 3
    back = compare(b, tmp_path / "plain")
    assert (back.only_a, back.changed) == (found.only_b, found.changed)


def test_diff_of_versions(hub, tmp_path):
    hub.add(lora(tmp_path / "a"), "a", **FIELDS)
    hub.add(lora(tmp_path / "a"), "a", **FIELDS | {"task": "x"})
    hub.add(lora(tmp_path / "r4", rank=4), "a", **FIELDS)
    hub.add(lora(tmp_path / "half", dtype=torch.bfloat16), "a", **FIELDS)
    same = hub.diff("a@1", "a@1")
    assert not same and not same.changes_weights and same.equal == 4
    card = hub.diff("a@1", "a@2")
    assert card and not card.changes_weights and card.card == {"task": ("topic", "x")} and card.config == {}
    rank = hub.diff("a@1", "a@3")
    name = f"base_model.model.{Q}.lora_A.weight"
    assert rank.reshaped[name] == ("F32 [2, 32]", "F32 [4, 32]") and len(rank.reshaped) == 4
    assert rank.config == {"r": (2, 4)} and rank.card == {}
    assert hub.diff("a@1", "a@4").reshaped[name] == ("F32 [2, 32]", "BF16 [2, 32]")
    assert (rank.a, rank.b) == ("a@1", "a@3")
    json.dumps(rank.to_dict())


def test_order_of_target_modules_is_no_difference(hub, tmp_path):
    lora(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    change_config(tmp_path / "b", target_modules=["v_proj", "q_proj"])
    assert not compare(tmp_path / "a", tmp_path / "b")


def test_probes_prove_an_effect(hub, source, tmp_path):
    probes = [tiny_inputs(tiny_llama())]
    assert hub.add(source, "acts", base_model=tiny_llama(), probes=probes).version == 1
    idle = lora(tmp_path / "idle")
    change_tensors(idle, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    with pytest.raises(LoadError, match="it changes nothing"):
        hub.add(idle, "idle", base_model=tiny_llama(), probes=probes)
    with pytest.raises(ConfigError, match=r"probes need the base model: add\(\.\.\., base_model=model\)"):
        hub.add(idle, "idle", probes=probes)
    with pytest.raises(LoadError, match="q_proj"):  # a base that it does not fit
        hub.add(source, "narrow", base_model=tiny_llama(hidden_size=16))
    assert [entry.name for entry in hub.list()] == ["acts"]
