"""The command line: its flags, its help, its one line on bad input, and one way through all commands."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import molora
from molora import cli, commands
from tests.train.small import make_world

ROOT = Path(__file__).resolve().parent.parent

# Scripts and notebooks of users depend on these: a flag that goes away or changes its meaning breaks them.
BASE = "--debug --dtype --field --quantize"
FLAGS = {
    "train": f"recipe {BASE} --batch-size --data --epochs --eval-fraction --grad-accum --gradient-checkpointing --keep "
    "--learning-rate --max-length --max-steps --model --output --overwrite --quiet --resume --save-steps --seed --set "
    "--task-type",
    "eval": f"adapter {BASE} --batch-size --data --json --limit --max-new-tokens --model",
    "inspect": f"adapter {BASE} --batch-size --data --json --limit --model --png --task",
    "recipes": "--components --debug --json",
    "doctor": f"recipe {BASE} --adapter --data --grad-accum --gradient-checkpointing --json --max-length --model --set "
    "--task-type",
    "hub": "--debug",  # its commands: tests/hub/test_hub_cli.py
    **dict.fromkeys(("compose", "export"), "--debug"),  # the others: tests/hub/test_compose_commands.py
    "prompts": "--debug",  # its commands: tests/prompts/test_command.py
    "migrate": "--debug",  # its commands: tests/hub/test_migrate_commands.py
    "serve": "--debug",  # its flags: tests/serve/test_options.py
    "route": "--debug",  # its flags: tests/serve/test_proxy_options.py
    "tenants": "--debug",  # its commands: tests/serve/test_tenants_cli.py
}
REQUIRED = {"train": {"recipe", "model", "data"}, "eval": {"adapter", "data"}, "inspect": {"adapter"}, "recipes": set()}
REQUIRED["doctor"] = {"recipe", "model"}
REQUIRED |= {name: set() for name in ("hub", "compose", "export", "prompts", "migrate", "serve", "route", "tenants")}


def parsers():
    actions = cli.build_parser()._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices


def test_the_flags_are_frozen():
    found = {}
    for name, parser in parsers().items():
        actions = [a for a in parser._actions if a.dest != "help"]
        found[name] = {s for a in actions for s in (a.option_strings or [a.dest])}
        assert {a.dest for a in actions if a.required} == REQUIRED[name]
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}


def test_defaults_of_flags_are_those_of_the_library():
    from molora.train.settings import TrainSettings

    args = vars(cli.build_parser().parse_args("train r --model m --data d".split()))
    settings = vars(TrainSettings(recipe="r", model="m", data=["d"], output="o"))
    for name in settings.keys() & args.keys() - {"output"}:
        assert args[name] == settings[name], name
    assert settings.keys() - args.keys() == {"fields"}


@pytest.mark.parametrize("command", FLAGS)
def test_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "example:\n  molora " + command in text
    assert all(flag in text for flag in FLAGS[command].split() if flag.startswith("-"))
    for action in parsers()[command]._actions:
        assert action.help, action.dest


def test_help_of_all(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in FLAGS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"molora {molora.__version__}\n"


def test_the_parser_needs_nothing_but_the_standard_library():
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print([m for m in sys.modules if m in ('torch', 'peft')])"
    done = subprocess.run([sys.executable, "-c", code, cli.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- bad input: exit code 2 and one line ----


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(capsys, *argv):
    """(exit code, what was printed, the lines on stderr that are not notes or progress)."""
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip()]


BAD = [
    (["trian"], "invalid choice: 'trian'"),
    ([], "required: COMMAND"),
    (["train", "lora", "--data", "x"], "required: --model; see molora train --help"),
    (["train", "lora", "--model", "m", "--data", "x", "--sead", "1"], "unrecognized arguments: --sead"),
    (["train", "lora", "--model", "m", "--data", "x", "--dat", "y"], "unrecognized arguments: --dat"),
    (["train", "lora", "--model", "m", "--data", "x", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
    (["train", "lora", "--model", "m", "--data", "x", "--quantize", "2bit"], "choose from"),
    (["train", "lora", "--model", "m", "--data", "x", "--epochs", "1", "--max-steps", "1"], "give one of them"),
    (["train", "lora", "--model", "m", "--data", "gone.jsonl"], "gone.jsonl"),
    (["train", "dynmol", "--model", "{bert}", "--data", "{mood}"], "did you mean 'dynmole'"),
    (["train", "lora", "--model", "./gone", "--data", "{mood}"], "model folder './gone' does not exist"),
    (["train", "lora", "--model", "{bert}", "--data", "{qa}"], "is an encoder and cannot generate text"),
    (["train", "lora", "--model", "{bert}", "--data", "{mood}", "--field", "text"], "is not OURS=THEIRS"),
    (["train", "lora", "--model", "{bert}", "--data", "{mood}", "--set", "experts.num=0"], "whole number >= 1"),
    (["train", "lora", "--model", "{bert}", "--data", "{mood}", "--set", "a=1", "--set", "b=1"], "2 problems: 'a=1'"),
    (["train", "lora", "--model", "{bert}", "--data", "{mood}", "--set", "train.adam=1"], "did you mean 'adam_"),
    (["train", "{mood}", "--model", "{bert}", "--data", "{mood}"], "recipe"),
    (["eval", "./gone", "--data", "{mood}"], "there is no folder './gone'"),
    (["eval", "{bert}", "--data", "{mood}"], "holds no adapter_config.json, so it is no adapter"),
    (["eval", "{bert}", "--data", "{mood}", "--limit", "0"], "--limit must be at least 1"),
    (["inspect", "{bert}"], "holds no routing.json"),
    (["inspect", "./gone"], "there is no folder './gone'"),
    (["doctor", "lora", "--model", "./gone"], "model folder './gone' does not exist"),
    (["doctor", "lora", "--model", "{bert}", "--task-type", "causal_lm"], "is an encoder"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[f"{' '.join(a[:1])}: {m[:30]}" for a, m in BAD])
def test_bad_input(argv, message, world, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, lines = run(capsys, *(word.format(**world) for word in argv))
    assert code == 2
    assert out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("molora: ")
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where(world):
    with pytest.raises(molora.ConfigError):
        cli.main(["train", "lora", "--model", "./gone", "--data", world["mood"], "--debug"])


def test_interrupts_and_bugs(world, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    code, _, lines = run(capsys, "train", "lora", "--model", "m", "--data", "d")
    assert (code, lines) == (
        130,
        ["molora: interrupted; the same command with --resume goes on from the last checkpoint"],
    )
    assert run(capsys, "recipes")[0::2] == (130, ["molora: interrupted"])

    def broken(args):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(commands, "run", broken)
    code, _, lines = run(capsys, "recipes")
    assert (code, lines) == (1, ["molora: ZeroDivisionError: division; by zero (--debug shows where)"])


PIPE = """
import runpy, sys, types
stubs = {name: types.ModuleType(name) for name in ("molora", "molora.commands", "molora.errors")}
sys.modules.update(stubs)
stubs["molora"].commands = stubs["molora.commands"]
stubs["molora.errors"].MoloraError = type("MoloraError", (Exception,), {})
stubs["molora.commands"].run = lambda args: [print("x" * 100, flush=True) for _ in range(9999)]
sys.exit(runpy.run_path(sys.argv[1])["main"](["recipes"]))
"""


def test_a_pipe_that_closes():
    command = f"{sys.executable} -c '{PIPE}' {cli.__file__} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("141", "")


# ---- through all commands ----


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """An adapter made by the command line itself, in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    argv = ["train", world["recipe"], "--model", world["bert"], "--data", f"mood={world['mood']}", world["topic"]]
    argv += ["--max-steps", "4", "--set", "experts.num=4", "--set", "price=null", "--eval-fraction", "0.25"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "molora.cli", *argv], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "small", done


def test_train(adapter):
    folder, done = adapter
    assert (folder / "adapter_model.safetensors").is_file()
    assert "4 steps in" in done.stdout
    assert "saved to runs/small" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("mood", "topic", "mean"))] == [
        "mood",
        "topic",
        "mean",
    ]
    assert "note: new in this model, trained and saved whole: bert.pooler.dense, classifier" in done.stderr
    assert "4/4" in done.stderr  # the progress bar
    assert "Warning" not in done.stderr
    facts = json.loads((folder / "training.json").read_text())
    assert facts["recipe"] == "small"
    assert facts["settings"]["set"] == ["experts.num=4", "price=null"]


def test_eval(adapter, world, capsys):
    folder, _ = adapter
    code, out, lines = run(capsys, "eval", folder, "--data", f"mood={world['mood']}", "--json", "--limit", "10")
    assert (code, lines) == (0, [])
    figures = json.loads(out)["tasks"]["mood"]
    assert figures["rows"] == 10
    assert figures["majority"] == 0.5
    code, out, _ = run(capsys, "eval", folder, "--data", f"mood={world['mood']}", f"topic={world['topic']}")
    assert code == 0
    assert out.splitlines()[0].split() == ["task", "rows", "accuracy", "loss", "majority"]
    assert out.splitlines()[-1].split()[:2] == ["mean", "42"]


def test_inspect(adapter, capsys, tmp_path):
    folder, _ = adapter
    code, out, lines = run(capsys, "inspect", folder, "--png", tmp_path / "map.png")
    assert (code, lines) == (0, [f"note: wrote {tmp_path / 'map.png'}"])
    assert out.splitlines()[0].split()[:2] == ["layer", "experts"]
    assert "counted on evaluation data of the training run" in out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "inspect", folder, "--json", "--task", "topic")
    site = next(iter(json.loads(out)["sites"].values()))
    assert code == 0
    assert len(site["all"]["load"]) == 4
    assert list(site["tasks"]) == ["topic"]
    assert site["tasks"]["topic"]["tokens"] < site["all"]["tokens"]
    code, _, lines = run(capsys, "inspect", folder, "--task", "topics")
    assert code == 2
    assert "did you mean 'topic'" in lines[0]


def test_inspect_fresh_data(adapter, world, capsys):
    folder, _ = adapter
    code, out, lines = run(capsys, "inspect", folder, "--data", f"mood={world['mood']}", "--limit", "3")
    assert (code, lines) == (0, [])
    assert "counted on fresh data" in out
    code, _, lines = run(capsys, "inspect", folder, "--data", world["qa"])
    assert code == 2
    assert "was trained on classification data, but qa is generation data" in lines[0]


def test_recipes(capsys):
    code, out, lines = run(capsys, "recipes")
    assert (code, lines) == (0, [])
    assert [line.split()[0] for line in out.splitlines()[2:]] == molora.recipes()
    assert len(out.splitlines()) == 2 + len(molora.recipes())
    code, out, _ = run(capsys, "recipes", "--json")
    listed = {recipe["name"]: recipe for recipe in json.loads(out)}
    assert listed["dynmole"]["arxiv"] == "2504.00661"
    assert all(recipe["what"] for recipe in listed.values())


def test_components(capsys):
    code, out, _ = run(capsys, "recipes", "--components", "--json")
    kinds = json.loads(out)
    assert code == 0
    routing = {"feature", "scorer", "link", "selector", "price", "pool", "loss", "objective"}
    assert set(kinds) == routing | {"form", "schedule", "controller", "entropy"}
    assert all(entry["summary"] for entries in kinds.values() for entry in entries)
    top_k = next(entry for entry in kinds["selector"] if entry["name"] == "top_k")
    assert "k=2" in top_k["options"]
    assert not any(option.startswith("price") for option in top_k["options"])  # molora passes it itself
    code, out, _ = run(capsys, "recipes", "--components")
    assert all(f"  {entry['name']} " in out for entries in kinds.values() for entry in entries)


def test_doctor(world, adapter, capsys):
    folder, _ = adapter
    changes = ["--set", "experts.num=4", "--set", "price=null"]
    base = ["doctor", world["recipe"], "--model", world["bert"], "--data", world["mood"], world["topic"], *changes]
    code, out, lines = run(capsys, *base, "--adapter", folder)
    assert (code, lines) == (0, [])
    assert "0 failed" in out
    code, out, _ = run(capsys, *base, "--adapter", folder, "--set", "experts.rank=3", "--json")
    assert code == 1
    (failed,) = [finding for finding in json.loads(out) if finding["level"] == "fail"]
    assert "has shape" in failed["what"]
