"""What the options of `molora serve` and of `molora route` have in common: each mistake is told by both alike."""

import pytest
import yaml

from molora.errors import ConfigError
from molora.serve.options import ServeOptions
from molora.serve.proxy.options import RouteOptions

BOTH = [(ServeOptions, {"model": "m"}), (RouteOptions, {"upstream": "http://host:1", "base": "m"})]
WRONG = [
    ("max_body", 0, "max_body must be above 0, got 0"),
    ("max_body", 1.5, "max_body must be bytes or a size such as 2GiB, got 1.5"),
    ("max_body", "many", "max_body must be bytes or a size such as 2GiB, got 'many'"),
    ("port", -1, "port must be a whole number from 0, got -1"),
    ("port", 65536, "port must be at most 65535, got 65536"),
    ("timeout", float("nan"), "timeout must be seconds above 0, got nan"),
    ("drain", float("inf"), "drain must be seconds above 0, got inf"),
    ("docs", "no", "docs must be true or false, got 'no'"),
    ("open_metrics", 1, "open_metrics must be true or false, got 1"),
    ("log_level", "loud", "log_level must be one of debug, info, warning, error, got 'loud'"),
    ("log_level", ["info"], "log_level must be one of debug, info, warning, error, got ['info']"),
    ("host", None, "host must be a text, got None"),
    ("host", "", "host must be a text, got ''"),
    ("tenants", 3, "tenants must be a text, got 3"),
    ("database", "", "database must be a text, got ''"),
    ("feedback", 3, "feedback must be a folder, true, or options, got 3"),
    ("feedback", {"foldr": "f"}, "feedback has no option 'foldr'; it has folder, policy, frozen"),
]


@pytest.mark.parametrize(("kind", "right"), BOTH, ids=["serve", "route"])
@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{name}={value}" for name, value, _ in WRONG])
def test_both_refuse_the_same_values(kind, right, name, value, message):
    kind(**right)
    with pytest.raises(ConfigError) as caught:
        kind(**right, **{name: value})
    assert message in str(caught.value)


def test_a_server_shares_prefixes_only_when_told_so_by_a_truth_value():
    with pytest.raises(ConfigError, match="share_prefixes must be true or false, got 'no'"):
        ServeOptions("m", share_prefixes="no")


@pytest.mark.parametrize(("kind", "right"), BOTH, ids=["serve", "route"])
def test_mistakes_of_the_file_and_of_its_values_are_told_together(kind, right, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump({**right, "prot": 1, "timeout": 0}))
    with pytest.raises(ConfigError) as caught:
        kind.read(path, drain=-1.0)
    assert all(part in str(caught.value) for part in ("did you mean 'port'", "timeout must be", "drain must be"))


@pytest.mark.parametrize(("kind", "right"), BOTH, ids=["serve", "route"])
def test_paths_in_a_file_are_relative_to_it(kind, right, tmp_path):
    path = tmp_path / "options.yaml"
    for told, found in (
        ("./log", str(tmp_path / "log")),
        ({"folder": "../log"}, {"folder": str(tmp_path.parent / "log")}),
    ):
        path.write_text(yaml.safe_dump({**right, "tenants": "./t.yaml", "feedback": told}))
        options = kind.read(path, database="./t.db")
        assert (options.tenants, options.feedback) == (str(tmp_path / "t.yaml"), found)
        assert options.database == "./t.db"  # flags are relative to where one stands


@pytest.mark.parametrize(("kind", "right"), BOTH, ids=["serve", "route"])
def test_sizes_become_bytes(kind, right):
    found = [kind(**right, max_body=size).max_body for size in ("2KiB", "1KB", "77", 78)]
    assert found == [2048, 1000, 77, 78]
