"""`molora hub ...`: frozen flags, help, tables for people, JSON for programs, exit codes, one line on bad input."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molora import cli
from molora.hub.store import Hub
from tests.adapters import CONFIG, WEIGHTS, change_config, wrapped
from tests.hub.loras import lora
from tests.test_interchange import peft_lora
from tests.tiny import save_tiny, tiny_llama

ROOT = Path(__file__).resolve().parent.parent.parent
EACH = "--debug --json --root"
FILTERS = "--all-versions --base --kind --task"
CARD = "--author --base --card --description --licence --metric --prompt --task --trained-on"
FLAGS = {
    "add": f"source name {EACH} {CARD} --alias --model --version",
    "get": f"ref {EACH} --to",
    "list": f"{EACH} {FILTERS}",
    "search": f"text {EACH} {FILTERS} --like --limit",
    "verify": f"ref {EACH}",
    "diff": f"a b {EACH} --limit",
    "remove": f"ref {EACH} --all-versions",
    "alias": f"alias ref {EACH}",
}
SUMS = {"mix", "average", "negate", "compress", "similarity", "cluster"}
MORE = {"pull", "push", "train-gates"} | SUMS  # frozen in tests of their own


@pytest.fixture
def root(tmp_path):
    hub = Hub(tmp_path / "hub")
    for seed, name in enumerate(("news", "films")):
        card = {"task": "topic" if seed == 0 else "sentiment", "description": f"About {name}.", "licence": "mit"}
        hub.add(lora(tmp_path / name, seed=seed), name, card | {"metrics": {"accuracy": 0.9 + seed / 100}})
    hub.add(lora(tmp_path / "news2", seed=7, rank=3), "news", task="topic", alias="best")
    return hub.root


def run(capsys, *argv):
    code = cli.main(["hub", *(str(word) for word in argv)])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip()]


def parsers():
    top = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["hub"]
    top.fill()
    return next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_the_flags_are_frozen():
    found = parsers()
    assert set(found) == set(FLAGS) | MORE
    for name, flags in FLAGS.items():
        actions = [a for a in found[name]._actions if a.dest != "help"]
        assert {s for a in actions for s in (a.option_strings or [a.dest])} == set(flags.split()), name


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_help(command, capsys):
    code, text, _ = run(capsys, command, "--help")
    assert code == 0 and "example:\n  molora hub " + command in text
    assert all(flag in text for flag in FLAGS[command].split() if flag.startswith("-"))
    assert all(action.help for action in parsers()[command]._actions)


def test_an_empty_list_says_what_there_is(root, tmp_path, capsys):
    code, text, _ = run(capsys, "list", "--task", "topics", "--kind", "mixture", "--root", root)
    assert code == 0 and "no adapters in" in text
    assert text.endswith("of task 'topics', kind 'mixture'; tasks there: sentiment, topic; kinds there: lora\n")
    (tmp_path / "empty").mkdir()
    assert run(capsys, "list", "--root", tmp_path / "empty")[1].endswith("molora hub add FOLDER NAME puts one there\n")
    says = f"'{tmp_path / 'films'}' is an adapter and no library; put it into one: molora hub add"
    assert run(capsys, "list", "--root", tmp_path / "films")[1].startswith(says)


def test_looking_leaves_a_folder_that_is_no_library_as_it_is(root, tmp_path, capsys):
    before = sorted(path.name for path in (tmp_path / "films").iterdir())
    for command in (["list"], ["search", "x"], ["verify"], ["get", "x"], ["similarity"]):
        run(capsys, *command, "--root", tmp_path / "films")
    assert sorted(path.name for path in (tmp_path / "films").iterdir()) == before
    for command in (["remove", "news"], ["alias", "best", "news"]):
        assert run(capsys, *command, "--root", tmp_path / "gone")[0] == 2
    assert not (tmp_path / "gone").exists()


def test_folders_that_cannot_be_written_are_told(root, tmp_path, capsys, monkeypatch):
    def no(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("molora.files.tempfile.mkdtemp", no)
    code, _, (line,) = run(capsys, "get", "films", "--to", tmp_path / "copy", "--root", root)
    assert code == 2 and line.endswith(
        f"'{tmp_path / 'copy'}' cannot be written: Permission denied; save into another folder"
    )
    monkeypatch.setattr("molora.hub.disk.FileLock.acquire", no)
    code, _, (line,) = run(capsys, "add", tmp_path / "films", "more", "--root", root)
    assert code == 2 and line == f"molora: the library '{root}' cannot be written: Permission denied"


def test_add_beside_the_base_leaves_out_what_the_base_has(tmp_path, capsys):
    base = save_tiny(tiny_llama(), None, tmp_path / "base")
    folder = peft_lora(tmp_path / "lora", modules_to_save=["lm_head"])
    capsys.readouterr()
    command = ["add", folder, "one", "--root", tmp_path / "hub"]
    code, _, (line,) = run(capsys, *command)
    assert code == 2 and "add it to a library beside its base (--model)" in line
    code, _, (line,) = run(capsys, *command, "--model", base)
    assert code == 0 and line == "note: left out, since the base has the same: base_model.model.lm_head.weight"
    assert run(capsys, "verify", "--root", tmp_path / "hub")[0] == 0


def test_what_is_no_adapter_is_told_without_a_list_of_its_files(tmp_path, capsys):
    base = save_tiny(tiny_llama(), None, tmp_path / "base")
    capsys.readouterr()
    code, _, lines = run(capsys, "add", base, "one", "--root", tmp_path / "hub")
    assert code == 2 and len(lines) == 1 and "adapter_config.json is missing" in lines[0]


def test_help_of_all(capsys):
    code, text, _ = run(capsys, "--help")
    assert code == 0 and all(f"\n    {command}" in text for command in (*FLAGS, *MORE))
    assert cli.main(["--help"]) == 0
    assert "    hub  " in capsys.readouterr().out


BAD = [
    ([], "required: COMMAND; see molora hub --help"),
    (["lst"], "invalid choice: 'lst'"),
    (["list", "--al"], "unrecognized arguments: --al"),
    (["list", "--kind", "ia3"], "argument --kind: invalid choice"),
    (["get"], "required: NAME; see molora hub get --help"),
    (["get", "nws"], "adapter 'nws' is unknown; did you mean 'news'"),
    (["get", "news@9"], "adapter 'news' has no version 9; it has: 1, 2"),
    (["get", "../news"], "adapter name '../news' cannot be used"),
    (["get", "news", "--to", "{films}"], "exists and is not an empty folder"),
    (["add", "{gone}", "x"], "there is no folder"),
    (["add", "{films}", "a/b"], "such as 'a-b'"),
    (["add", "{films}", "films", "--version", "1", "--task", "x"], "has a version 1 already"),
    (["add", "{films}", "x", "--metric", "high"], "--metric 'high' is not NAME=NUMBER; write accuracy=0.91"),
    (["add", "{films}", "x", "--card", "{gone}"], "cannot be read"),
    (["add", "{films}", "x", "--model", "{gone}"], "does not exist"),
    (["search", "--limit", "0"], "limit must be at least 1, got 0"),
    (["search", "a", "--like", "news"], "by text or by like, not by both"),
    (["search", "!?"], "holds no word to search for"),
    (["diff", "news@1", "gone"], "adapter 'gone' is unknown"),
    (["diff", "news", "films", "--limit", "0"], "--limit must be at least 1"),
    (["remove", "news"], "has versions 1, 2; name one, such as news@1, or remove all of them (--all-versions)"),
    (["remove", "news", "--root", "{gone}"], "there is no library at"),
    (["alias", "best", "news", "--root", "{gone}"], "there is no library at"),
    (["pull", "./films"], "no address of an adapter: write owner/name, or s3://bucket/folder; for folders of this"),
    (["push", "films", "./copy"], "for folders of this machine there are molora hub add and molora hub get --to"),
    (["remove", "news@2"], "alias 'best' stands for news@2; remove it first"),
    (["alias", "films", "news"], "alias 'films' is the name of an adapter"),
    (["list", "--root", "{gone}"], "there is no library at"),
]


@pytest.mark.parametrize(("argv", "needle"), BAD, ids=[" ".join(argv) or "-" for argv, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(argv, needle, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOLORA_HUB", str(root))
    places = {"gone": tmp_path / "gone", "films": tmp_path / "films"}
    code, out, lines = run(capsys, *(word.format(**places) for word in argv))
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert lines[0].startswith("molora: ") and needle in lines[0]
    assert not (tmp_path / "gone").exists()


def test_debug_shows_where(root):
    from molora.errors import ConfigError

    for argv in (
        ["hub", "--debug", "get", "gone", "--root", str(root)],
        ["hub", "get", "gone", "--debug", "--root", str(root)],
    ):
        with pytest.raises(ConfigError):
            cli.main(argv)


# --- what they print --------------------------------------------------------------------------------------------------


def test_list(root, capsys):
    code, out, lines = run(capsys, "list", "--root", root)
    assert (code, lines) == (0, [])
    head, _, films, news, _, total = out.splitlines()
    assert head.split() == ["adapter", "aliases", "kind", "rank", "size", "task", "base", "licence", "metrics"]
    assert films.split()[:5] == ["films@1", "-", "lora", "r", "2"]
    assert films.split()[-5:] == ["sentiment", "llama", "mit", "accuracy", "0.91"]
    assert news.split()[:5] == ["news@2", "best", "lora", "r", "3"]
    assert total.startswith(f"2 in {root}, ")
    code, out, _ = run(capsys, "list", "--root", root, "--all-versions", "--json")
    assert [(e["ref"], e["kind"], e["aliases"]) for e in json.loads(out)] == [
        ("films@1", "lora", []),
        ("news@1", "lora", []),
        ("news@2", "lora", ["best"]),
    ]
    assert json.loads(out)[0]["card"]["metrics"] == {"accuracy": 0.91}
    code, out, _ = run(capsys, "list", "--root", root, "--task", "sentiment", "--json")
    assert [e["ref"] for e in json.loads(out)] == ["films@1"]
    assert run(capsys, "list", "--root", root, "--kind", "mixture")[1].startswith("no adapters in")


def test_add_get_and_remove(root, tmp_path, capsys):
    wrapped().save_pretrained(tmp_path / "mix")
    argv = [
        "add",
        tmp_path / "mix",
        "mix",
        "--root",
        root,
        "--task",
        "all",
        "--licence",
        "mit",
        "--description",
        "Does\nall.",
    ]
    argv += [
        "--author",
        "A",
        "--author",
        "B",
        "--trained-on",
        "x",
        "--prompt",
        "Say",
        "--metric",
        "f1=0.5",
        "--base",
        "b/m",
    ]
    code, out, lines = run(capsys, *argv, "--alias", "every")
    assert lines == []
    assert code == 0 and out.startswith(f"mix@1 is in {root}, ")
    card = Hub(root).get("every").card
    assert (card.task, card.base, card.description, card.authors) == ("all", "b/m", "Does\nall.", ("A", "B"))
    assert (card.data, card.prompts, card.metrics) == (("x",), ("Say",), {"f1": 0.5})
    code, out, _ = run(capsys, "add", tmp_path / "news", "bare", "--root", root)
    assert out.splitlines()[1] == "its card does not say: task, description, licence"
    code, out, _ = run(capsys, "get", "mix", "--root", root)
    text = " ".join(out.split())
    for part in (
        "adapter mix@1 mixture, 3 experts",
        "aliases every",
        "description Does all.",
        "authors A B",
        "f1: 0.5",
    ):
        assert part in text
    code, out, _ = run(capsys, "get", "mix@1", "--root", root, "--json", "--to", tmp_path / "copy")
    facts = json.loads(out)
    assert facts["ref"] == "mix@1" and facts["digest"] == Hub(root).get("mix").digest
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {CONFIG, WEIGHTS, "card.yaml"} <= names
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (root / "mix/1" / name).read_bytes()
    assert run(capsys, "remove", "every", "--root", root)[1] == f"removed every from {root}\n"
    code, out, _ = run(capsys, "remove", "mix", "--root", root, "--json")
    assert (code, json.loads(out)) == (0, {"removed": ["mix@1"]})
    code, out, _ = run(capsys, "remove", "news", "--root", root, "--all-versions")
    assert code == 2  # an alias stands for it
    assert run(capsys, "alias", "good", "news@1", "--root", root)[1] == "'good' stands for news@1\n"


def test_add_checks_against_the_base(root, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "small")
    argv = ["add", tmp_path / "news", "x", "--root", root, "--model"]
    code, _, lines = run(capsys, *argv, tmp_path / "small")
    assert code == 2 and "q_proj" in lines[-1]
    code, out, _ = run(capsys, *argv, tmp_path / "base", "--json", "--base", "a/name")
    card = json.loads(out)["card"]
    assert (code, card["base"]) == (0, "a/name") and card["fingerprint"]["structure"]
    assert [hit.entry.name for hit in Hub(root).search(base=tiny_llama())] == ["x"]


def test_search(root, capsys):
    code, out, _ = run(capsys, "search", "about", "films", "--root", root)
    assert code == 0 and out.splitlines()[0].split() == ["adapter", "words", "kind", "task", "description"]
    assert out.splitlines()[2].split()[0] == "films@1"
    code, out, _ = run(capsys, "search", "--like", "news", "--root", root, "--json")
    (hit,) = json.loads(out)
    assert hit["ref"] == "films@1" and hit["by"] == "deltas" and -1 <= hit["score"] <= 1
    nothing = f"nothing was found in {root}; molora hub list shows what is there\n"
    assert run(capsys, "search", "quantum", "--root", root)[:2] == (0, nothing)
    assert json.loads(run(capsys, "search", "quantum", "--root", root, "--json")[1]) == []


def test_verify(root, capsys):
    code, out, _ = run(capsys, "verify", "--root", root)
    assert code == 0
    assert out.splitlines() == ["ok    films@1", "ok    news@1", "ok    news@2", "", "3 checked, 0 with problems"]
    change_config(root / "news/1", r=7)
    code, out, lines = run(capsys, "verify", "--root", root)
    assert (code, lines) == (1, []) and "FAIL  news@1" in out and f"{CONFIG} has other content" in out
    code, out, _ = run(capsys, "verify", "--root", root, "--json")
    found = json.loads(out)
    assert code == 1 and found["checked"] == 3 and set(found["problems"]) == {"news@1"}
    assert run(capsys, "verify", "films", "--root", root)[0] == 0
    assert run(capsys, "verify", "news@1", "--root", root)[0] == 1
    (root / "news/1" / WEIGHTS).write_bytes(b"")
    code, out, _ = run(capsys, "list", "--root", root, "--all-versions")
    assert code == 0 and "news@1   -        damaged" in out and "1 damaged; see molora hub verify" in out


def test_diff(root, capsys):
    code, out, _ = run(capsys, "diff", "news@1", "news@2", "--root", root)
    assert code == 1
    assert "F32 [2, 32] -> F32 [3, 32]" in out and out.splitlines()[-1] == "0 tensors are equal; 4 differ"
    code, out, _ = run(capsys, "diff", "news@1", "films", "--root", root, "--limit", "1")
    assert code == 1 and "other values" in out and "… and 3 more" in out
    code, out, _ = run(capsys, "diff", "best", "news@2", "--root", root)
    assert (code, out) == (0, "4 tensors are equal; the same\n")
    code, out, _ = run(capsys, "diff", "news@1", "news@2", "--root", root, "--json")
    assert code == 1 and json.loads(out)["config"]["r"] == [2, 3]


def test_where_the_library_is(root, tmp_path, capsys, monkeypatch):
    """--root before $MOLORA_HUB before ./adapters_hub; the shipped one is only read."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MOLORA_HUB", str(root))
    assert len(json.loads(run(capsys, "list", "--json")[1])) == 2
    assert run(capsys, "add", tmp_path / "news", "mine", "--root", tmp_path / "own")[0] == 0
    assert [e["ref"] for e in json.loads(run(capsys, "list", "--json", "--root", tmp_path / "own")[1])] == ["mine@1"]
    monkeypatch.delenv("MOLORA_HUB")
    from molora.hub import commands

    monkeypatch.setattr(commands, "adapters_hub_dir", lambda: root)
    assert len(json.loads(run(capsys, "list", "--json")[1])) == 2
    assert run(capsys, "remove", "films")[0] == 2
    assert run(capsys, "add", tmp_path / "news", "mine")[0] == 0
    assert (tmp_path / "here/adapters_hub/mine/1" / WEIGHTS).is_file()
    assert [e["ref"] for e in json.loads(run(capsys, "list", "--json")[1])] == ["mine@1"]


def test_as_a_process(root):
    """As people run it: nothing but the table on stdout, and no warnings of libraries on stderr."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "molora.cli", "hub", "verify", "--root", str(root)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "3 checked, 0 with problems")
    assert done.stderr == ""
