"""The manifest: reading it, pinning it, and bringing a live mixture or another library to what it says."""

import shutil

import pytest
import torch
from peft import PeftModel

import molora
from molora.errors import ConfigError, LoadError
from molora.hub.compose import compose, live
from molora.hub.manifest import Manifest, reconcile
from molora.hub.names import Ref
from molora.hub.store import Hub
from molora.hub.targets import Wanted
from tests.adapters import WEIGHTS, logits, wrapped
from tests.hub.loras import lora
from tests.tiny import tiny_llama

SHA = "0" * 64


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "hub")
    for seed, name in enumerate(("news", "law", "poems", "news")):
        hub.add(lora(tmp_path / f"{name}{seed}", seed=seed), name)
    return hub  # news@1, news@2, law@1, poems@1


def actions(plan):
    return [(step.action, step.name) for step in plan.steps]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_reading_and_writing(tmp_path):
    text = f"""format: 1
adapters:
  news: news@2
  law:
    adapter: law
    digest: '{SHA}'
  poems: {{adapter: poems, like: news}}
"""
    (tmp_path / "m.yaml").write_text(text)
    manifest = Manifest.load(tmp_path / "m.yaml")
    assert manifest.wanted == (
        Wanted("news", "news@2"),
        Wanted("law", "law", SHA),
        Wanted("poems", "poems", like="news"),
    )
    again = Manifest.load(manifest.save(tmp_path / "again.yaml"))
    assert again == manifest == Manifest.of({"news": "news@2", "law": {"adapter": "law", "digest": SHA},
                                             "poems": {"adapter": "poems", "like": "news"}})  # fmt: skip
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.yaml", "m.yaml"]
    assert Manifest.of(["news@2", "law"]).wanted == (Wanted("news", "news@2"), Wanted("law", "law"))
    (tmp_path / "empty.yaml").write_text("adapters:\n")
    assert Manifest.load(tmp_path / "empty.yaml") == Manifest()


def test_every_problem_of_a_manifest_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        Manifest.of({"../x": "a", "b": "b@0", "c": {"adapter": "c", "digets": 1, "digest": "zz", "like": 3}, "d": 4})
    for needle in (
        "'../x'",
        "'b@0' names no version",
        "did you mean 'digest'",
        "got 'zz'",
        "like must be",
        "'d': write an",
    ):
        assert needle in str(error.value)
    with pytest.raises(ConfigError, match="have one name"):
        Manifest.of(["news@1", "news@2"])
    for text, needle in {
        "adapters: [a]": "must map names",
        "adaptors: {}": "did you mean 'adapters'",
        "format: 2": "format: 1",
        "- a": "must be a mapping",
        "a: [": "not readable YAML",
    }.items():
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(ConfigError, match=needle):
            Manifest.load(tmp_path / "m.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Manifest.load(tmp_path / "gone.yaml")


def test_pinning(hub):
    pinned = Manifest.of(["news", "law"]).pinned(hub)
    assert [(w.adapter, w.digest) for w in pinned.wanted] == [
        ("news@2", hub.get("news@2").digest),
        ("law@1", hub.get("law").digest),
    ]


# --- another library --------------------------------------------------------------------------------------------------


def test_a_library_is_brought_to_what_the_manifest_says(hub, tmp_path):
    other = Hub(tmp_path / "other")
    manifest = Manifest.of({"news": "news@1", "newest": "news", "law": "law"})
    plan = reconcile(manifest, hub, other, apply=False)
    assert actions(plan) == [("add", "news@1"), ("add", "news@2"), ("add", "law@1")]
    assert not other.root.exists()
    assert actions(reconcile(manifest, hub, other)) == actions(plan)
    assert {str(e.ref): e.digest for e in other.list(all_versions=True)} == {
        ref: hub.get(ref).digest for ref in ("law@1", "news@1", "news@2")
    }
    again = reconcile(manifest, hub, other)
    assert not again.changes and [step.action for step in again.steps] == ["keep"] * 3
    other.add(hub.get("poems").folder, "mine")
    assert not reconcile(manifest, hub, other).changes  # what a library has besides stays, unless told
    plan = reconcile(["law"], hub, other, prune=True)
    assert [(s.action, s.name) for s in plan.changes] == [
        ("remove", "mine@1"),
        ("remove", "news@1"),
        ("remove", "news@2"),
    ]
    assert [str(entry.ref) for entry in other.list(all_versions=True)] == ["law@1"]


def test_a_version_with_other_content_is_not_replaced(hub, tmp_path):
    other = Hub(tmp_path / "other")
    other.add(lora(tmp_path / "x", seed=99), "law")
    with pytest.raises(ConfigError, match=r"'law@1': library .* has other content under this version"):
        reconcile(["news", "law"], hub, other)
    assert [entry.name for entry in other.list()] == ["law"]  # nothing was changed


def test_a_crash_between_steps_is_gone_on_from(hub, tmp_path, monkeypatch):
    other, real, left = Hub(tmp_path / "other"), Hub.add, [2]

    def add(self, *args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, *args, **options)

    monkeypatch.setattr(Hub, "add", add)
    with pytest.raises(KeyboardInterrupt):
        reconcile(["news", "law", "poems"], hub, other)
    left[0] = 9
    assert [step.action for step in reconcile(["news", "law", "poems"], hub, other).steps] == ["keep", "keep", "add"]


# --- what cannot be had -----------------------------------------------------------------------------------------------


def test_nothing_is_done_when_anything_cannot_be_had(hub, tmp_path):
    other = Hub(tmp_path / "other")
    manifest = Manifest.of({"news": "news", "gone": "gone", "old": "law@7", "law": {"adapter": "law", "digest": SHA}})
    (hub.root / "poems/1" / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ConfigError) as error:
        reconcile(Manifest((*manifest.wanted, Wanted("poems", "poems"))), hub, other)
    for needle in (
        "'gone' is unknown",
        "no version 7",
        f"the manifest wants {SHA}",
        "'poems@1' is damaged",
        "4 problems",
    ):
        assert needle in str(error.value)
    assert not other.root.exists()


# --- a live mixture ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(hub):
    return compose(tiny_llama(), {"news": hub.get("news@1"), "law": hub.get("law")}, slots=4, hub=hub).eval()


def same_as_peft(model, name, folder):
    with live(model).using(name):
        ours = logits(model)
    theirs = logits(PeftModel.from_pretrained(tiny_llama(), folder))
    return torch.allclose(ours, theirs, atol=1e-5)


def test_a_mixture_is_brought_to_what_the_manifest_says(hub, model):
    """Every expert computes what PEFT does with the version that the manifest names."""
    manifest = Manifest.of({"news": "news@2", "poems": "poems"})
    plan = reconcile(manifest, hub, model, apply=False)
    assert actions(plan) == [("remove", "law"), ("swap", "news"), ("add", "poems")]
    assert sorted(live(model).names) == ["law", "news"]
    reconcile(manifest, hub, model)
    assert sorted(live(model).names) == ["news", "poems"]
    assert same_as_peft(model, "news", hub.get("news@2").folder)
    assert not same_as_peft(model, "news", hub.get("news@1").folder)
    assert same_as_peft(model, "poems", hub.get("poems").folder)
    assert actions(reconcile(manifest, hub, model)) == [("keep", "news"), ("keep", "poems")]
    # a new version of what is wanted without one, and a name of its own
    hub.add(hub.get("law").folder, "poems")
    plan = reconcile({"news": "news@2", "verse": "poems"}, hub, model, prune=False)
    assert actions(plan) == [("keep", "news"), ("add", "verse")]
    assert same_as_peft(model, "verse", hub.get("law").folder)
    assert sorted(live(model).names) == ["news", "poems", "verse"]
    assert (
        str(reconcile({"news": "news@1"}, hub, model, prune=False)) == "swap    news  becomes news@1, was another one"
    )


def test_what_somebody_else_put_there_is_written_again(hub, model):
    plan = reconcile(["news@1", "law"], hub, model)
    assert actions(plan) == [("swap", "news"), ("swap", "law")]  # composed by hand: the versions are not known
    assert not reconcile(["news@1", "law"], hub, model).changes
    live(model).swap("law", hub.get("poems"))
    assert actions(reconcile(["news@1", "law"], hub, model)) == [("keep", "news"), ("swap", "law")]
    assert same_as_peft(model, "law", hub.get("law").folder)


def test_what_cannot_be_an_expert(hub, model, tmp_path):
    hub.add(wrapped(), "mix")
    with pytest.raises(ConfigError, match="'mix': mix@1 is a mixture, and only LoRAs become experts"):
        reconcile(["mix", "news@2"], hub, model)
    assert sorted(live(model).names) == ["law", "news"]
    hub.add(lora(tmp_path / "wide", rank=16), "wide")
    with pytest.raises((ConfigError, LoadError), match="wide"):
        reconcile(["wide"], hub, model)
    with pytest.raises(ConfigError, match="holds no molora adapter"):
        reconcile(["news"], hub, tiny_llama())


def test_a_learned_router_is_told_what_a_new_expert_is_like(hub):
    recipe = {"scorer": "linear", "selector": "softmax"}
    model = compose(tiny_llama(), {"news": hub.get("news@1"), "law": hub.get("law")}, recipe, slots=4).eval()
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            parameter.data.normal_()
    with pytest.raises(ConfigError, match="say which expert it is like at first"):
        reconcile({"poems": "poems"}, hub, model, prune=False)
    reconcile({"poems": {"adapter": "poems", "like": "law"}}, hub, model, prune=False)
    with molora.record(model) as log:
        logits(model)
    slots = [live(model).slot(name) for name in ("law", "poems")]
    for routing in log.values():
        assert torch.equal(routing.gates[..., slots[0]], routing.gates[..., slots[1]])


def test_a_library_that_changes_between_plan_and_step_is_noticed(hub, model, monkeypatch):
    """A version that goes away in the middle is an error, and the next call plans anew."""
    plan = reconcile(["poems"], hub, model, apply=False)
    assert plan.changes[-1].entry.ref == Ref("poems", 1)
    real = type(live(model)).remove

    def remove(self, name):
        shutil.rmtree(hub.root / "poems", ignore_errors=True)
        real(self, name)

    monkeypatch.setattr(type(live(model)), "remove", remove)
    with pytest.raises(molora.MoloraError):
        reconcile(["poems"], hub, model)
    with pytest.raises(ConfigError, match="'poems' is unknown"):
        reconcile(["poems"], hub, model)
