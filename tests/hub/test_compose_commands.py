"""`molora compose` and `molora export`, as a user types them."""

import argparse
import json

import pytest
from peft import PeftModel

import molora
from molora.cli import main
from molora.control import routed_layers
from molora.hub.compose import live
from molora.hub.compose_commands import add_compose, add_export
from tests.adapters import CONFIG, logits
from tests.test_interchange import peft_lora, peft_says
from tests.tiny import save_tiny, tiny_llama


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    save_tiny(tiny_llama(), None, root / "model")
    for seed, name in enumerate(("news", "law")):
        peft_lora(root / name, seed, r=2 + seed, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return root


def test_compose_then_export_gives_each_lora_back(here, capsys):
    base, out = str(here / "model"), str(here / "mixed")
    adapters = [str(here / "news"), f"the_law={here / 'law'}"]
    options = ["--router", "arrow", "--option", "top_k=1", "--slots", "3", "--max-rank", "4", "--out", out, "--json"]
    code = main(["compose", "--model", base, *adapters, *options])
    facts = json.loads(capsys.readouterr().out)
    assert code == 0 and facts == {
        "out": out, "experts": ["news", "the_law"], "slots": 3, "router": "arrow", "layers": 4, "ranks": [4]
    }  # fmt: skip
    with pytest.warns(UserWarning, match="1 slots"):
        model = molora.load(tiny_llama(), out)
    assert model.peft_config["default"].selector == {"name": "top_k", "k": 1, "normalise": "sum1"}
    assert live(model).names == ["news", "the_law"] and live(model).free == 1
    assert main(["export", out, "--expert", "the_law", "--out", str(here / "again")]) == 0
    assert "expert the_law is in" in capsys.readouterr().out
    assert (logits_of(here / "again") - peft_says(here / "law")).abs().max() < 1e-6


def test_export_of_fixed_weights(here, capsys):
    base, out = str(here / "model"), str(here / "two")
    assert main(["compose", "--model", base, str(here / "news"), str(here / "law"), "--out", out]) == 0
    said = capsys.readouterr().out
    assert "2 experts in 4 layers: news, law" in said and "router: uniform; slots: 2, 0 free; ranks: 2, 3" in said
    weights = ["--weight", "news=0.5", "--weight", "law=-1"]
    assert main(["export", out, "--model", base, *weights, "--out", str(here / "blend")]) == 0
    with live(loaded := molora.load(tiny_llama(), out)).using({"news": 0.5, "law": -1.0}):
        want = logits(loaded)
    assert (logits_of(here / "blend") - want).abs().max() < 1e-5


def logits_of(folder):
    return logits(PeftModel.from_pretrained(tiny_llama(), folder).eval())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compose", "--model", "{base}", "{news}", "{news}", "--out", "x"], "two adapters are called 'news'"),
        (["compose", "--model", "{base}", "{news}", "--router", "arow", "--out", "x"], "did you mean 'arrow'"),
        (["compose", "--model", "{base}", "{news}", "--option", "k", "--out", "x"], "'k' is not KEY=VALUE"),
        (
            ["compose", "--model", "{base}", "{news}", "--router", "arrow", "--option", "topk=1", "--out", "x"],
            "posthoc router 'arrow' has no option 'topk'; did you mean 'top_k'?",
        ),
        (
            ["compose", "--model", "{base}", "{news}", "--router", "retrieval", "--out", "x"],
            "posthoc router 'retrieval' needs the option 'embed'",
        ),
        (["compose", "--model", "{base}", "{base}", "--out", "x"], "is no adapter: adapter_config.json is missing"),
        (["export", "{mixed}", "--expert", "9", "--model", "{base}", "--out", "x"], "there is no expert 9; '"),
        (["compose", "--model", "./nowhere", "{news}", "--out", "x"], "model folder './nowhere' does not exist"),
        (["compose", "--model", "{base}", "--out", "x"], "molora compose --help"),
        (["export", "{news}", "--out", "x"], "give either --expert NAME, or --weight"),
        (["export", "{news}", "--weight", "a=b", "--out", "x"], "is not NAME=NUMBER"),
        (
            ["export", "{news}", "--expert", "a", "--model", "{base}", "--out", "x"],
            "it is no molora adapter but a plain LoRA",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(here, arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"base": here / "model", "news": here / "news", "mixed": here / "one"}
    if "{mixed}" in arguments:
        main(["compose", "--model", str(here / "model"), str(here / "news"), "--out", str(here / "one")])
        capsys.readouterr()
    assert main([text.format(**places) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_lora_that_names_no_task_finds_the_model_it_is_on(here, capsys):
    """The bare model has no layer of that name; the whole one, as the base's config says, has."""
    folder = peft_lora(here / "no task", 3)
    bare = peft_lora(here / "bare", 4, lambda: tiny_llama().model)
    for source, build in ((folder, tiny_llama), (bare, lambda: tiny_llama().model)):
        assert json.loads((source / CONFIG).read_text())["task_type"] is None
        out = str(here / f"of {source.name}")
        assert main(["compose", "--model", str(here / "model"), str(source), "--out", out]) == 0
        assert "1 experts in 2 layers" in capsys.readouterr().out
        assert len(routed_layers(molora.load(build(), out))) == 2


@pytest.mark.parametrize("command", ["compose", "export"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert "example:" in capsys.readouterr().out


def test_the_flags_are_frozen():
    shared = {"--help", "-h", "--out", "--hub", "--json"}
    flags = {
        add_compose: {"adapters", "--model", "--router", "--option", "--slots", "--max-rank", "--target"},
        add_export: {"adapter", "--model", "--expert", "--weight"},
    }
    for add, own in flags.items():
        parser = argparse.ArgumentParser()
        add(parser)
        assert {s for a in parser._actions for s in (a.option_strings or [a.dest])} == own | shared
