"""`molora tenants` and tenants.yaml."""

import json
import re
import threading

import pytest

from molora import cli
from molora.errors import ConfigError
from molora.serve.tenants.file import apply, read_tenants
from molora.serve.tenants.store import Tenants
from molora.serve.tenants.tenant import Limits, Tenant
from tests.serve.databases import opened

KEY = "0123456789abcdefghijklmnopqrstuvwxyz-A"
FILE = """
tenants:
  news:
    weight: 2
    models: [headlines, "news-*"]
    base: false
    manage: true
    limits: {requests_per_minute: 60, concurrent: 4}
    keys: [NEWS_KEY]
  free:
admin_keys: [OPS_KEY]
"""
ENV = {"NEWS_KEY": KEY + "news", "OPS_KEY": KEY + "ops"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `molora tenants ...` on a database in a new folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLORA_TENANTS", raising=False)

    def call(*argv):
        code = cli.main(["tenants", *argv])
        return code, *capsys.readouterr()

    return call


def test_add_list_rotate_revoke_usage(run, tmp_path):
    code, out, err = run(
        "add", "news", "--model", "headlines", "--model", "news-*", "--weight", "2", "--concurrent", "3"
    )
    assert (code, err) == (0, "") and (tmp_path / "tenants.db").is_file()
    key = out.strip().splitlines()[-1]
    with Tenants(str(tmp_path / "tenants.db")) as tenants:
        news = tenants.authenticate(key)
        assert news == Tenant("news", 2.0, frozenset({"headlines", "news-*"}), limits=Limits(concurrent=3))
        tenants.admit(news, 5, 5).settle(5, 2, "digest")
    code, out, _ = run("list")
    assert code == 0 and re.search(r"news +2 +headlines news-\* +yes +no +- +- +- +3 +1", out)
    assert key not in out and key[-43:] not in out
    code, out, _ = run("rotate", "news")
    new = out.strip().splitlines()[-1]
    code, out, _ = run("usage", "news", "--json")
    assert [(row["program"], row["input_tokens"], row["output_tokens"]) for row in json.loads(out)] == [
        ("digest", 5, 2)
    ]
    assert "digest" in run("usage")[1] and "digest" not in run("usage", "--since", "2999-01-01")[1]
    with Tenants(str(tmp_path / "tenants.db")) as tenants:
        assert tenants.authenticate(key) is None and tenants.authenticate(new) == news
        ours = [one.id for one in tenants.keys("news") if one.revoked is None]
    assert run("revoke", "news") == (0, f"revoked: {ours[0]}\n", "")
    assert run("revoke", ours[0]) == (0, f"'{ours[0]}' had no key that was good\n", "")
    with Tenants(str(tmp_path / "tenants.db")) as tenants:
        assert tenants.authenticate(new) is None


def test_add_changes_only_what_is_given(run, tmp_path):
    run("add", "news", "--model", "a", "--concurrent", "3", "--no-base")
    run("add", "news", "--weight", "3", "--manage")
    run("add", "news", "--concurrent", "0", "--tokens-per-day", "9", "--no-key")
    with Tenants(str(tmp_path / "tenants.db")) as tenants:
        assert tenants.get("news") == Tenant("news", 3.0, frozenset("a"), False, True, Limits(tokens_per_day=9))
        assert len(tenants.keys("news")) == 2


def test_admin_keys_and_json(run, tmp_path):
    code, out, _ = run("add", "ops", "--admin", "--expires-days", "1", "--json")
    key = json.loads(out)
    with Tenants(str(tmp_path / "tenants.db")) as tenants:
        assert code == 0 and key["tenant"] is None and tenants.is_admin(key["key"]) and tenants.all() == []
    listed = json.loads(run("list", "--json")[1])
    assert [one["id"] for one in listed["admin_keys"]] == [key["id"]] and "hash" not in json.dumps(listed)
    assert listed["admin_keys"][0]["state"].startswith("expires ")
    assert json.loads(run("revoke", key["id"], "--json")[1]) == {"revoked": [key["id"]]}
    assert "(admin)" in run("list")[1]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["add", "a b"], "a name is letters"),
        (["add", "a", "--weight", "0", "--model", "**"], "2 problems"),
        (["add", "a", "--concurrent", "-1"], "whole number from 1"),
        (["add", "a", "--admin", "--weight", "2"], "--expires-days alone"),
        (["add", "a", "--expires-days", "0"], "above 0"),
        (["revoke", "nobody"], "neither the id of a key nor a tenant"),
        (["rotate", "nobody"], "neither the id of a key nor a tenant"),
        (["usage", "nobody"], "tenant 'nobody' is unknown"),
        (["usage", "--since", "yesterday"], "a day such as"),
        (["list", "--db", "nowhere/t.db"], "there is no folder"),
        (["apply", "none.yaml"], "cannot be read"),
        (["add"], "NAME"),
    ],
)
def test_mistakes_are_said_in_one_line(run, argv, why):
    code, out, err = run(*argv)
    assert code == 2 and why in err and out == "" and err.count("\n") == 1


@pytest.mark.parametrize("command", ["add", "list", "rotate", "revoke", "usage", "apply"])
def test_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "example:" in out and "--db" in out and "--json" in out


def test_a_file_is_applied(run, tmp_path, monkeypatch):
    (tmp_path / "tenants.yaml").write_text(FILE)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    assert run("apply", "tenants.yaml") == (0, "2 tenants of tenants.yaml are in the database\n", "")
    limits = Limits(requests_per_minute=60, concurrent=4)
    news = Tenant("news", 2.0, frozenset({"headlines", "news-*"}), False, True, limits)
    with Tenants(str(tmp_path / "tenants.db")) as tenants:
        assert tenants.all() == [Tenant("free"), news]
        assert tenants.authenticate(ENV["NEWS_KEY"]) == news and tenants.is_admin(ENV["OPS_KEY"])
    assert json.loads(run("apply", "tenants.yaml", "--json")[1]) == {"tenants": ["news", "free"], "notes": []}
    assert run("list")[1].count("env:NEWS_KEY") == 1  # the same again changes nothing


def test_a_changed_file_takes_away_what_it_no_longer_gives(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(FILE)
    with opened() as tenants:
        tenants.put(Tenant("by-hand"))
        apply(read_tenants(path, ENV), tenants)
        made = tenants.add_key("news")
        kept = tenants.add_key("by-hand")
        changed = ENV | {"NEWS_KEY": KEY + "changed"}
        notes = apply(read_tenants(path, changed), tenants)
        assert len(notes) == 1 and "revoked" in notes[0]
        assert tenants.authenticate(ENV["NEWS_KEY"]) is None and tenants.authenticate(changed["NEWS_KEY"])
        assert tenants.authenticate(made.secret)  # a key of the command goes on
        path.write_text("tenants: {free: {}}")
        notes = apply(read_tenants(path, {}), tenants)
        assert "tenant 'news' is no longer in the file and is turned off" in notes
        for key in (made.secret, changed["NEWS_KEY"]):
            assert tenants.authenticate(key) is None
        assert not tenants.is_admin(ENV["OPS_KEY"])
        assert tenants.authenticate(kept.secret) == Tenant("by-hand")
        assert [one.name for one in tenants.all()] == ["by-hand", "free"]
        path.write_text(FILE)
        apply(read_tenants(path, changed), tenants)
        assert tenants.authenticate(made.secret).name == "news"  # it is back


def test_a_command_does_not_take_a_tenant_from_its_file(tmp_path):
    (tmp_path / "t.yaml").write_text(FILE)
    with opened() as tenants:
        apply(read_tenants(tmp_path / "t.yaml", ENV), tenants)
        tenants.put(Tenant("news", limits=Limits(concurrent=1)))
        key = tenants.add_key("news").secret
        assert tenants.authenticate(key).limits == Limits(concurrent=1)
        (tmp_path / "t.yaml").write_text("tenants: {}")
        apply(read_tenants(tmp_path / "t.yaml", {}), tenants)
        assert tenants.authenticate(key) is None
        tenants.put(Tenant("news"))  # made anew, it is the command's
        apply(read_tenants(tmp_path / "t.yaml", {}), tenants)
        assert tenants.authenticate(key) == Tenant("news")


def test_a_key_that_was_revoked_by_hand_stays_revoked(tmp_path):
    (tmp_path / "t.yaml").write_text(FILE)
    with opened() as tenants:
        found = read_tenants(tmp_path / "t.yaml", ENV)
        apply(found, tenants)
        tenants.revoke("news")
        assert apply(found, tenants) == ["the key in variable NEWS_KEY was revoked and stays so; put a new one there"]
        assert tenants.authenticate(ENV["NEWS_KEY"]) is None


def test_servers_that_start_together_apply_the_same_file(tmp_path, database_url):
    (tmp_path / "t.yaml").write_text(FILE)
    found, errors, start = read_tenants(tmp_path / "t.yaml", ENV), [], threading.Barrier(5)

    def work():
        with Tenants(database_url) as tenants:
            start.wait(10)
            try:
                apply(found, tenants)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    with Tenants(database_url) as tenants:
        assert [one.name for one in tenants.all()] == ["free", "news"] and len(tenants.keys("news")) == 1


def test_a_key_of_another_tenant_is_refused_and_nothing_changes(tmp_path):
    (tmp_path / "t.yaml").write_text(FILE)
    with opened() as tenants:
        other = tenants.put(Tenant("other")) or tenants.add_key("other")
        with pytest.raises(ConfigError, match="NEWS_KEY belongs to another tenant") as caught:
            apply(read_tenants(tmp_path / "t.yaml", ENV | {"NEWS_KEY": other.secret}), tenants)
        assert other.secret not in str(caught.value)
        assert [one.name for one in tenants.all()] == ["other"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tenants: {a: {weigth: 2}}", "has no 'weigth'; did you mean 'weight'"),
        ("tenant: {}", "the file has no 'tenant'; did you mean 'tenants'"),
        ("tenants: [a]", "'tenants' must map names"),
        ("tenants: {a: {models: x}}", "must be a list, got str"),
        ("tenants: {a: {models: [[x]]}}", "neither a name"),
        ("tenants: {a: {limits: {rpm: 3}}}", "limits of tenant 'a' has no 'rpm'"),
        ("tenants: {a: {limits: 3}}", "must be a mapping, got int"),
        ("tenants: {a: {limits: {concurrent: many}}}", "whole number from 1"),
        ("tenants: {a b: {}}", "a name is letters"),
        ("tenants: {a: {keys: [NOT_SET]}}", "variable NOT_SET is not set"),
        ("tenants: {a: {keys: [SHORT]}}", "could be guessed"),
        ("tenants: {a: {keys: KEY}}", "must be a list of names of variables"),
        ("tenants: {a: {keys: [NEWS_KEY]}, b: {keys: [NEWS_KEY]}}", "belongs to another tenant or admin too"),
        ("tenants: {a: {keys: [NEWS_KEY]}}\nadmin_keys: [NEWS_KEY]", "belongs to another tenant or admin too"),
        ("tenants: {a: {}, a: {}}", "twice"),
        ("- a", "must be a mapping, got list"),
        ("{", "not readable YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, why):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_tenants(tmp_path / "t.yaml", ENV | {"SHORT": "short-secret"})
    assert why in str(caught.value) and "short-secret" not in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize("key", [KEY, "mlr_0123456789abcdef_" + "x" * 43, "abcdefghijklmnopqrstuvwxyz0123456789ABCD"])
def test_a_key_written_into_the_file_by_mistake_is_not_quoted(tmp_path, key):
    (tmp_path / "t.yaml").write_text(f"tenants: {{a: {{keys: ['{key}']}}}}")
    with pytest.raises(ConfigError) as caught:
        read_tenants(tmp_path / "t.yaml", {})
    assert key not in str(caught.value) and "tenant 'a'" in str(caught.value)


def test_several_mistakes_are_told_together(tmp_path):
    (tmp_path / "t.yaml").write_text("tenants: {a: {weight: 0, x: 1, keys: [NOT_SET]}, b c: {}}")
    with pytest.raises(ConfigError, match="4 problems"):
        read_tenants(tmp_path / "t.yaml", {})
