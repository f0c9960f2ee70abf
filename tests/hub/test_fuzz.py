"""Fuzzing of everything that reads files and answers from elsewhere: only the documented errors, and bounded memory.

hypothesis here; atheris, which is guided by coverage, in fuzz_header.py when it is installed.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from molora import ConfigError, LoadError
from molora.files import WEIGHTS, read_header
from molora.hub.address import parse_address
from molora.hub.limits import Limits, why_not_file
from molora.hub.sources import FILES, HubSource
from molora.hub.transfer import cached, place_of
from molora.hub.verify import check_folder
from molora.hub.web import Web
from tests.adapters import CONFIG
from tests.hub.fuzzing import JSON, NUMBERS, TEXTS, fuzz, nothing_strange
from tests.test_interchange import peft_lora

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return peft_lora(tmp_path_factory.mktemp("lora"), 1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def folder(lora, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    for name in (CONFIG, WEIGHTS):
        (path / name).write_bytes((lora / name).read_bytes())
    return path


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- headers ----------------------------------------------------------------------------------------------------------


@fuzz(300)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
       cut=st.integers(0, 600))  # fmt: skip
def test_damaged_files(lora, folder, edits, cut):
    """Bytes changed anywhere, most of them in the header; what we accept, the safetensors library reads, too."""
    content = bytearray((lora / WEIGHTS).read_bytes())
    for place, new in edits:
        place %= 1400 if place % 4 else len(content)
        content[place : place + len(new)] = new
    content = content[: len(content) - cut] if cut < 300 else content
    (folder / WEIGHTS).write_bytes(content)
    try:
        found = read_header(folder / WEIGHTS)
    except LoadError:
        nothing_strange(check_folder(folder))
        return
    theirs = load_file(folder / WEIGHTS)
    assert {name: info.shape for name, info in found.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    verdict = check_folder(folder)
    nothing_strange(verdict)
    finite = all(torch.isfinite(t.float()).all() for t in theirs.values() if t.is_floating_point())
    assert finite or not verdict.ok


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "F4", None, 3]),
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2).map(sorted) | JSON,
    },
)
REAL = st.builds(lambda rows: {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]}, st.integers(0, 16))


@fuzz(300)
@given(header=st.dictionaries(TEXTS, ENTRY | REAL, max_size=3) | JSON, data=st.binary(max_size=64))
@example(header={"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, data=bytes(4))
@example(header={"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, data=b"")
@example(header={"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**62]}}, data=b"")
@example(header={"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, data=bytes(4))
def test_headers_from_nowhere(folder, header, data):
    (folder / WEIGHTS).write_bytes(file_of(header, data))
    try:
        found = read_header(folder / WEIGHTS)
    except LoadError:
        found = None
    verdict = check_folder(folder)
    nothing_strange(verdict)
    assert not verdict.ok
    if found:  # what we take for sound, safetensors reads as we do
        try:
            theirs = load_file(folder / WEIGHTS)
        except (SafetensorError, KeyError, RuntimeError, TypeError, OverflowError):
            assume(False)  # sizes that only they forbid, and dtypes that torch has not
        assert {name: info.shape for name, info in found.items()} == {n: tuple(t.shape) for n, t in theirs.items()}


LIMITS = Limits(header=1_000_000, tensors=1_000, config=100_000)
BOMBS = {
    "mappings": b"[" + b"{}," * 300_000 + b"{}]",
    "lists": b"[" + b"[]," * 300_000 + b"[]]",
    "deep": b"[" * 900_000,
    "numbers": b'{"a":{"shape":[' + b"1.5," * 200_000 + b"1]}}",
    "texts": b"[" + b'"ab",' * 190_000 + b'""]',
    "one number": b'{"a":{"shape":[' + b"9" * 900_000 + b"]}}",
    "a name": b'{"' + b"x" * 900_000 + b'":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
    "wide text": b'{"__metadata__":{"a":"' + "\U0001f600".encode() * 200_000 + b'"}}',
    "many tensors": json.dumps({str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(9_000)}),
    "axes": json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 12_000, "data_offsets": [0, 4]}}),
    "huge claim": json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_headers_that_want_much_memory_get_little(folder, bomb):
    """At most eight times the header (UTF-8 to four bytes a character, and a copy) and 1.5 kB a tensor allowed."""
    text = BOMBS[bomb]
    text = text.encode() if isinstance(text, str) else text
    (folder / WEIGHTS).write_bytes(file_of(text, bytes(4)))
    assert len(text) <= LIMITS.header
    tracemalloc.start()
    try:
        verdict = check_folder(folder, limits=LIMITS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not verdict.ok
    nothing_strange(verdict)
    assert peak < 8 * len(text) + 1_500 * LIMITS.tensors


def test_a_length_field_alone_allocates_nothing(folder):
    for length in (10**8, 2**40, 2**63, 2**64 - 1):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
        tracemalloc.start()
        try:
            with pytest.raises(LoadError, match=r"hostile|truncated"):
                read_header(folder / WEIGHTS)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100_000


def test_within_a_hard_limit_of_memory(folder, lora, tmp_path):
    """The same under RLIMIT_DATA, which counts what torch and safetensors allocate, too; a big file streams through."""
    paths = []
    for name, bomb in BOMBS.items():
        path = tmp_path / name.replace(" ", "_")
        path.mkdir()
        (path / CONFIG).write_bytes((lora / CONFIG).read_bytes())
        (path / WEIGHTS).write_bytes(file_of(bomb.encode() if isinstance(bomb, str) else bomb, bytes(4)))
        paths.append(str(path))
    big = tmp_path / "big"
    big.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors = {f"{layer}_A.weight": torch.zeros(512, 60_000), f"{layer}_B.weight": torch.zeros(60_000, 512)}
    save_file({name: t.half() for name, t in tensors.items()}, big / WEIGHTS)
    (big / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 512, "lora_alpha": 1, "target_modules": ["q_proj"]})
    )
    code = (
        "import resource, sys\nfrom molora.hub.verify import check_folder\n"
        "used = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmData')) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 160_000_000,) * 2)\n"
        "print([len(check_folder(path).problems) for path in sys.argv[1:]])\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    run = subprocess.run([sys.executable, "-c", code, *paths, str(big)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    counts = json.loads(run.stdout.splitlines()[-1])
    assert (
        all(counts[:-1]) and counts[-1] == 0
    )  # 123 MB are mapped; one of its tensors in float32 would be as much again


# --- what comes over the wire -----------------------------------------------------------------------------------------


class Answers(Web):
    """A Hub that answers any JSON."""

    def __init__(self, answer):
        super().__init__("https://huggingface.co", False)
        self.answer = answer

    def json(self, url):
        return self.answer


SIBLING = st.fixed_dictionaries(
    {"rfilename": st.sampled_from([*FILES, "../x", "a/b.json", "adapter_model.bin"]) | TEXTS},
    optional={"size": NUMBERS | JSON, "blobId": st.just("0" * 40) | JSON, "lfs": JSON},
)


@fuzz(200)
@given(
    answer=JSON
    | st.fixed_dictionaries({"sha": st.just("a" * 40) | JSON, "siblings": st.lists(SIBLING | JSON, max_size=5) | JSON})
)
def test_answers_of_a_hub(answer):
    try:
        source = HubSource(Answers(answer), parse_address("me/x", "https://huggingface.co"))
    except LoadError as error:
        assert "\x1b" not in str(error)
        return
    assert set(source.files) <= set(FILES) and all(file.size >= 0 for file in source.files.values())


@fuzz(200)
@given(text=st.text(max_size=30) | st.text(alphabet="ab/:@.%2Fhfs3~\\ ", max_size=30).map(lambda t: f"hf://{t}"))
@example(text="hf://a/b@%2e%2e/x")
@example(text="https://huggingface.co/a/b/tree/../../x")
@example(text="https://huggingface.co/a/b/tree/main/%2e%2e/%2e%2e/x")
def test_addresses(text, tmp_path_factory):
    try:
        address = parse_address(text, "https://huggingface.co")
    except ConfigError:
        return
    assert ".." not in address.folder.split("/") and not address.folder.startswith("/")
    place = place_of(text, "/cache")
    assert place.parent == Path("/cache") and len(place.name) < 120 and place.name not in (".", "..")


@fuzz(100)
@given(url=st.text(max_size=30) | st.text(alphabet="htps:/@.hfco[]\\#?:1", max_size=30))
def test_redirect_targets(url):
    """A target that is allowed is on an allowed host, as another parser of URLs reads it."""
    httpx2 = pytest.importorskip("httpx2")
    web = Web("https://huggingface.co", False)
    try:
        allowed = web.allows(url)
    except ValueError:
        raise AssertionError(f"{url!r} makes the check crash") from None
    if allowed:
        parsed = httpx2.URL(url)
        assert parsed.scheme == "https" and (
            parsed.host == "huggingface.co" or parsed.host.endswith((".hf.co", ".huggingface.co"))
        )


@fuzz(100)
@given(name=st.text(max_size=20))
def test_file_names(name):
    if why_not_file(name) is None:
        assert os.path.basename(name) == name and name not in (".", "..") and name.isascii()


@fuzz(100)
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_damaged_caches(tmp_path_factory, content):
    place = tmp_path_factory.mktemp("place")
    (place / "promised.json").write_bytes(content)
    assert cached(place) is None


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris(lora, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    good = (lora / WEIGHTS).read_bytes()[:1500]
    small = json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}, "__metadata__": {}}).encode()
    for number, seed in enumerate((b"\x00" + good, b"\x01" + small, b"\x02task: a\nmetrics: {b: 1.0}\n")):
        (corpus / str(number)).write_bytes(seed)
    command = [sys.executable, "-m", "tests.hub.fuzz_header", str(corpus), "-runs=20000", "-seed=1", "-max_len=2000"]
    command += ["-max_total_time=8", "-rss_limit_mb=4000", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Done " in run.stderr and len(list(corpus.iterdir())) > 3  # it found new paths through the code
