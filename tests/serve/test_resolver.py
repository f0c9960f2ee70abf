"""The plugin of vLLM: what it finds in a library, what it refuses, and that changed content has another path and id.

vLLM is not a requirement of the tests: STAND_IN has the signatures of vllm/lora/request.py and vllm/lora/resolver.py of
vLLM 0.32.0, written from their source.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

import molora
from molora.errors import ConfigError, LoadError
from molora.serve import resolver
from molora.serve.hub_resolver import HubResolver
from tests import tiny
from tests.adapters import CONFIG, WEIGHTS
from tests.hub.loras import lora
from tests.serve.loras import make_mixture

BASE = "tiny/llama"  # as in the configs of tests.hub.loras
STAND_IN = """
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

@dataclass(eq=False)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self):
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"

class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...

@dataclass
class _LoRAResolverRegistry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]

LoRAResolverRegistry = _LoRAResolverRegistry()
"""


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM; returns its module of resolvers."""
    whole = types.ModuleType("vllm.lora.resolver")
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", whole)
    exec(STAND_IN, whole.__dict__)
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = whole.LoRARequest
    for name, module in (("vllm", types.ModuleType("vllm")), ("vllm.lora", types.ModuleType("vllm.lora")),
                         ("vllm.lora.request", request)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return whole


@pytest.fixture
def hub(tmp_path):
    found = molora.Hub(tmp_path / "hub")
    found.add(lora(tmp_path / "news", seed=1), "news", base=BASE)
    found.add(lora(tmp_path / "law", seed=2), "law", base=BASE)
    return found


@pytest.fixture
def finder(hub, tmp_path):
    return HubResolver(hub.root, tmp_path / "cache")


def refused(caplog, finder, name, base=BASE):
    """Why an adapter is not served."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert finder.find(base, name) is None
    return caplog.text


def test_what_is_found_is_a_checked_copy(finder, hub, tmp_path):
    found = finder.find(BASE, "news")
    entry = hub.get("news")
    assert found.path == tmp_path / "cache" / entry.digest
    assert {path.name for path in found.path.iterdir()} == {CONFIG, WEIGHTS}
    for name in (CONFIG, WEIGHTS):
        assert (found.path / name).read_bytes() == (entry.folder / name).read_bytes()
        assert os.stat(found.path / name).st_ino != os.stat(entry.folder / name).st_ino
    assert found.id == int(entry.digest[:15], 16) + 1
    assert finder.find(BASE, "news@1") == type(found)("news@1", found.id, found.path, found.digest)


def test_changed_content_has_another_path_and_id(finder, hub, tmp_path):
    old = finder.find(BASE, "news")
    hub.add(lora(tmp_path / "changed", seed=3), "news", base=BASE)
    new = finder.find(BASE, "news")
    assert new.path != old.path
    assert new.id != old.id
    assert finder.find(BASE, "news@1").path == old.path
    assert (old.path / WEIGHTS).is_file()  # running requests may still read it


def test_equal_content_is_kept_once(finder, hub, tmp_path):
    hub.add(lora(tmp_path / "again", seed=1), "copy", base=BASE)
    assert finder.find(BASE, "copy").path == finder.find(BASE, "news").path


def test_a_damaged_copy_is_made_anew(finder, hub):
    found = finder.find(BASE, "news")
    (found.path / WEIGHTS).chmod(0o644)
    (found.path / WEIGHTS).write_bytes(b"other")
    again = finder.find(BASE, "news")
    assert again == found
    assert (again.path / WEIGHTS).read_bytes() == (hub.get("news").folder / WEIGHTS).read_bytes()
    assert [path.name for path in found.path.parent.iterdir()] == [found.digest]


def test_a_cache_that_others_may_write_to_is_refused(finder, caplog):
    finder.cache.mkdir(mode=0o700)
    finder.cache.chmod(0o777)
    assert "others may write" in refused(caplog, finder, "news")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../hub/news", "news/1", "/etc", "news/../law", "a/b/news", "..\\news", "news@0", "news@9", "News",
     "nothing", ".index.sqlite", "news\x00", "x" * 5000, "acme/../news", "../news", "acme/", "/news"],
)  # fmt: skip
def test_no_name_leads_anywhere_else(name, finder, hub, tmp_path):
    assert finder.find(BASE, name) is None
    wide = HubResolver(hub.root, tmp_path / "cache", allow=("*",))
    assert wide.find(BASE, name) is None


def test_links_are_not_followed(hub, finder, caplog, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(hub.get("law").folder.parent, outside)
    (hub.root / "linked").symlink_to(outside)
    (hub.root / "inner").mkdir()
    (hub.root / "inner" / "1").symlink_to(hub.get("law").folder)
    version = hub.root / "files" / "1"
    shutil.copytree(hub.get("law").folder, version)
    (version / WEIGHTS).unlink()
    (version / WEIGHTS).symlink_to(hub.get("law").folder / WEIGHTS)
    for name in ("linked", "inner", "files"):
        assert refused(caplog, finder, name), name
    assert finder.find(BASE, "law") is not None


def test_a_folder_that_becomes_a_link_is_refused(hub, finder):
    """Libraries pass links over; this holds for one that takes a folder's place afterwards."""
    (hub.root / "linked").symlink_to(hub.root / "law")
    finder._check_place(hub.root / "law" / "1")
    with pytest.raises(LoadError, match="leads out of the library"):
        finder._check_place(hub.root / "linked" / "1")


def test_a_byte_that_differs_is_refused(hub, finder, caplog):
    path = hub.get("news").folder / WEIGHTS
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert "sha256 differs" in refused(caplog, finder, "news")
    assert refused(caplog, finder, "news") == ""  # remembered: not read again at every request
    assert finder.find(BASE, "law") is not None


def test_a_header_of_lies_is_refused(hub, finder, caplog, tmp_path):
    folder = hub.get("news").folder
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert "news" in refused(caplog, finder, "news")


def test_a_mixture_is_refused_with_the_reason_and_exports_work(hub, finder, caplog, tmp_path):
    base = tiny.tiny_llama()
    model, folder = make_mixture(base, tmp_path / "mixture", ["q_proj", "down_proj"])
    hub.add(folder, "mix")
    assert "router decides for every token" in refused(caplog, finder, "mix", str(tmp_path / "base"))
    molora.export_peft(model, tmp_path / "blend", gates=[0.6, 0.4] + [0.0] * (experts_of(folder) - 2))
    hub.add(tmp_path / "blend", "blend", base=BASE)
    assert finder.find(BASE, "blend") is not None


def experts_of(folder):
    return json.loads((folder / CONFIG).read_text())["experts"]["num"]


# --- which base -------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_name(finder, hub, caplog, tmp_path):
    assert "is for tiny/llama, the server runs 'other/model'" in refused(caplog, finder, "news", "other/model")
    assert HubResolver(hub.root, tmp_path / "cache", bases=(BASE,)).find("other/model", "news") is not None


def test_a_base_in_a_folder_is_known_by_its_weights(hub, finder, caplog, tmp_path):
    base = tiny.tiny_llama()
    for seed in (0, 1):
        tiny.save_tiny(tiny.tiny_llama(seed=seed), None, tmp_path / f"base{seed}")
    hub.add(lora(tmp_path / "marked", seed=4), "marked", base=BASE, base_model=base)
    assert finder.find(str(tmp_path / "base0"), "marked") is not None  # whatever it is called
    assert "has other values" in refused(caplog, finder, "marked", str(tmp_path / "base1"))
    trusting = HubResolver(hub.root, tmp_path / "cache", bases=(BASE,))
    assert "has other values" in refused(caplog, trusting, "marked", str(tmp_path / "base1"))


# --- who --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "served", "not_served"),
    [
        (None, ["news", "law", "news@1"], ["acme/news"]),
        (("acme/news",), ["acme/news", "acme/news@1"], ["news", "law", "acme/law", "beta/news"]),
        (("acme/*", "law"), ["acme/news", "acme/law", "law"], ["news", "beta/law", "acmes/law"]),
        (("acme/news@2",), [], ["acme/news", "acme/news@1"]),
        ((), [], ["news", "acme/news"]),
    ],
)
def test_the_list_of_what_is_served(allow, served, not_served, hub, tmp_path):
    finder = HubResolver(hub.root, tmp_path / "cache", allow=allow)
    assert [name for name in served + not_served if finder.find(BASE, name)] == served


def test_an_alias_gives_no_right(hub, tmp_path):
    hub.alias("open", "law")
    assert HubResolver(hub.root, tmp_path / "cache", allow=("open", "news")).find(BASE, "open") is None
    assert HubResolver(hub.root, tmp_path / "cache", allow=("law",)).find(BASE, "open") is not None


def test_tenants_have_their_own_cache_of_keys_and_values(hub, tmp_path):
    """vLLM's goes by name and path, so names of tenants must differ where the path is the same."""
    finder = HubResolver(hub.root, tmp_path / "cache", allow=("a/news", "b/news"))
    one, two = finder.find(BASE, "a/news"), finder.find(BASE, "b/news")
    assert one.path == two.path
    assert one.name != two.name


# --- vLLM -------------------------------------------------------------------------------------------------------------


def registered(monkeypatch, vllm, **environ):
    for name in (resolver.HUB, resolver.ALLOW, resolver.BASE, resolver.CACHE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    resolver.register()
    return vllm.LoRAResolverRegistry.resolvers


def test_vllm_gets_a_request(monkeypatch, vllm, hub, tmp_path):
    found = registered(
        monkeypatch, vllm, MOLORA_HUB=hub.root, MOLORA_VLLM_CACHE=tmp_path / "c", MOLORA_ALLOW="a/*, law"
    )
    assert list(found) == ["molora"]
    assert isinstance(found["molora"], vllm.LoRAResolver)
    request = asyncio.run(found["molora"].resolve_lora(BASE, "a/news"))
    assert isinstance(request, vllm.LoRARequest)
    assert request.lora_name == "a/news"
    assert 1 <= request.lora_int_id <= 2**60
    assert request.lora_path == str(tmp_path / "c" / hub.get("news").digest)
    assert asyncio.run(found["molora"].resolve_lora(BASE, "news")) is None
    resolver.register()  # vLLM may call it again
    assert list(vllm.LoRAResolverRegistry.resolvers) == ["molora"]


def test_without_a_library_nothing_happens(monkeypatch, vllm):
    assert registered(monkeypatch, vllm) == {}


def test_a_library_that_is_none_is_told(monkeypatch, vllm, tmp_path):
    with pytest.raises(ConfigError, match="there is no library"):
        registered(monkeypatch, vllm, MOLORA_HUB=tmp_path / "gone")
    with pytest.raises(ConfigError, match="must be a folder"):
        registered(monkeypatch, vllm, MOLORA_HUB="hf://owner/library")
    with pytest.raises(ConfigError, match="neither a name"):
        registered(monkeypatch, vllm, MOLORA_HUB=tmp_path, MOLORA_ALLOW="a*b*")


def test_another_interface_is_told(monkeypatch, vllm, hub):
    async def resolve_lora(self, base_model_name, lora_name, revision):
        return None

    monkeypatch.setattr(vllm.LoRAResolver, "resolve_lora", resolve_lora)
    with pytest.raises(ConfigError, match="others than molora knows"):
        registered(monkeypatch, vllm, MOLORA_HUB=hub.root)


def test_without_vllm_it_says_so(monkeypatch, hub):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv(resolver.HUB, str(hub.root))
    with pytest.raises(ConfigError, match="no LoRA resolvers"):
        resolver.register()


def test_the_entry_point_is_there():
    text = (Path(molora.__file__).parents[1] / "pyproject.toml").read_text()
    (section,) = re.findall(r'^\[project\.entry-points\."vllm\.general_plugins"\]\n(.*?)\n\n', text, re.M | re.S)
    assert section == f'molora = "{resolver.__name__}:{resolver.register.__name__}"'
