"""The options of a server: from a YAML and flags, all mistakes at once, and what starting makes of them."""

import dataclasses

import pytest
import yaml

from molora.cli import main
from molora.errors import ConfigError
from molora.serve.options import ServeOptions
from tests.serve.served import ENVIRONMENT, SIZES


def written(folder, **options):
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def test_sizes_and_names_are_read():
    options = ServeOptions("./models/gemma", kv_memory="2GiB", cpu_memory=1000, max_body="1MB")
    assert (options.kv_memory, options.cpu_memory, options.max_body) == (2 * 2**30, 1000, 10**6)
    assert options.name == "gemma" and options.port == 8000 and options.host == "127.0.0.1"
    assert ServeOptions(**options.to_dict()) == options  # what is told can be read again


def test_flags_win_over_the_file_and_paths_are_relative_to_it(tmp_path):
    path = written(
        tmp_path, model="./base", hub="../hub", slots={8: 4}, port=1, tenants="t.yaml", feedback={"folder": "./f"},
        selectors={"a": {"folder": "./s"}, "b": {"method": "knn"}},
    )  # fmt: skip
    options = ServeOptions.read(path, port=2, model=None, name="m")
    assert options.model == str(tmp_path / "base") and options.hub == str(tmp_path.parent / "hub")
    assert (options.port, options.name, options.slots, options.tenants) == (2, "m", {8: 4}, "t.yaml")
    assert options.feedback == {"folder": str(tmp_path / "f")}
    assert options.selectors == {"a": {"folder": str(tmp_path / "s")}, "b": {"method": "knn"}}


def test_every_mistake_is_told_at_once(tmp_path):
    wrong = {
        "modell": "x", "backend": "vllm", "dtype": "int8", "quantize": "2bit", "kv_memory": "lots", "max_batch": 0,
        "max_waiting": -1, "port": 70000, "timeout": 0, "drain": "long", "slots": {8: 0}, "adapters": "law",
        "selectors": [1], "feedback": {"floder": "x"}, "docs": "yes", "log_level": "loud", "max_length": 1,
        "host": 1, "loaders": True, "max_body": -5, "targets": [1],
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        ServeOptions.read(written(tmp_path, **wrong))
    text = str(error.value)
    assert all(key in text for key in wrong) and "did you mean 'model'" in text
    assert "model is missing" in text and "say which with hub" in text


@pytest.mark.parametrize(
    "value, part",
    [
        ({"model": "x", "hub": "h", "manifest": "m", "pinned": ["a"]}, "takes the place"),
        ({"model": "x", "pinned": ["a"]}, "say which with hub"),
        ({"model": "x", "slots": {"8": 4}}, "slots"),
        ({"model": "x", "feedback": 3}, "feedback must be"),
        ({"model": 5}, "model is missing"),
    ],
)
def test_single_mistakes(tmp_path, value, part):
    with pytest.raises(ConfigError, match=part):
        ServeOptions.read(written(tmp_path, **value))


@pytest.mark.parametrize("content", ["[1]", "a: [", "", "text", "\x00"])
def test_files_that_are_no_options(tmp_path, content):
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        ServeOptions.read(path)
    with pytest.raises(ConfigError, match="nothing here"):
        ServeOptions.read(tmp_path / "nothing here")


def test_every_option_is_described_and_every_flag_is_one():
    import argparse

    from molora.serve.parser import add_serve

    names = {one.name for one in dataclasses.fields(ServeOptions)}
    assert all(f" {name}" in ServeOptions.__doc__ for name in names)
    parser = argparse.ArgumentParser()
    add_serve(parser)
    flags = {action.dest for action in parser._actions} - {"help", "config", "check"}
    assert flags <= names
    assert all(action.help for action in parser._actions)


# --- the command ----------------------------------------------------------------------------------------------------


def check(capsys, *flags):
    """Run `molora serve --check`; returns the exit code and what it printed."""
    code = main(["serve", "--check", *map(str, flags)])
    return code, capsys.readouterr().err


def test_check_starts_reports_and_stops(world, tmp_path, capsys, monkeypatch):
    for name, key in ENVIRONMENT.items():
        monkeypatch.setenv(name, key)
    path = written(
        tmp_path, model=str(world / "base"), hub=str(world / "hub"), tenants=str(world / "tenants.yaml"),
        database=str(tmp_path / "tenants.db"), selectors={"topic": {"embedder": "words"}}, feedback=True, **SIZES,
    )  # fmt: skip
    code, text = check(capsys, "--config", path, "--pin", "shared")
    assert code == 0
    for part in ("model 'base': LlamaForCausalLM", "float32", "adapters: 6 registered", "4 of rank 4", "1 pinned",
                 "tenants: 4 (ann, bob, noone, plain)", "hf-cb", "'auto': topic", "feedback", "ready in"):  # fmt: skip
        assert part in text, (part, text)
    assert not any(key in text for key in ENVIRONMENT.values())


def test_one_damaged_adapter_is_left_out_and_named(world, tmp_path, capsys):
    import shutil

    shutil.copytree(world / "hub", tmp_path / "hub")
    weights = next((tmp_path / "hub" / "shared").rglob("*.safetensors"))
    weights.write_bytes(b"nothing")
    flags = ["--model", world / "base", "--hub", tmp_path / "hub", "--slot", "4=4", "--kv-memory", "2MiB"]
    code, text = check(capsys, *flags)
    assert code == 0 and "adapters: 5 registered" in text and "left out: 'shared'" in text
    code, text = check(capsys, *flags, "--adapter", "shared")  # asked for by name, so it must be there
    assert code == 2 and "shared" in text


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--model", "{world}/nothing"], "nothing"),
        (["--model", "{world}/hub"], "hub"),
        (["--model", "{world}/base", "--hub", "{world}/nothing"], "nothing"),
        (["--model", "{world}/base", "--hub", "{world}/hub", "--adapter", "none", "--adapter", "nil"], "nil"),
        (["--model", "{world}/base", "--hub", "{world}/hub", "--slot", "4=4", "--pin", "none"], "none"),
        (["--model", "{world}/base", "--tenants", "{world}/nothing.yaml"], "nothing.yaml"),
        (["--model", "{world}/base", "--tenants", "{world}/tenants.yaml"], "KEY_ANN"),
        (["--model", "{world}/base", "--slot", "eight"], "RANK=COUNT"),
        (["--model", "{world}/base", "--kv-memory", "8"], "kv"),
        (["--config", "{world}/tenants.yaml"], "admin_keys"),
        (["--hub", "{world}/hub"], "model is missing"),
        (["--model", "{world}/base", "--feedback", "{world}/tenants.yaml"], "feedback"),
        (["--model", "{world}/base", "--config", "{here}/selector.yaml"], "nonsense"),
    ],
    ids=range(13),
)
def test_what_cannot_be_served_is_told_in_one_message(world, tmp_path, capsys, flags, part):
    (tmp_path / "selector.yaml").write_text("selectors: {topic: {method: nonsense}}\nhub: %s\n" % (world / "hub"))
    code, text = check(capsys, *[flag.format(world=world, here=tmp_path) for flag in flags])
    last = text.strip().splitlines()[-1]
    assert code == 2, text
    assert last.startswith("molora: ") and part in last and "Traceback" not in text


def test_a_port_that_is_taken_is_told_before_the_model_is_read(world, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = main(["serve", "--model", str(world / "nothing"), "--port", str(port)])
    text = capsys.readouterr().err
    assert code == 2 and f"cannot listen on 127.0.0.1:{port}" in text and "--port" in text


def test_help_needs_nothing_else(capsys):
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--model", "--tenants", "--check", "--kv-memory", "--feedback"):
        assert part in text
