"""Bad input: each ends in one error that names the thing, the value and the next step, and nothing else happens."""

import json
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import molora
from molora import ConfigError, LoadError, MoloraConfig
from molora.files import MAX_HEADER, look, read_header
from tests.adapters import CONFIG, RECIPE, WEIGHTS, anatomy, change_config, change_tensors, wrapped
from tests.tiny import tiny_llama

# --- recipes and configs ----------------------------------------------------------------------------------------------

RECIPES = {
    "recipe": (
        "dynmol",
        {},
        r"recipe 'dynmol' is unknown; did you mean 'dynmole'\? known: .*milora.*; or give a .yaml",
    ),
    "recipe file": ("no/such.yaml", {}, r"recipe 'no/such.yaml' is unknown"),
    "key": (RECIPE, {"selectr": "top_k"}, r"'selectr'; did you mean 'selector'\?"),
    "key in a recipe": (RECIPE | {"expert": {}}, {}, r"key 'expert'; did you mean 'experts'\?"),
    "key of experts": (RECIPE, {"experts": {"numb": 2}}, r"experts has no key 'numb'; did you mean 'num'\?"),
    "selector": (RECIPE, {"selector": "topk"}, r"selector 'topk' is unknown; did you mean 'top_k'\? known: .*top_p"),
    "scorer": (RECIPE, {"scorer": "linaer"}, r"scorer 'linaer' is unknown; did you mean 'linear'\?"),
    "link": (RECIPE, {"link": "softmx"}, r"link 'softmx' is unknown; did you mean 'softmax'\?"),
    "pool": (RECIPE, {"pool": "men"}, r"pool 'men' is unknown; did you mean 'mean'\?"),
    "price": (RECIPE, {"price": "sing"}, r"price 'sing' is unknown; did you mean 'sign'\?"),
    "loss": (RECIPE, {"losses": [{"name": "switch_balanc", "weight": 1}]}, r"did you mean 'switch_balance'\?"),
    "option": (RECIPE, {"selector": {"kk": 1}}, r"selector 'top_k' has no option 'kk'; did you mean 'k'\?"),
    "form": (RECIPE, {"experts": {"form": "ranks"}}, r"experts.form 'ranks' is unknown; did you mean 'rank'\?"),
    "granularity": (RECIPE, {"granularity": "tokn"}, r"granularity 'tokn' is unknown; did you mean 'token'\?"),
    "share": (RECIPE, {"share": "blocks"}, r"share 'blocks' is unknown; did you mean 'block'\?"),
    "k > E": (RECIPE, {"selector": {"k": 4}}, r"1 <= k <= number of experts, got k=4 with 3"),
    "k < 1": (RECIPE, {"selector": {"k": 0}}, r"got k=0 with 3"),
    "no target": (RECIPE, {"target_modules": ["q_prj"]}, r"q_prj"),
    "not linear": (
        RECIPE,
        {"target_modules": ["norm"]},
        r"nothing was wrapped: .*LlamaRMSNorm is not a linear layer",
    ),
    "rank": (RECIPE, {"experts": {"rank": 0}}, r"experts.rank must be a whole number >= 1, .*got 0"),
    "ranks": (RECIPE, {"experts": {"rank": [1, 2], "scaling": 1.0}}, r"experts.rank lists 2 ranks for 3 experts"),
    "frozen": (RECIPE, {"experts": {"frozen": [3]}}, r"experts.frozen names \[3\], but there are experts 0 to 2"),
    "names": (RECIPE, {"experts": {"names": ["a", "b"]}}, r"experts.names holds 2 names for 3 experts"),
    "same names": (RECIPE, {"experts": {"names": ["a", "b", "a"]}}, r"experts.names must be a list of different names"),
}


@pytest.mark.parametrize("recipe, changes, message", RECIPES.values(), ids=RECIPES)
def test_wrap_says_what_is_wrong_and_leaves_the_model_alone(recipe, changes, message):
    base = tiny_llama()
    before = anatomy(base)
    # what PEFT itself finds out (no module matches) is a ValueError, as ours are
    with pytest.raises(ValueError, match=message):
        molora.wrap(base, recipe, **changes)
    assert anatomy(base) == before


def test_all_problems_of_a_config_come_at_once():
    with pytest.raises(ConfigError) as caught:
        MoloraConfig(scorer="linaer", selector={"name": "top_k", "q": 1}, share="all", experts={"num": 0, "size": 1})
    for part in ("5 problems", "'linaer'", "'q'", "share 'all'", "experts.num", "'size'"):
        assert part in str(caught.value)


def test_recipes_that_are_no_recipes(tmp_path):
    for text, message in (("a: [", "not readable YAML"), ("- 1", "must be a mapping"), ("\x00", "not readable YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            molora.wrap(tiny_llama(), tmp_path / "bad.yaml")


# --- adapter folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return molora.save(wrapped(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def folder(good, tmp_path):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


def refused(folder, message):
    """Loading raises LoadError with `message` and leaves the model alone; so does PEFT's own door, with any error."""
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(LoadError, match=message) as caught:
        molora.load(base, folder)
    assert anatomy(base) == before
    with pytest.raises((LoadError, ValueError, KeyError, SafetensorError, RuntimeError)):
        PeftModel.from_pretrained(tiny_llama(), folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "saved in format 2, but this molora reads up to 1; upgrade with pip install -U molora"),
        ({"format_version": "new"}, "saved in format new"),
        ({"xyzzy": 1}, "key 'xyzzy' is unknown; known: .*selector"),
        ({"selektor": "softmax"}, r"key 'selektor' is unknown; did you mean 'selector'\?"),
        ({"selector": "from_the_future"}, "selector 'from_the_future' is unknown"),
        ({"scorer": {"name": "linear", "depth": 3}}, "scorer 'linear' has no option 'depth'"),
        ({"experts": {"form": "tensor"}}, "experts.form 'tensor' is unknown"),
        ({"experts": 3}, "experts must be a mapping"),
        ({"losses": {"name": "switch_balance"}}, "losses must be a list"),
        ({"task_type": "POETRY"}, "Invalid task type: 'POETRY'"),
        ({"selector": {"name": "top_k", "k": 4}}, "got k=4 with 3"),
        ({"peft_type": "LORA"}, r"a plain LoRA: make an expert of it with molora.import_peft\(model, \[path\]\)"),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3': load it with peft"),
        ({"fingerprint": {"structure": 1}}, "fingerprint in its config is damaged"),
        ({"fingerprint": {"structure": "", "samples": {"lm_head.weight": {"dtype": "no", "values": []}}}}, "damaged"),
    ],
)
def test_configs_from_elsewhere(changes, message, folder):
    change_config(folder, **changes)
    if changes.get("peft_type") in ("LORA", "IA3"):  # other types are PEFT's to judge
        with pytest.raises(LoadError, match=message):
            molora.load(tiny_llama(), folder)
    else:
        refused(folder, message)


def test_all_that_is_wrong_with_a_folder_comes_at_once(folder):
    change_config(folder, surprise=1, another=2, selector="softmx", fingerprint=None)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(LoadError) as caught:
        molora.load(tiny_llama(), folder)
    for part in ("'surprise'", "'another'", "selector 'softmx'", "truncated"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not readable JSON"),
        ("[1]", "must hold a mapping, got list"),
        ("\udcff", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ('{"experts": 1' + "0" * 5000 + "}", "not readable JSON"),
    ],
)
def test_configs_that_are_no_json(text, message, folder):
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LoadError, match=f"{CONFIG}.*{message}|{message}"):
        molora.load(tiny_llama(), folder)


def test_missing_files_and_folders(folder):
    (folder / CONFIG).rename(folder / "x")
    refused(folder, "adapter_config.json is missing")
    (folder / "x").rename(folder / CONFIG)
    (folder / WEIGHTS).unlink()
    refused(folder, "adapter_model.safetensors is missing")
    with pytest.raises(LoadError, match=r"is a file; give the folder that holds adapter_config.json"):
        molora.load(tiny_llama(), folder / CONFIG)
    with pytest.raises(LoadError, match="no folder"):
        molora.load(tiny_llama(), folder / "nowhere")


class Bomb:
    """Unpickling it is what must never happen."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_a_pickle_is_refused_by_name_and_never_opened(name, folder):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, f"{name} is a pickle, which can run any code and is never loaded")
    with pytest.raises(LoadError, match=f"{name} is a pickle|holds {name}, a pickle"):
        PeftModel.from_pretrained(tiny_llama(), folder)
    (folder / name).rename(folder / WEIGHTS)  # nor under another name
    refused(folder, "is not safetensors, or hostile|truncated|corrupt")


def test_nan_and_inf_are_found_before_anything_is_built(folder):
    for value in (torch.nan, torch.inf, -torch.inf):
        change_tensors(folder, lambda tensors, value=value: next(iter(tensors.values())).view(-1)[3].fill_(value))
        refused(folder, "holds NaN or Inf")


def test_another_base(folder):
    """Other weights, another shape, other layers: by name, and with the tensors that do not fit."""
    cases = {
        "other weights": (tiny_llama(seed=1), "weight '.*' has other values than when the adapter was trained"),
        "wider": (tiny_llama(hidden_size=64), r"has shape \(6, 32\), the model needs \(6, 64\)"),
        "deeper": (tiny_llama(num_hidden_layers=3), "has other linear layers"),
        "shallower": (tiny_llama(num_hidden_layers=1), "tensor 'base_model.model.model.layers.1.* is unexpected"),
    }
    for base, message in cases.values():
        with pytest.raises(LoadError, match=message):
            molora.load(base, folder)
        with pytest.raises(LoadError, match="belongs to another base"):
            PeftModel.from_pretrained(base, folder)
        if message != cases["other weights"][1]:
            with pytest.raises(LoadError, match="has other linear layers than the one the adapter was trained on"):
                molora.load(base, folder)
    # one changed value is not noticed unless it is sampled, but a fine-tuned base is: every value moves
    tuned = tiny_llama()
    for parameter in tuned.parameters():
        parameter.data += 1e-4 * torch.randn_like(parameter)
    with pytest.raises(LoadError, match="has other values"):
        molora.load(tuned, folder)


# --- safetensors headers ----------------------------------------------------------------------------------------------


def safetensors_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty file": (None, "truncated: it has 0 bytes"),
    "length only": (b"\x10\0\0\0\0\0\0\0", "truncated: its header has 16 bytes, the file 8"),
    "bomb": (struct.pack("<Q", 2**63) + b"{}", r"hostile: its header claims 9,223,372,036,854,775,808 bytes"),
    "just over the limit": (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "hostile: its header claims 100,000,001 bytes"),
    "no json": (b"{]", "header is not readable JSON"),
    "no utf-8": (b'{"\xff": 1}', "header is not readable JSON"),
    "deep": (b"[" * 50_000, "header is not readable JSON"),
    "no mapping": (b"[]", "must be a mapping, got list"),
    "name twice": (b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": 1}', "a name occurs twice"),
    "no entry": ({"a": 5}, "unknown dtype None"),
    "dtype": ({"a": entry("F31")}, "unknown dtype 'F31'"),
    "unhashable dtype": ({"a": entry(["F32"])}, "unknown dtype"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, "has shape"),
    "float shape": ({"a": entry(shape=(2.0,))}, "has shape"),
    "bool shape": ({"a": entry(shape=(True, 2))}, "has shape"),
    "huge shape": ({"a": entry(shape=(2**62, 2**62))}, "cannot fill bytes"),
    "offsets": ({"a": entry(offsets=(0, 8, 16))}, "offsets"),
    "reversed offsets": ({"a": entry(offsets=(8, 0))}, "cannot fill bytes"),
    "wrong size": ({"a": entry(shape=(3,))}, "cannot fill bytes"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "'b' overlaps"),
    "same bytes": ({"a": entry(), "b": entry()}, "overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, "'b' leaves a gap of 4 bytes"),
    "outside": (
        {"a": entry(shape=(2000,), offsets=(0, 8000))},
        "truncated: its tensors need 8,000 bytes, 20 are there",
    ),
    "surplus": ({"a": entry()}, "12 bytes follow its last tensor"),
}


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS)
def test_headers_are_checked_before_anything_is_allocated(header, message, folder):
    path = folder / WEIGHTS
    if header is None:
        path.write_bytes(b"")
    elif isinstance(header, bytes) and header[7:8] in (b"\0", b"\x80"):
        path.write_bytes(header)  # with its own length field
    else:
        safetensors_file(path, header, data=bytes(20))
    with pytest.raises(LoadError, match=message):
        read_header(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):  # the library agrees
        pass
    refused(folder, message)


def test_what_the_header_says_is_what_the_library_reads(good):
    tensors = read_header(good / WEIGHTS)
    with safe_open(good / WEIGHTS, "pt") as weights:
        assert set(tensors) == set(weights.keys())
        for name in tensors:
            read = weights.get_tensor(name)
            assert tensors[name].shape == tuple(read.shape) and tensors[name].is_floating == read.is_floating_point()
    assert look(good).problems == []


def test_every_dtype_of_torch(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32]
    save_file({str(d): torch.zeros(3, 0 if d is torch.bool else 5).to(d) for d in dtypes}, tmp_path / WEIGHTS)
    found = read_header(tmp_path / WEIGHTS)
    assert {name: info.is_floating for name, info in found.items()} == {str(d): d.is_floating_point for d in dtypes}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 230), st.integers(0, 255)), max_size=3))
def test_damaged_files_are_refused_exactly_when_the_library_refuses_them(cut, flips, tmp_path):
    """Never another error than LoadError, whatever the bytes; what we accept, the library reads the same."""
    path = tmp_path / WEIGHTS
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c.d": torch.ones(())}, path)
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    path.write_bytes(bytes(data[: len(data) - cut] if cut else data))
    try:
        ours = {name: info.shape for name, info in read_header(path).items()}
    except LoadError:
        ours = None
    try:
        with safe_open(path, "pt") as weights:
            theirs = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError:
        theirs = None
    assert ours == theirs or ours is None  # we may be stricter, never laxer
    if ours is None and theirs is not None:  # and only where a name or a dtype is one we do not take
        with pytest.raises(LoadError, match=r"unknown dtype|twice|not readable JSON|has shape"):
            read_header(path)
