"""check_folder and proof_of_effect: what is refused, with the reason, and that nothing is opened that should not be."""

import json
import os
import pickle
import re
import struct

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import molora
from molora import ConfigError, LoadError, fingerprint
from molora.compat.layers import linear_sizes
from molora.hub.card import AdapterCard, hash_files
from molora.hub.effect import proof_of_effect
from molora.hub.limits import Limits
from molora.hub.store import Hub
from molora.hub.verify import check_folder
from tests.adapters import WEIGHTS, anatomy, change_config, change_tensors, logits, wrapped
from tests.test_interchange import peft_lora
from tests.tiny import tiny_inputs, tiny_llama, tiny_tokenizer

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"  # in the order of the file


@pytest.fixture
def lora(tmp_path):
    return peft_lora(tmp_path / "lora", 1, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def mixture(tmp_path):
    return molora.save(wrapped(), tmp_path / "mixture")


def problems(folder, **options):
    return "\n".join(check_folder(folder, **options).problems)


def change_header(folder, change):
    """Rewrite the header of the weights with what `change(dict)` makes of it; the data stays."""
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def with_card(folder, **fields):
    card = AdapterCard(**{"files": hash_files(folder), **fields})
    (folder / "card.yaml").write_text(card.to_yaml())
    return folder


# --- good ones --------------------------------------------------------------------------------------------------------


def test_good_adapters_pass(lora, mixture):
    base = tiny_llama()
    before = anatomy(base)
    for folder, kind in ((lora, "LORA"), (mixture, "MOLORA")):
        for here in (None, base, fingerprint.of_model(base, linear_sizes)[0]):
            verdict = check_folder(with_card(folder), base=here).require()
            assert verdict.ok and verdict.kind == kind and set(verdict.sizes) == {p.name for p in folder.iterdir()}
    assert check_folder(lora).rank == 4 and check_folder(lora).card.files == hash_files(lora)
    assert anatomy(base) == before


@pytest.mark.parametrize("recipe", ["dynmole", "hydralora", "mixlora", "smoe_dropout"])
def test_shapes_of_mixtures_are_compared_without_building_them(recipe, tmp_path):
    """Also for forms whose parts need weights to be made: there a note says so."""
    folder = molora.save(molora.wrap(tiny_llama(), recipe), tmp_path / "a")
    assert check_folder(folder, base=tiny_llama()).problems == []
    change_config(folder, fingerprint=None)
    change_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    assert "is missing" in problems(folder, base=tiny_llama())


# --- files ------------------------------------------------------------------------------------------------------------


def test_pickles_are_refused_and_never_opened(lora, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    for name in ("adapter_model.bin", "training_args.bin", "x.pt", "y.PKL"):
        (lora / name).write_bytes(pickle.dumps(Bomb()))
        assert f"'{name}' is a pickle, which can run any code" in problems(lora)
    (lora / WEIGHTS).unlink()
    assert "pickle" in problems(lora)
    assert not (tmp_path / "boom").exists()


def test_links_folders_and_odd_names_are_refused(lora, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (lora / "README.md").unlink()
    (lora / "README.md").symlink_to(secret)
    (lora / "sub").mkdir()
    (lora / "..json").write_text("{}")
    (lora / "a b.json").write_text("{}")
    (lora / "\x1b[31m.json").write_text("{}")
    (lora / "run.py").write_text("boom")
    os.mkfifo(lora / "pipe.json")  # opening it would wait for ever
    found = problems(lora)
    for part in (
        "'README.md' is a link",
        "'sub' is no plain file",
        "'pipe.json' is no plain file",
        "'..json' is no plain file name",
        "'a b.json' is no plain file name",
        "'run.py' does not belong into an adapter: only .safetensors, .json",
    ):
        assert part in found
    assert "\x1b" not in found and check_folder(lora).contents is None


def test_a_link_in_place_of_weights_is_not_followed(lora, tmp_path):
    moved = tmp_path / "elsewhere.safetensors"
    (lora / WEIGHTS).rename(moved)
    (lora / WEIGHTS).symlink_to(moved)
    assert problems(lora) == f"'{WEIGHTS}' is a link; an adapter holds its files itself"


def test_a_library_takes_no_links_out_of_a_folder(lora, tmp_path):
    """An adapter that links to a secret would carry it into the library, and with the next push into the world."""
    secret = tmp_path / "secret"
    secret.write_text("my key")
    hub = Hub(tmp_path / "library")
    (lora / "README.md").unlink()
    (lora / "README.md").symlink_to(secret)
    with pytest.raises(LoadError, match=r"was not added.*README.md is a link to '.*secret'"):
        hub.add(lora, "thief")
    # not even in what looks like the cache of Hugging Face, which is made of links to blobs (see test_store.py)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    lora.rename(snapshot)
    blobs.mkdir()
    (blobs / "README.md").symlink_to(secret)
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../blobs/README.md")
    with pytest.raises(LoadError, match=r"README.md is a link to '.*secret'"):
        hub.add(snapshot, "thief")


def test_limits(lora, mixture):
    size = (lora / WEIGHTS).stat().st_size
    assert f"its weights have {size:,} bytes, {size - 1:,} are allowed" in problems(
        lora, limits=Limits(weights=size - 1)
    )
    assert check_folder(lora, limits=Limits(weights=size, rank=4, tensors=8)).ok
    assert "its rank is 4, 3 is allowed" in problems(lora, limits=Limits(rank=3))
    assert "7" in problems(lora, limits=Limits(tensors=7)) and "8 tensors" in problems(lora, limits=Limits(tensors=7))
    assert "header claims" in problems(lora, limits=Limits(header=100))
    assert "10 are allowed" in problems(lora, limits=Limits(config=10))
    assert "3 files, 2 are allowed" in problems(lora, limits=Limits(files=2))
    assert "rank is 2, 1 is allowed" in problems(mixture, limits=Limits(rank=1))
    assert "num is 3, 2 is allowed" in problems(mixture, limits=Limits(experts=2))
    for number in range(40):
        (lora / f"{number}.json").write_text("{}")
    assert "43 files, 32 are allowed" in problems(lora)


# --- headers and tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf(lora, value, dtype):
    def spoil(tensors):
        tensors[KEY] = tensors[KEY].to(dtype)
        tensors[KEY][-1, -1] = value

    change_tensors(lora, spoil)
    assert problems(lora) == f"tensor '{KEY}' holds NaN or Inf"


def test_nan_is_found_in_every_piece(lora, monkeypatch):
    monkeypatch.setattr("molora.files.PIECE", 40)  # a row has 32 values
    assert check_folder(lora).ok
    for row in range(4):
        change_tensors(lora, lambda tensors, row=row: tensors[KEY].__setitem__((row, 5), float("nan")))
        assert "NaN" in problems(lora)
        change_tensors(lora, lambda tensors, row=row: tensors[KEY].__setitem__((row, 5), 0.0))


@pytest.mark.parametrize(
    "dtype, name",
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL"), (torch.complex64, "C64")],
)
def test_dtypes(lora, dtype, name):
    change_tensors(lora, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    assert f"tensor '{KEY}' has dtype {name}; allowed: BF16, F16, F32, F64" in problems(lora)


def test_headers_that_lie(lora):
    content = (lora / WEIGHTS).read_bytes()
    cases = {
        "is corrupt: a tensor is called": lambda h: h.update({"x" * 2000: h.pop(KEY)}),
        r"called '\x1b[31m": lambda h: h.update({"\x1b[31m": h.pop(KEY)}),
        "cannot fill bytes": lambda h: h[KEY].update(shape=[1 << 40, 1 << 40]),
        "has shape": lambda h: h[KEY].update(shape=[2] * 100_000),
        "unknown dtype": lambda h: h[KEY].update(dtype="X" * 100_000),
        "leaves a gap of 4 bytes": lambda h: h[KEY].update(data_offsets=[o + 4 for o in h[KEY]["data_offsets"]]),
        "overlaps": lambda h: h[LAST].update(data_offsets=[o - 4 for o in h[LAST]["data_offsets"]]),
    }
    for message, change in cases.items():
        (lora / WEIGHTS).write_bytes(content)
        change_header(lora, change)
        found = problems(lora)
        assert message in found and len(found) < 1000 and "\x1b" not in found, message
    (lora / WEIGHTS).write_bytes(content[:-3])
    assert "truncated" in problems(lora)
    (lora / WEIGHTS).write_bytes(content + b"xyz")
    assert "3 bytes follow its last tensor" in problems(lora)
    save_file({}, lora / WEIGHTS)
    assert "holds no tensor" in problems(lora)


def test_other_weights_files_are_checked_too(lora):
    save_file({"gate": torch.tensor([1.0, float("nan")])}, lora / "gate.safetensors")
    assert problems(lora) == "tensor 'gate' holds NaN or Inf"
    (lora / "gate.safetensors").write_bytes(b"\xff" * 20)
    assert "gate.safetensors is not safetensors, or hostile" in problems(lora)


# --- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, messages",
    [
        ({"use_dora": True}, ["use_dora=True: DoRA also rescales the base weight", "belongs to DoRA"]),
        ({"bias": "lora_only"}, ["bias='lora_only': trained biases are not part of an expert"]),
        ({"lora_bias": True}, ["lora_bias=True: a trained bias of B", "is a trained bias"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save=['lm_head']: it holds modules trained whole"]),
        ({"target_modules": ["embed_tokens", "q_proj"]}, ["belongs to a LoRA on an embedding"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices=[1, 2]: it holds trained embeddings"]),
    ],
)
def test_what_peft_saves_and_no_expert_can_hold(tmp_path, options, messages):
    folder = peft_lora(tmp_path / "x", 1, **options)
    found = problems(folder)
    for message in messages:
        assert message in found
    with pytest.raises(LoadError, match=r"cannot be trusted"):
        check_folder(folder).require()


def test_other_types_are_refused(lora):
    change_config(lora, peft_type="IA3")
    assert "it is an adapter of type 'IA3'; only LORA adapters become experts" in problems(lora)
    change_config(lora, peft_type=None)
    assert "type None" in problems(lora)


def test_shapes_against_the_base(lora, tmp_path):
    assert "needs A (4, 64) and B (64, 4), the file holds (4, 32) and (32, 4)" in problems(
        lora, base=tiny_llama(hidden_size=64)
    )
    deeper = peft_lora(tmp_path / "deep", 1, build=lambda: tiny_llama(num_hidden_layers=3))
    verdict = check_folder(deeper, base=tiny_llama())
    assert len(verdict.unmatched) == 2 and all("layers.2." in name for name in verdict.unmatched)
    assert "the model has no linear layer 'model.layers.2.self_attn.q_proj'" in "\n".join(verdict.problems)


def test_without_a_base_a_and_b_must_fit_each_other_and_the_config(lora):
    change_config(lora, r=5)
    assert "needs A (5, 32) and B (32, 5), the file holds (4, 32) and (32, 4)" in problems(lora)
    change_config(lora, r=4)
    change_tensors(lora, lambda tensors: tensors.pop(KEY))
    assert f"tensor '{KEY.replace('lora_A', 'lora_B')}' has no partner" in problems(lora)
    change_tensors(lora, lambda tensors: tensors.update({KEY: torch.ones(4)}))
    assert "holds (4,)" in problems(lora)


def test_another_base_of_the_same_shape_is_noticed(lora, mixture):
    mine, _ = fingerprint.of_model(tiny_llama(), linear_sizes)
    with_card(lora, fingerprint=mine)
    for folder in (lora, mixture):
        assert check_folder(folder, base=tiny_llama()).ok and check_folder(folder, base=mine).ok
        other = tiny_llama(seed=1)
        assert "has other values" in problems(folder, base=other)
        assert "has other values" in problems(folder, base=fingerprint.of_model(other, linear_sizes)[0])
        bigger = fingerprint.of_model(tiny_llama(hidden_size=64), linear_sizes)[0]
        assert "other linear layers" in problems(folder, base=bigger)
        half, _ = fingerprint.of_model(tiny_llama().to(torch.bfloat16), linear_sizes)
        assert check_folder(folder, base=half).ok  # the same base, rounded
    assert "damaged" in problems(lora, base={"structure": 1})


def test_without_a_fingerprint_a_note_says_so(lora):
    (note,) = check_folder(lora, base=tiny_llama()).notes
    assert "does not say which weights its base had" in note


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank_pattern": {"(a+)+$": 4}}, "repeats too much"),
        ({"alpha_pattern": {"a*a*a*a*a*b": 4}}, "repeats too much"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
        ({"target_modules": "(x+x+)+y"}, "target_modules: .*repeats too much"),
        ({"r": 10**30}, "which is no rank|r is 1000000000"),
        ({"r": "4"}, "which is no rank"),
        ({"r": True}, "which is no rank"),
        ({"lora_alpha": 1e999}, "no number"),
        ({"lora_alpha": "8"}, "no number"),
    ],
)
def test_configs_that_would_hang_or_crash(lora, change, message):
    change_config(lora, **change)
    assert re.search(message, problems(lora))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": {"num": 10**9, "rank": 2, "form": "lora"}}, "num is 1000000000, 16,384 is allowed"),
        ({"experts": {"num": 3, "rank": 10**9}}, "rank is 1000000000, 1,024 is allowed"),
        ({"layers": [{"match": "(a|a)+$", "experts": {"num": 2}}]}, "layers.match: .*repeats too much"),
        ({"layers": [{"match": "x", "experts": {"num": 10**7}}]}, "num is 10000000"),
        ({"scorer": {"name": "mlp", "hidden": 10**12}}, "hidden is 1000000000000"),
        ({"selector": "from_the_future"}, "selector 'from_the_future' is unknown"),
        ({"format_version": 99}, "format 99"),
        ({"surprise": 1}, "key 'surprise' is unknown"),
    ],
)
def test_mixtures_that_ask_for_too_much_are_not_built(mixture, change, message):
    change_config(mixture, **change)
    assert re.search(message, problems(mixture, base=tiny_llama()))


# --- cards ------------------------------------------------------------------------------------------------------------


def test_hashes_of_the_card(lora):
    with_card(lora)
    assert check_folder(lora).ok
    (lora / "README.md").write_text("changed")
    assert problems(lora) == "README.md has other content than its card says (sha256 differs)"
    (lora / "README.md").unlink()
    assert problems(lora) == "README.md is missing, the card lists it"
    (lora / "extra.json").write_text("{}")
    assert "extra.json is not in the card" in problems(lora)
    (lora / "card.yaml").write_text("a: &a [*a]")
    assert "card.yaml cannot be read" in problems(lora)
    (lora / "card.yaml").write_text("files: {../../etc/passwd: " + "0" * 64 + "}")
    assert "no plain file name" in problems(lora)


def test_all_problems_come_at_once(lora):
    change_config(lora, use_dora=True, bias="all", use_qalora=True)
    change_tensors(lora, lambda tensors: tensors[KEY].fill_(float("nan")))
    with_card(lora, files={"gone.json": "0" * 64})
    with pytest.raises(LoadError, match=r"\d+ problems") as caught:
        check_folder(lora).require()
    for part in ("DoRA", "trained biases", "QA-LoRA", "NaN", "gone.json is missing"):
        assert part in str(caught.value)


def test_no_folder(tmp_path):
    assert problems(tmp_path / "none") == f"there is no folder '{tmp_path / 'none'}'"
    assert "adapter_config.json is missing" in problems(tmp_path)


# --- proof of effect --------------------------------------------------------------------------------------------------


def test_effect_is_what_peft_measures(lora, mixture):
    base = tiny_llama()
    probes = [tiny_inputs(base), tiny_inputs(base, seed=1, batch=1)]
    before = anatomy(base), logits(base)
    effect = proof_of_effect(base, lora, probes).require()
    theirs = PeftModel.from_pretrained(tiny_llama(), lora).eval()
    for probe, change in zip(probes, effect.changes, strict=True):
        with torch.no_grad():
            was, now = tiny_llama()(**probe).logits, theirs(**probe).logits
        assert change == pytest.approx(((now - was).abs().max() / was.abs().max()).item(), rel=1e-3)
    assert effect.largest > 1e-3 and effect.tensors == 8 and effect.unmatched == ()
    assert proof_of_effect(base, mixture, probes).require().largest > 1e-3
    assert anatomy(base) == before[0] and torch.equal(logits(base), before[1])


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    molora.save(molora.wrap(tiny_llama(), "dynmole"), tmp_path / "b")
    base = tiny_llama()
    for folder in (tmp_path / "a", tmp_path / "b"):
        effect = proof_of_effect(base, folder, [tiny_inputs(base)])
        with pytest.raises(LoadError, match=r"it changes nothing: over 1 probes the outputs differ by 0.0e\+00"):
            effect.require()
    # rounding alone is no effect, a little more is one
    lora = peft_lora(tmp_path / "c")
    change_tensors(lora, lambda tensors: [t.mul_(1e-5) for name, t in tensors.items() if "lora_B" in name])
    assert "changes nothing" in proof_of_effect(base, lora, [tiny_inputs(base)]).problems[0]
    change_tensors(lora, lambda tensors: [t.mul_(1e2) for name, t in tensors.items() if "lora_B" in name])
    assert proof_of_effect(base, lora, [tiny_inputs(base)]).problems == ()


def test_effects_that_are_no_numbers_are_refused(lora):
    base = tiny_llama()
    change_tensors(lora, lambda tensors: [t.fill_(1e30) for t in tensors.values()])
    effect = proof_of_effect(base, lora, [tiny_inputs(base)])
    assert effect.problems == ("with it the model's outputs are NaN or Inf",)
    assert torch.isfinite(logits(base)).all()


def test_unmatched_tensors_are_counted(tmp_path):
    folder = peft_lora(tmp_path / "deep", build=lambda: tiny_llama(num_hidden_layers=4))
    effect = proof_of_effect(tiny_llama(), folder, [tiny_inputs(tiny_llama())])
    assert effect.problems[0] == "4 of 8 tensors find no place in the model" and len(effect.unmatched) == 4
    # PEFT alone would load it with a warning at most
    PeftModel.from_pretrained(tiny_llama(), folder)


def test_probes_may_be_texts(lora):
    tokenizer, base = tiny_tokenizer(), tiny_llama()
    make = lambda text: tokenizer(text, return_tensors="pt")  # noqa: E731
    effect = proof_of_effect(base, lora, ["a good film .", "the match"], tokenize=make)
    assert len(effect.changes) == 2 and effect.problems == ()
    for probes in ([], ["text"]):
        with pytest.raises(ConfigError, match=r"needs probes"):
            proof_of_effect(base, lora, probes)


def test_the_model_is_restored_when_a_probe_fails(lora):
    base = tiny_llama().train()
    before = anatomy(base)
    with pytest.raises(ValueError, match=r"specify exactly one of input_ids"):
        proof_of_effect(base, lora, [{"no_such_input": 1}])
    assert anatomy(base) == before and base.training
    assert load_file(lora / WEIGHTS)
