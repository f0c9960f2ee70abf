"""`molora prompts fit` and `ask`: from the cards of a library or a file; text, JSON, notes, one line on errors."""

import argparse
import json

import pytest

from molora import cli
from molora.hub.store import Hub
from molora.prompts.examples import of_file, of_hub
from molora.prompts.saving import load_selector
from tests.hub.loras import lora
from tests.tiny import tiny_llama, tiny_tokenizer

SPORT = ["who won the cup final", "the striker scored a goal", "the match ended in a draw", "our team won the cup"]
LAW = ["may my landlord end the lease", "the court ruled on the lease", "is this clause of the lease void"]


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "hub")
    hub.add(lora(tmp_path / "sport", seed=0), "sport", prompts=["an older version"])
    hub.add(lora(tmp_path / "sport", seed=1), "sport", prompts=SPORT)
    hub.add(lora(tmp_path / "law", seed=2), "law", prompts=LAW)
    hub.add(lora(tmp_path / "mute", seed=3), "mute")
    hub.add(lora(tmp_path / "broken", seed=4), "broken", prompts=["text"])
    (hub.get("broken").folder / "adapter_config.json").write_text("{")
    return hub


COMMON = "--debug --json --model"
FLAGS = {
    "fit": f"{COMMON} --embedder --encoder --examples --guard --hub --limit --method --option --out --rate --top-k",
    "ask": f"prompt {COMMON} --allow --selector",
}


def test_the_flags_are_frozen():
    top = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["prompts"]
    top.fill()
    found = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(found) == set(FLAGS)
    for name, flags in FLAGS.items():
        named = {action.option_strings[-1] if action.option_strings else action.dest for action in found[name]._actions}
        assert named - {"--help"} == set(flags.split())
        assert "example:\n  molora prompts" in found[name].description


def run(capsys, *argv):
    code = cli.main(["prompts", *(str(word) for word in argv)])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip()]


def test_examples_of_a_hub_are_those_of_the_newest_sound_versions(hub):
    found = of_hub(Hub(hub.root))
    assert found.texts == {"sport": tuple(SPORT), "law": tuple(LAW)}
    assert found.sources == {name: hub.get(name).digest for name in ("sport", "law")}
    assert found.silent == ("mute",) and found.damaged == ("broken",)


def test_fit_and_ask(hub, tmp_path, capsys):
    out = tmp_path / "selector"
    code, text, notes = run(capsys, "fit", "--hub", hub.root, "--out", out, "--embedder", "words", "--rate", 0.2)
    assert code == 0 and text.startswith(f"{out}: centroid over 2 adapters, 7 examples, version ")
    assert notes == [
        "note: no example prompts, so never chosen: mute",
        "note: damaged, so never chosen: broken",
    ]
    code, text, notes = run(capsys, "ask", "who won the match", "--selector", out)
    first, why = text.splitlines()
    assert code == 0 and first == "sport 1.000" and why.startswith("'sport' (") and not notes
    code, text, _ = run(capsys, "ask", "quantum flux", "--selector", out)
    assert code == 0 and text.splitlines()[0] == "(base model)" and "unlike the examples" in text


def test_json(hub, tmp_path, capsys):
    out = tmp_path / "selector"
    options = ["--embedder", "words", "--method", "knn", "--option", "neighbours=3", "--guard", "none", "--json"]
    code, text, notes = run(capsys, "fit", "--hub", hub.root, "--out", out, *options)
    facts = json.loads(text)
    assert code == 0 and not notes
    assert facts["adapters"] == {"law": 3, "sport": 4} and facts["silent"] == ["mute"]
    assert facts["method"] == {"name": "knn", "neighbours": 3} and facts["guard"] is None
    code, text, _ = run(capsys, "ask", "who won the match", "--selector", out, "--allow", "law", "--json")
    choice = json.loads(text)
    assert choice["weights"] == {"law": 1.0} and "sport" not in text
    selector = load_selector(out)
    assert choice == selector.select(["who won the match"], {"law"})[0].to_dict()
    assert facts["version"] == selector.version


def test_examples_of_a_file_alone_and_beside_a_hub(hub, tmp_path, capsys):
    rows = [{"adapter": "sport", "prompt": "one more"}, {"adapter": "mute", "prompt": "hum the tune"}]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    base = ["fit", "--examples", file, "--out", tmp_path / "out", "--embedder", "words", "--json"]
    assert json.loads(run(capsys, *base)[1])["adapters"] == {"mute": 1, "sport": 1}
    facts = json.loads(run(capsys, *base, "--hub", hub.root)[1])
    assert facts["adapters"] == {"law": 3, "mute": 1, "sport": 5} and facts["silent"] == []
    assert facts["guard_is_blind"] is True
    assert of_file(file).texts == {"sport": ("one more",), "mute": ("hum the tune",)}


def test_hidden_states_of_a_model(hub, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    out = tmp_path / "selector"
    fit = ["fit", "--hub", hub.root, "--out", out, "--embedder", "base"]
    assert run(capsys, *fit, "--model", tmp_path / "llama")[0] == 0
    code, text, _ = run(capsys, "ask", "the team", "--selector", out, "--model", tmp_path / "llama")
    assert code == 0 and len(text.splitlines()) == 2
    # the model as a server holds it gives the same vectors
    served = load_selector(out, model=tiny_llama(), tokenizer=tiny_tokenizer())
    assert served.select(["the team"])[0].why == text.splitlines()[1]
    code, _, (problem,) = run(capsys, "ask", "the team", "--selector", out)
    assert code == 2 and "--model" in problem
    code, _, (problem,) = run(capsys, *fit)
    assert code == 2 and "give the model" in problem


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit", "--hub", "HUB"], "--out"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--method", "centroids"], "did you mean 'centroid'"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--option", "x=1"], "no option 'x'"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--option", "x"], "KEY=VALUE"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--guard", "non"], "prompt guard 'non' is unknown"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--rate", "2"], "rate must be between 0 and 1"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--embedder", "wrds"], "did you mean 'words'"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--embedder", "words", "--encoder", "x"], "--encoder is for"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--encoder", "nowhere"], "no folder with a config.json"),
        (["fit", "--hub", "HUB", "--out", "OUT", "--embedder", "base", "--model", "./nowhere"], "does not exist"),
        (["fit", "--hub", "NONE", "--out", "OUT"], "there is no library"),
        (["fit", "--hub", "MUTE", "--out", "OUT"], "no adapter has example prompts"),
        (["fit", "--examples", "NONE", "--out", "OUT"], "cannot be read"),
        (["fit", "--examples", "BAD", "--out", "OUT"], "line 2 is not"),
        (["ask", "x", "--selector", "NONE"], "molora prompts fit"),
        (["ask"], "TEXT"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line(argv, message, hub, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"adapter": "a", "prompt": "x"}\n{"adapter": "a"}\nnonsense\n')
    mute = Hub(tmp_path / "mutes")
    mute.add(lora(tmp_path / "mute", seed=3), "mute")
    places = {"MUTE": mute.root, "HUB": hub.root, "OUT": tmp_path / "out", "NONE": tmp_path / "none", "BAD": bad}
    code, out, err = run(capsys, *(places.get(word, word) for word in argv))
    assert code == 2 and not out and len(err) == 1 and message in err[0]
    assert not (tmp_path / "out").exists()
