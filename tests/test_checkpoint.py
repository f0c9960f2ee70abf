"""molora.save and molora.load: PEFT's layout, whole or not at all, strict, on every kind of base."""

import copy
import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import molora
from molora import ConfigError, LoadError, MoloraConfig
from molora.control import routed_layers, trace_of
from tests.adapters import CONFIG, RECIPE, WEIGHTS, anatomy, change_config, change_tensors, logits, stir, wrapped
from tests.needs import told
from tests.tiny import tiny_bert_classifier, tiny_gpt2, tiny_inputs, tiny_llama


def content(folder):
    """What an adapter folder means: its config without version numbers of libraries, and its tensors as lists."""
    config = json.loads((folder / CONFIG).read_text())
    return config, {name: tensor.tolist() for name, tensor in load_file(folder / WEIGHTS).items()}


def test_layout_is_pefts_and_the_card_says_how_to_load(tmp_path):
    model = wrapped()
    assert molora.save(model, tmp_path / "new" / "adapter") == tmp_path / "new" / "adapter"
    folder = tmp_path / "new" / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    model.save_pretrained(tmp_path / "peft")
    assert content(folder) == content(tmp_path / "peft")
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "MOLORA" and config["format_version"] == 1
    assert set(config["fingerprint"]) == {"structure", "samples"}
    for card in (folder / "README.md", tmp_path / "peft" / "README.md"):
        text = card.read_text()
        assert "pip install molora" in text and "import molora" in text and "library_name: peft" in text
        assert text.count("## How to load this adapter") == 1


def test_saving_again_keeps_other_files_and_the_text_of_the_card(tmp_path):
    model = wrapped()
    molora.save(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace("## How to load", "A sentence of my own.\n\n## How to load"))
    molora.save(stir(model, seed=1), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "A sentence of my own." in card and card.count("## How to load this adapter") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path)), logits(model))


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and carry on."""


@pytest.mark.parametrize("first", [True, False], ids=["new folder", "over an old adapter"])
def test_a_kill_at_any_step_leaves_the_old_adapter_or_the_new_one(first, tmp_path, monkeypatch):
    """The adapters differ in tensors, shapes and k, so a mixture of both could not pass for one of them."""
    old, new = wrapped(seed=1), wrapped(seed=2, recipe=RECIPE | {"selector": {"name": "top_k", "k": 1}})
    want = {"old": logits(old), "new": logits(new)}
    real, seen = os.replace, []
    for steps in range(6):
        folder = tmp_path / str(steps)
        if not first:
            molora.save(old, folder)
        left = steps

        def replace(source, target):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            real(source, target)

        monkeypatch.setattr("molora.files.os.replace", replace)
        try:
            molora.save(new, folder)
            killed = False
        except Killed:
            killed = True
        monkeypatch.setattr("molora.files.os.replace", real)
        if first and not (folder / ".incoming").exists() and killed:
            assert not folder.exists()  # killed before anything counted
            seen.append("nothing")
            continue
        got = logits(molora.load(tiny_llama(), folder))
        seen.append("new" if torch.equal(got, want["new"]) else "old" if torch.equal(got, want["old"]) else "mixture")
        assert not (folder / ".incoming").exists()
        # PEFT's own loading sees the same adapter afterwards
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), got)
    # one rename makes the new files count, three more put them in place; then nothing is left to kill
    assert seen == ["nothing" if first else "old", "new", "new", "new", "new", "new"]


def test_peft_itself_completes_an_interrupted_save(tmp_path):
    old, new = wrapped(seed=1), wrapped(seed=2)
    molora.save(old, tmp_path / "a")
    molora.save(new, tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "a" / ".incoming")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")), logits(new))


def test_nothing_is_written_when_saving_fails(tmp_path):
    model = wrapped()
    molora.save(model, tmp_path / "a")
    before = content(tmp_path / "a")
    next(iter(routed_layers(model).values())).molora_bank["default"].A.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"holds NaN or Inf in 1 tensors .*q_proj"):
        molora.save(model, tmp_path / "a")
    assert content(tmp_path / "a") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        molora.save(wrapped(), tmp_path / "file")
    with pytest.raises(ConfigError, match="adapter 'other' is unknown; the model has: default"):
        molora.save(model, tmp_path / "c", adapter="other")
    with pytest.raises(ConfigError, match="holds no molora adapter"):
        molora.save(tiny_llama(), tmp_path / "c")
    assert not (tmp_path / "c").exists()


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", molora.recipes())
def test_reload_is_exact(recipe, tmp_path):
    def answer(model):
        with told(model, len(tiny_inputs(model)["input_ids"])):
            return logits(model)

    model = wrapped(recipe=recipe)
    molora.set_progress(model, 1.0)  # where schedules of a saved adapter stand
    molora.save(model, tmp_path)
    expected = answer(model)
    assert not torch.equal(expected, logits(tiny_llama()))
    for loaded in (molora.load(tiny_llama(), tmp_path), PeftModel.from_pretrained(tiny_llama(), tmp_path)):
        # not to the last bit: a matrix product may differ by a rounding with where its input lies in memory
        torch.testing.assert_close(answer(loaded), expected, atol=1e-6, rtol=1e-5)
        assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    low = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(answer(low), expected, atol=1e-6, rtol=1e-5)


def test_a_loaded_adapter_can_go_on_training(tmp_path):
    model = wrapped()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    molora.save(model, tmp_path)
    again = molora.load(tiny_llama().train(), tmp_path, is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable
    assert again.training
    # and as a second adapter; the first one keeps its own trainability
    again = molora.load(again, tmp_path, "second", is_trainable=True)
    second = {name.replace(".default.", ".second.") for name in trainable}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable | second


def test_loading_is_independent_of_how_the_base_is_stored(tmp_path):
    """The same base in bfloat16 is the same base; another seed is not."""
    molora.save(wrapped(), tmp_path)
    half = tiny_llama().to(torch.bfloat16)
    assert molora.load(half, tmp_path).dtype == torch.bfloat16
    with pytest.raises(LoadError, match="has other values than when the adapter was trained"):
        molora.load(tiny_llama(seed=1).to(torch.bfloat16), tmp_path)


def test_a_new_head_is_saved_and_does_not_count_as_another_base(tmp_path):
    model = wrapped(base=tiny_bert_classifier())
    molora.save(model, tmp_path)
    assert sum("classifier" in name for name in load_file(tmp_path / WEIGHTS)) == 2
    fresh = tiny_bert_classifier()
    torch.nn.init.normal_(fresh.classifier.weight)  # as from_pretrained leaves a head that no checkpoint holds
    other = copy.deepcopy(fresh)
    # trainable like the other one: torch multiplies slices of frozen and trainable weights in another order
    assert torch.equal(logits(molora.load(fresh, tmp_path, is_trainable=True).eval()), logits(model))
    both = molora.load(molora.load(other, tmp_path), tmp_path, "second", is_trainable=True).eval()
    both.set_adapter("second")
    assert torch.equal(logits(both), logits(model))
    # another number of classes is a head that does not fit, not another base
    with pytest.raises(LoadError) as caught:
        molora.load(tiny_bert_classifier(num_labels=5), tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2 and all("classifier" in line and "has shape (3," in line for line in lines)


def test_hub_repositories_come_from_the_cache_and_only_in_parts(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out; the tests are offline, so nothing else can be reached."""
    model = wrapped()
    commit = "a" * 40
    repo = tmp_path / "models--someone--adapter"
    molora.save(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(logits(molora.load(tiny_llama(), "someone/adapter")), logits(model))
    with pytest.raises(LoadError, match="no folder 'someone/other', and the Hub gave no repository"):
        molora.load(tiny_llama(), "someone/other")
    with pytest.raises(LoadError, match="not the id of a Hub repository either"):
        molora.load(tiny_llama(), tmp_path / "no" / "such" / "folder")
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name))
    with pytest.raises(TypeError):
        molora.load(tiny_llama(), "someone/adapter", revision="v1")
    assert asked == {"name": "someone/adapter", "revision": "v1", "allow_patterns": [CONFIG, WEIGHTS, "README.md"]}


def test_where_an_adapter_cannot_go(tmp_path):
    model = wrapped()
    molora.save(model, tmp_path)
    with pytest.raises(ConfigError, match="has an adapter 'default' already"):
        molora.load(model, tmp_path)
    with pytest.raises(ConfigError, match="inside of a wrapped model"):
        molora.load(model.get_base_model(), tmp_path, "second")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"adapters of type .*LORA"):
        molora.load(lora, tmp_path, "second")


# --- a failed load ----------------------------------------------------------------------------------------------------

SPOILED = {
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.popitem()), r"tensor '.*' is missing"),
    "nan": (lambda f: change_tensors(f, lambda t: next(iter(t.values())).fill_(torch.nan)), "holds NaN"),
    "k > E": (lambda f: change_config(f, selector={"name": "top_k", "k": 9}), "number of experts"),
    "no target": (lambda f: change_config(f, target_modules=["no_such_layer"]), "no_such_layer"),
    "other ranks": (lambda f: change_config(f, experts={"num": 3, "rank": 4}), r"has shape \(6, 32\)"),
}


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED)
def test_a_failed_load_leaves_the_model_as_it_was(spoil, message, tmp_path):
    molora.save(wrapped(), tmp_path)
    spoil(tmp_path)
    base = tiny_llama().train()
    base.model.norm.weight.requires_grad_(False)
    before, said = anatomy(base), logits(base)
    with pytest.raises(LoadError, match=message):
        molora.load(base, tmp_path)
    assert anatomy(base) == before and not hasattr(base, "peft_config")
    assert torch.equal(logits(base), said)
    # into a wrapped model
    model = wrapped(seed=5)
    before, said = anatomy(model), logits(model)
    plans, reports = set(trace_of(model).plans), set(model.base_model.reports)
    with pytest.raises(LoadError, match=message):
        molora.load(model, tmp_path, "second")
    assert anatomy(model) == before and list(model.peft_config) == ["default"]
    assert (set(trace_of(model).plans), set(model.base_model.reports)) == (plans, reports)
    assert torch.equal(logits(model), said)


def test_a_failed_load_with_a_head_leaves_the_head_unwrapped(tmp_path):
    molora.save(wrapped(base=tiny_bert_classifier()), tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.classifier.weight"))
    base = tiny_bert_classifier()
    before = anatomy(base)
    with pytest.raises(LoadError, match=r"tensor 'base_model.model.classifier.weight' is missing"):
        molora.load(base, tmp_path)
    assert anatomy(base) == before


def test_a_wrong_base_and_wrong_tensors_are_told_together(tmp_path):
    molora.save(wrapped(), tmp_path)

    def spoil(tensors):
        names = sorted(tensors)
        tensors["surplus"] = torch.ones(1)
        tensors[names[1]] = torch.ones(5, 5)
        tensors[names[2]] = torch.full_like(tensors[names[2]], torch.inf)
        tensors[names[3]] = tensors[names[3]].long()
        del tensors[names[0]]

    names = sorted(load_file(tmp_path / WEIGHTS))
    change_tensors(tmp_path, spoil)
    with pytest.raises(LoadError) as caught:
        molora.load(tiny_llama(seed=1), tmp_path)
    text = str(caught.value)
    for part in (
        "the base weight 'lm_head.weight' has other values",
        f"tensor '{names[0]}' is missing",
        f"tensor '{names[1]}' has shape (5, 5)",
        f"tensor '{names[2]}' holds NaN or Inf",
        f"tensor '{names[3]}' has dtype I64",
        "tensor 'surplus' is unexpected",
    ):
        assert part in text
    # PEFT's own door lists the tensors, or names the base: it cannot know both
    with pytest.raises(LoadError, match="another base"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)
    with pytest.raises(LoadError) as caught:
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for part in ("is missing", "has shape (5, 5)", "holds NaN or Inf", "'surplus' is unexpected"):
        assert part in str(caught.value)


def test_base_weights_in_the_file_are_refused(tmp_path):
    """A file must not smuggle changes of the frozen base in; PEFT would copy them."""
    molora.save(wrapped(), tmp_path)
    name = "base_model.model.model.norm.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(32)}))
    for load in (molora.load, PeftModel.from_pretrained):
        with pytest.raises(LoadError, match=r"norm.weight' is unexpected"):
            load(tiny_llama(), tmp_path)


def test_resized_embeddings_are_loaded_with_the_adapter(tmp_path):
    """PEFT saves the embeddings of a base whose vocabulary was resized; they replace those of the base."""
    tiny_llama().save_pretrained(tmp_path / "base")

    def resized():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(100)
        return base

    model = wrapped(base=resized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        molora.save(model, tmp_path / "adapter")
    assert sum("molora_" not in name for name in load_file(tmp_path / "adapter" / WEIGHTS)) == 2
    base = resized()
    torch.nn.init.normal_(base.get_input_embeddings().weight[96:])  # the new rows are random each time
    assert torch.equal(logits(molora.load(base, tmp_path / "adapter")), logits(model))


# --- several adapters -------------------------------------------------------------------------------------------------


def test_adapters_side_by_side_save_only_their_own_tensors(tmp_path):
    """The second one is on other layers, of another form and routing."""
    first = wrapped(target_modules=["q_proj", "v_proj"])
    molora.save(first, tmp_path / "alone")
    keys = set(load_file(tmp_path / "alone" / WEIGHTS))
    second = {
        "experts": {"form": "rank", "rank": 1, "num": 4},
        "share": "block",
        "target_modules": ["up_proj", "q_proj"],
    }
    alone = wrapped(seed=3, recipe=second)
    molora.save(alone, tmp_path / "second alone")
    second_keys = set(load_file(tmp_path / "second alone" / WEIGHTS))
    assert keys - second_keys and second_keys - keys and keys & second_keys

    both = molora.load(first, tmp_path / "second alone", "second")
    want = {"default": logits(wrapped(target_modules=["q_proj", "v_proj"])), "second": logits(alone)}
    for name in ("default", "second", "default"):
        both.set_adapter(name)
        assert torch.equal(logits(both), want[name])
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(tiny_llama()))
    for name, expected in (("default", keys), ("second", second_keys)):
        molora.save(both, tmp_path / name, adapter=name)
        assert set(load_file(tmp_path / name / WEIGHTS)) == expected
        assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / name)), want[name])
    # PEFT's own save puts the second into a folder of its own
    both.save_pretrained(tmp_path / "peft")
    assert set(load_file(tmp_path / "peft" / WEIGHTS)) == keys
    assert set(load_file(tmp_path / "peft" / "second" / WEIGHTS)) == second_keys

    both.set_adapter("second")
    both.delete_adapter("default")
    assert torch.equal(logits(both), want["second"]) and set(trace_of(both).plans) == {"second"}
    with pytest.raises(ConfigError, match="'default' is unknown; the model has: second"):
        molora.report(both)
    molora.save(both, tmp_path / "left", adapter="second")
    assert set(load_file(tmp_path / "left" / WEIGHTS)) == second_keys
    again = molora.load(both, tmp_path / "alone")
    again.set_adapter("default")
    assert torch.equal(logits(again), want["default"])


@pytest.mark.parametrize("name", ["mlp", "0", "self_attn", "q_proj", "", "a.b", "molora_bank", "weight"])
def test_adapter_names_that_are_part_of_a_path_are_refused(name, tmp_path):
    molora.save(wrapped(), tmp_path)
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(ConfigError, match="not safe"):
        molora.wrap(base, RECIPE, adapter_name=name)
    with pytest.raises(ConfigError, match="not safe"):
        molora.load(base, tmp_path, name)
    assert anatomy(base) == before
    model = wrapped()
    with pytest.raises(ConfigError, match="not safe"):
        model.add_adapter(name, MoloraConfig(**RECIPE))
    with pytest.raises(ConfigError, match="not safe"):
        molora.load(model, tmp_path, name)
    assert list(model.peft_config) == ["default"]


def test_what_unsafe_names_do_in_peft(tmp_path):
    """The failure that the refusal prevents: an adapter called `mlp` deletes tensors of another one at save."""
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "alone")
    model.add_adapter("mlp", copy.deepcopy(config))
    model.save_pretrained(tmp_path / "with", selected_adapters=["default"])
    counts = [len(load_file(tmp_path / name / WEIGHTS)) for name in ("alone", "with")]
    assert counts == [8, 4]


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["Linear", "Conv1D"])
def test_a_single_expert_merges_and_unmerges(build, tmp_path):
    model = wrapped(recipe="lora", base=build())
    want = logits(model)
    weights = {name: p.clone() for name, p in build().named_parameters()}
    model.merge_adapter()
    assert torch.allclose(logits(model), want, atol=1e-5, rtol=0)
    changed = [name for name, p in model.get_base_model().named_parameters() if "base_layer.weight" in name]
    assert changed
    for name in changed:  # by the plain formula, from the tensors
        layer = model.get_base_model().get_submodule(name.removesuffix(".base_layer.weight"))
        bank = layer.molora_bank["default"]
        delta = bank.scaling * bank.B @ bank.A
        old = weights[name.replace(".base_layer", "")]
        delta = delta if old.shape == delta.shape and build is tiny_llama else delta.T
        assert torch.allclose(layer.base_layer.weight, old + delta, atol=1e-6)
    with model.disable_adapter():  # disabled means the base, merged or not
        assert torch.allclose(logits(model), logits(build()), atol=1e-5, rtol=0)
    assert torch.allclose(logits(model), want, atol=1e-5, rtol=0)
    model.merge_adapter()
    model.unmerge_adapter()
    for name in changed:
        got = model.get_base_model().get_parameter(name)
        assert torch.allclose(got, weights[name.replace(".base_layer", "")], atol=1e-6)
    plain = model.merge_and_unload()
    assert not any("molora" in name for name, _ in plain.named_modules())
    assert torch.allclose(logits(plain), want, atol=1e-5, rtol=0)


def test_a_fixed_mixture_merges(tmp_path):
    """The gates of a constant scorer do not depend on the input, so one weight equals the mixture."""
    model = wrapped(recipe=RECIPE | {"scorer": "constant"})
    want = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), want, atol=1e-5, rtol=0)


def test_a_routed_mixture_is_not_merged():
    model = wrapped()
    said = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError) as caught:
            merge()
        for part in ("adapter 'default' routes by its input", "export_peft(model, path, expert=i)", "gates=[...]"):
            assert part in str(caught.value)
    assert torch.equal(logits(model), said)
    with pytest.raises(ConfigError, match="routes by its input"):
        wrapped(recipe="milora").merge_adapter()


# --- kinds of bases, training -----------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = tiny_inputs(tiny_bases["model"], batch=1, length=6, seed=index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


tiny_bases = {"model": tiny_llama()}


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    """A base whose sizes are whole blocks of 64 for 4-bit."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(folder)
    return folder


def base_of(folder, kind):
    # With outliers kept apart (the default threshold of 6), an 8-bit token depends on the other tokens of the batch, so
    # that a plain 8-bit model already generates differently with and without a cache.
    options = {
        "fp32": {},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "8bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }[kind]
    quantization = BitsAndBytesConfig(**options) if options else None
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32).eval()


def arguments(folder, steps, **options):
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_strategy": "no", **options},
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["fp32", "4bit", "8bit"])
def test_trains_saves_and_generates_on_every_kind_of_base(kind, checkpointing, saved_base, tmp_path):
    base = base_of(saved_base, kind)
    # 4-bit layers that run in eval mode before they are wrapped may be rounded (see keep_4bit_layout); 8-bit ones
    # compute in another way in train mode
    plain = logits(base.train(kind == "4bit"))
    model = molora.wrap(base, "dynmole", experts={"num": 4, "rank": 2})
    assert torch.equal(logits(model.eval()), plain)  # a fresh adapter changes nothing
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = Trainer(model, arguments(tmp_path / "run", 3, **(options if checkpointing else {})), train_dataset=Rows())
    molora.attach(trainer).train()
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before}
    assert all(moved.values())
    trained = logits(model.eval())
    assert torch.equal(logits(copy.deepcopy(model)), trained)
    if not checkpointing:  # transformers hooks a local function in for it, which no pickle holds
        assert torch.equal(logits(pickle.loads(pickle.dumps(model))), trained)
    assert (trained - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)

    molora.save(model, tmp_path / "adapter")
    assert torch.equal(logits(model), trained)  # saving has not touched the base
    again = molora.load(base_of(saved_base, kind), tmp_path / "adapter")
    assert (logits(again) - trained).abs().max() == 0.0
    prompt = tiny_inputs(base, length=5)
    out = [again.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*out) and out[0].shape == (2, 11)
    if kind != "fp32":
        with pytest.raises(ConfigError, match=f"the base layers are Linear{kind[0]}.*: merging would round twice"):
            again.merge_adapter()
        lora = molora.wrap(base_of(saved_base, kind), "lora")
        with pytest.raises(ConfigError, match="merging would round twice"):
            lora.merge_and_unload()
        # the quantised base is the same base as the full one
        full = molora.load(base_of(saved_base, "fp32"), tmp_path / "adapter")
        assert not torch.equal(logits(full), logits(base_of(saved_base, "fp32")))


def test_a_run_resumed_by_the_trainer_ends_like_an_unbroken_one(tmp_path):
    """Trainer loads the checkpoint through PeftModel.load_adapter; routers, experts and prices must all come back."""
    recipe = RECIPE | {"price": {"name": "sign", "rate": 0.01}, "losses": [{"name": "switch_balance", "weight": 0.1}]}

    def trainer(folder, steps):
        torch.manual_seed(0)
        model = molora.wrap(tiny_llama(), recipe)
        args = arguments(folder, 4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        made = molora.attach(Trainer(model, args, train_dataset=Rows()))
        made.args.max_steps = steps
        return made

    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "broken", 2).train()
    resumed = trainer(tmp_path / "broken", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    files = sorted(p.name for p in (tmp_path / "broken" / "checkpoint-4").iterdir())
    assert WEIGHTS in files and CONFIG in files and "model.safetensors" not in files
    assert resumed.state.global_step == 4
    left, right = (load_file(tmp_path / name / "checkpoint-4" / WEIGHTS) for name in ("whole", "broken"))
    assert left.keys() == right.keys() and any("price" in name for name in left)
    for name in left:
        assert torch.equal(left[name], right[name]), name
    # a damaged checkpoint is an error on resume, too
    change_tensors(tmp_path / "broken" / "checkpoint-2", lambda tensors: tensors.popitem())
    with pytest.raises(LoadError, match="is missing"):
        trainer(tmp_path / "broken", 4).train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
