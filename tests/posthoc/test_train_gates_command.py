"""`molora hub train-gates`: it writes what train_gates makes, and says what is wrong in one line."""

import json

import pytest
import torch

import molora
from molora.cli import main
from molora.posthoc.gates import GATES, load_gates
from molora.posthoc.phatgoose import build
from tests.posthoc.library import make_lora
from tests.tiny import save_tiny, tiny_inputs, tiny_llama, tiny_tokenizer


@pytest.fixture
def places(tmp_path):
    """(folder of the base, folder of a LoRA, data spec)"""
    base = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "base")
    words = "film star bank song team".split()
    rows = [{"prompt": f"what is the {word} ?", "answer": f"it is {word}"} for word in words]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    return base, make_lora(tmp_path / "lora", 3), f"words={data}"


def command(base, lora, data, *more):
    return ["hub", "train-gates", str(lora), "--model", str(base), "--data", data, "--quiet", *more]


def test_it_trains_and_writes_the_gates_beside_the_lora(places, capsys):
    lora = places[1]
    options = ["--steps", "12", "--batch-size", "5", "--json"]
    assert main(command(*places, *options)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gates"] == str(lora / GATES) and told["steps"] == 12 and told["rows"] == 5
    assert told["last_loss"] < told["first_loss"]
    gates = load_gates(lora)
    assert len(gates) == told["layers"] == 8 and all(v.abs().sum() > 0 for v in gates.values())
    model = build(molora.import_peft(tiny_llama(), [lora]), gates=[lora])
    with torch.no_grad():
        model(**tiny_inputs(tiny_llama()))
    assert main(command(*places, *options)) == 0  # the same seed gives the same gates
    torch.testing.assert_close(load_gates(lora), gates, atol=0, rtol=0)


def test_a_version_in_a_library_is_not_touched(places, tmp_path, capsys):
    base, lora, data = places
    root = ["--root", str(tmp_path / "library")]
    assert main(["hub", "add", str(lora), "words", *root]) == 0
    capsys.readouterr()
    assert main(command(base, "words", data, *root)) == 2
    assert "versions never change; say where with --output" in capsys.readouterr().err
    output = tmp_path / "gates" / "words.safetensors"
    assert main(command(base, "words", data, "--steps", "2", "--output", str(output), *root)) == 0
    assert "8 gates in" in capsys.readouterr().out and len(load_gates(output)) == 8
    assert main(["hub", "verify", *root]) == 0


def test_gates_go_with_their_adapter_into_a_library_and_to_storage(places, tmp_path, capsys):
    lora = places[1]
    assert main(command(*places, "--steps", "2")) == 0
    root, other = (["--root", str(tmp_path / name)] for name in ("library", "other"))
    assert main(["hub", "add", str(lora), "words", *root]) == 0 and main(["hub", "verify", *root]) == 0
    assert main(["hub", "push", "words", f"file://{tmp_path}/storage/words", "--quiet", *root]) == 0
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["hub", "pull", f"file://{tmp_path}/storage/words", "--quiet", *cache, *other]) == 0
    (found,) = (tmp_path / "other").rglob(GATES)
    torch.testing.assert_close(load_gates(found), load_gates(lora), atol=0, rtol=0)


def test_what_cannot_be_is_said(places, tmp_path, capsys):
    base, lora, data = places
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "a film", "label": "good"}\n{"text": "a song", "label": "bad"}\n')
    for arguments, message in (
        (command(base, lora, f"x={labelled}"), "need the head that the LoRA was trained with"),
        (command(base, lora, data, "--batch-size", "0"), "--batch-size must be at least 1"),
        (command(base, lora, data, "--steps", "0"), "steps must be at least 1"),
        (command(base, tmp_path / "nowhere", data, "--root", str(tmp_path / "library")), "nowhere"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (lora / GATES).exists()
