"""`molora migrate ...`, as a user types it: what it writes computes what the other library computes."""

import argparse
import json

import pytest
import torch
import yaml
from peft import PeftModel

import molora
from molora import cli
from molora.errors import ConfigError
from molora.hub.migrate import gates_from_prompts
from molora.hub.migrate.mergekit import read_mergekit
from tests.adapters import CONFIG, logits
from tests.hub.test_migrate import (
    AGAINST,
    PROMPTS,
    authors_folder,
    by_hand,
    mixlora,
    mttl,
    peft_xlora,
    save_whole,
    tokenize,
)
from tests.posthoc.mixtures import mixture_of, save_loras
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

FLAGS = {
    "xlora": "folder --debug --json --expert --model --out",
    "moe-peft": "folder --debug --json --model --out",
    "mttl": "library names --debug --json --out",
    "mergekit": "file --debug --json --hub --model --out",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny(tiny_llama(), tiny_tokenizer(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3, target_modules=["q_proj", "v_proj", "down_proj"])


def run(capsys, *argv):
    code = cli.main(["migrate", *(str(word) for word in argv)])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip() and not line.startswith("note:")]


def parsers():
    top = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["migrate"]
    top.fill()
    return next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_the_flags_are_frozen():
    found = parsers()
    assert set(found) == set(FLAGS)
    for name, flags in FLAGS.items():
        actions = [a for a in found[name]._actions if a.dest != "help"]
        assert {s for a in actions for s in (a.option_strings or [a.dest])} == set(flags.split()), name


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_help(command, capsys):
    code, text, _ = run(capsys, command, "--help")
    assert code == 0 and f"example:\n  molora migrate {command}" in text
    assert all(action.help for action in parsers()[command]._actions)


def test_xlora_of_peft_and_of_the_authors(base, loras, tmp_path, capsys):
    theirs = peft_xlora(loras)
    want = logits(theirs)
    folder = save_whole(theirs, loras, tmp_path / "x")
    code, out, err = run(capsys, "xlora", folder, "--model", base, "--out", tmp_path / "a", "--json")
    assert (code, err) == (0, []) and json.loads(out)["experts"] == ["0", "1", "2"]
    torch.testing.assert_close(logits(molora.load(tiny_llama(), tmp_path / "a")), want, atol=5e-6, rtol=5e-6)
    folder = authors_folder(theirs, loras, tmp_path / "y", enable_relu_and_dropout=True)
    given = [word for name, lora in zip("abc", loras, strict=True) for word in ("--expert", f"{name}={lora}")]
    code, out, err = run(capsys, "xlora", folder, "--model", base, *given, "--out", tmp_path / "b")
    assert (code, err) == (0, []) and out.splitlines()[0] == "3 experts in 6 layers: a, b, c"
    torch.testing.assert_close(logits(molora.load(tiny_llama(), tmp_path / "b")), want, atol=5e-6, rtol=5e-6)


def test_moe_peft(base, tmp_path, capsys):
    tensors = mixlora(tmp_path / "x")
    code, out, err = run(capsys, "moe-peft", tmp_path / "x", "--model", base, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, []) and json.loads(out)["experts"] == 4 and json.loads(out)["recipe"] == "mixlora"
    mine = molora.load(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(mine), logits(by_hand(tensors, 5 / 3, 5 / 3)), atol=1e-5, rtol=1e-5)


def test_mttl_writes_all_experts_but_deleted_ones_or_none(tmp_path, capsys):
    library, out = tmp_path / "library", tmp_path / "out"
    library.mkdir()
    tensors = {name: mttl(library, name) for name in ("cook", "bake")}
    mttl(library, "gone", expert_deleted=True)
    code, text, err = run(capsys, "mttl", library, "--out", out, "--json")
    assert (code, err, set(json.loads(text)["written"])) == (0, [], {"bake", "cook"})
    assert {path.name for path in out.iterdir()} == {"bake", "cook"}
    loaded = PeftModel.from_pretrained(tiny_llama(), out / "cook").merge_and_unload()
    path = "model.layers.0.self_attn.q_proj"
    a, b = (tensors["cook"][f"{path}.lora_{half}"] for half in "ab")
    change = loaded.get_submodule(path).weight - tiny_llama().get_submodule(path).weight
    torch.testing.assert_close(change, (a @ b).T * 7 / 3, atol=1e-6, rtol=1e-5)
    code, text, err = run(capsys, "mttl", library, "cook", "gone", "none", "--out", tmp_path / "two")
    assert code == 2 and len(err) == 1 and "marked as deleted" in err[0] and "no expert 'none'" in err[0]
    assert not (tmp_path / "two").exists()


def moe_file(path, loras, **changes):
    experts = [
        {"source_model": str(lora), "positive_prompts": PROMPTS[f"lora_{n}"]}
        | ({"negative_prompts": AGAINST[f"lora_{n}"]} if f"lora_{n}" in AGAINST else {})
        for n, lora in enumerate(loras)
    ]
    content = {"gate_mode": "hidden_avg", "experts_per_token": 1, "dtype": "bfloat16", "experts": experts} | changes
    path.write_text(yaml.safe_dump(content))
    return path


def test_mergekit_starts_the_gates_as_the_function_does(base, loras, tmp_path, capsys):
    file = moe_file(tmp_path / "moe.yaml", loras, base_model=base)
    code, out, err = run(capsys, "mergekit", file, "--out", tmp_path / "out")
    assert (code, err) == (0, []) and out.splitlines()[0] == "3 experts in 6 layers: lora_0, lora_1, lora_2"
    want = gates_from_prompts(mixture_of(loras), tokenize, PROMPTS, AGAINST, pool="mean", top_k=1)
    got = molora.load(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(want), atol=1e-6, rtol=1e-6)
    last = gates_from_prompts(mixture_of(loras), tokenize, PROMPTS, AGAINST, pool="last", top_k=1)
    assert (logits(last) - logits(want)).abs().max() > 1e-4  # it was the mean that was asked for


def test_what_a_mergekit_file_cannot_ask_for_is_told_at_once(loras, tmp_path):
    file = moe_file(
        tmp_path / "moe.yaml",
        loras,
        gate_mode="cheap_embed",
        experts_per_token=4,
        shared_experts=[{"source_model": "x"}],
        base_modle="y",
    )
    with pytest.raises(ConfigError) as error:
        read_mergekit(file)
    for part in ("4 problems", "token embeddings", "from 1 to the number of experts 3", "did you mean 'base_model'",
                 "shared_experts"):  # fmt: skip
        assert part in str(error.value)
    experts = [{"source_model": "", "positive_prompts": "one"}, {"source_model": "a", "noise_scale": 0.1}]
    with pytest.raises(ConfigError) as error:
        read_mergekit(moe_file(tmp_path / "moe.yaml", [], experts=experts))
    for part in ("4 problems", "source_model must be", "a list of texts", "positive_prompts is missing", "noise_scale"):
        assert part in str(error.value)


BAD = [
    ([], "required: COMMAND; see molora migrate --help"),
    (["xlora", "{lora}", "--out", "o"], "required: --model"),
    (["xlora", "./gone", "--model", "{base}", "--out", "o"], "there is no folder './gone'"),
    (["xlora", "{lora}", "--model", "{base}", "--out", "o"], "not XLORA"),
    (["xlora", "{lora}", "--model", "{base}", "--expert", "x", "--out", "o"], "is not NAME=FOLDER"),
    (["moe-peft", "{lora}", "--model", "{base}", "--out", "o"], "not 'MIXLORA'"),
    (["moe-peft", "{lora}", "--model", "./gone", "--out", "o"], "model folder './gone' does not exist"),
    (["mttl", "{lora}", "--out", "o"], "holds no expert"),
    (["mergekit", "gone.yaml", "--model", "{base}", "--out", "o"], "'gone.yaml' cannot be read"),
    (["mergekit", "moe.yaml", "--out", "o"], "names no base_model; give --model"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=[" ".join(argv) or "-" for argv, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(argv, says, base, loras, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moe_file(tmp_path / "moe.yaml", loras)
    code, out, lines = run(capsys, *(word.format(base=base, lora=loras[0]) for word in argv))
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert says in lines[0] and not (tmp_path / "o").exists()
    assert (loras[0] / CONFIG).is_file()
