"""The options and flags of `molora route`, and what it reports when it starts."""

import argparse
import dataclasses

import pytest
import yaml

from molora import cli
from molora.errors import ConfigError
from molora.serve.proxy.command import read_route_options, start_route
from molora.serve.proxy.options import RouteOptions
from tests.serve.routed import SECRET, make_selector

URL = "http://127.0.0.1:8000"
# a flag that goes away or changes its meaning breaks scripts
FLAGS = (
    "--base --ca --check --config --connections --database --debug --drain --feedback --host --key-variable "
    "--log-level --name --pattern --port --retries --selector --tenants --timeout --upstream"
)


def options_of(*argv):
    return read_route_options(cli.build_parser().parse_args(["route", *argv]))


def test_the_flags_are_frozen():
    commands = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser = commands.choices["route"]
    parser.fill()
    found = {s for action in parser._actions if action.dest != "help" for s in action.option_strings}
    assert found == set(FLAGS.split())


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "route.yaml"
    file.write_text(yaml.safe_dump({"upstream": URL, "selector": "./sel", "port": 1, "timeout": 7, "base": ["a", "b"]}))
    found = options_of("--config", str(file), "--port", "2", "--name", "x=y", "--name", "z=w=v", "--base", "c")
    assert dataclasses.replace(RouteOptions(URL), timeout=7, port=2) == dataclasses.replace(
        found, selector=None, names={}, base=None
    )
    assert found.selector == str(tmp_path / "sel")  # relative to the file
    assert found.names == {"x": "y", "z": "w=v"}
    assert found.bases == ("c",)


@pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/v1", f"{URL}/v1/", f"{URL}//"])
def test_an_url_may_end_as_it_likes(url):
    assert RouteOptions(url).upstream == URL
    assert RouteOptions(f"https://host/some/v1x{url[len(URL) :]}").upstream == "https://host/some/v1x"


BAD = [
    ({}, "upstream is missing"),
    ({"upstream": "127.0.0.1:8000"}, "upstream must be http://"),
    ({"upstream": "file:///etc/passwd"}, "upstream must be http://"),
    ({"upstream": "http://host:port"}, "upstream is no URL"),
    ({"upstream": f"{URL}/?key=1"}, "must hold no '?'"),
    ({"upstream": URL, "tenants": "t.yaml"}, "base is missing"),
    ({"upstream": URL, "base": [5]}, "base must be a name"),
    ({"upstream": URL, "pattern": "{tenant}"}, "pattern must hold {adapter} once"),
    ({"upstream": URL, "names": {"a": "x", "b": "x"}}, "the same upstream name"),
    ({"upstream": URL, "names": {"a": 5}}, "names must map"),
    ({"upstream": URL, "timeout": 0}, "timeout must be seconds above 0"),
    ({"upstream": URL, "retries": -1}, "retries must be a whole number from 0"),
    ({"upstream": URL, "max_body": "many"}, "max_body must be bytes"),
    ({"upstream": URL, "port": True}, "port must be a whole number"),
]


@pytest.mark.parametrize(("told", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_told(told, message):
    with pytest.raises(ConfigError) as caught:
        RouteOptions(**told)
    assert message in str(caught.value)


def test_no_secret_is_quoted():
    for told in ({"upstream": f"http://user:{SECRET}@host"}, {"upstream": URL, "key_variable": SECRET}):
        with pytest.raises(ConfigError) as caught:
            RouteOptions(**told)
        assert SECRET not in str(caught.value)


def test_unknown_keys_are_told(tmp_path):
    (tmp_path / "r.yaml").write_text("upstreem: x\n")
    with pytest.raises(ConfigError, match="did you mean 'upstream'"):
        options_of("--config", str(tmp_path / "r.yaml"))


def test_the_report_says_what_was_started(tmp_path, capsys):
    folder = make_selector(tmp_path / "selector")
    proxy, lines = start_route(RouteOptions(URL, selector=str(folder)), {"MOLORA_UPSTREAM_KEY": f" {SECRET}\n"})
    assert any("5 adapters (ann-law, ann-news, bob-plans" in line for line in lines)
    assert f"upstream {URL}, with a key" in lines[0]
    assert SECRET not in "".join(lines) + repr(proxy.upstream)
    with pytest.raises(ConfigError, match="no header can"):
        start_route(RouteOptions(URL), {"MOLORA_UPSTREAM_KEY": "a\nb"})


def test_check_starts_and_stops(tmp_path, capsys):
    folder = make_selector(tmp_path / "selector")
    assert cli.main(["route", "--upstream", URL, "--selector", str(folder), "--check"]) == 0
    assert "selector: 5 adapters" in capsys.readouterr().err


def test_a_selector_that_reads_a_model_is_refused(tmp_path, monkeypatch):
    from molora.serve.proxy import command as proxy_command

    monkeypatch.setattr(proxy_command, "wants_model", lambda folder: True)
    with pytest.raises(ConfigError, match="--embedder sentence"):
        start_route(RouteOptions(URL, selector=str(tmp_path)), {})


def test_sizes_are_read_as_the_server_reads_them():
    told = {"upstream": "http://127.0.0.1:1", "max_body": "2097152"}  # bytes, as a flag gives them
    assert RouteOptions(**told).max_body == 2 << 20 == RouteOptions(**told | {"max_body": "2MiB"}).max_body
