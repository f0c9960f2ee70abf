"""Adapters as other people save them: each computes what PEFT computes with it, or is refused with the way out."""

import json
import shutil
import warnings

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file

import molora
from molora import LoadError
from molora.hub.effect import proof_of_effect
from molora.hub.store import Hub
from molora.hub.verify import check_folder
from tests.adapters import CONFIG, WEIGHTS, change_config, change_tensors, logits
from tests.test_interchange import peft_lora
from tests.tiny import SPECIAL, VOCAB, tiny_bert_classifier, tiny_gpt2, tiny_inputs, tiny_llama


def small(model_class, config_class):
    """A builder of a decoder of another family, as those in tests/tiny.py."""

    def build(seed=0, **changes):
        sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(config_class(**(sizes | heads | SPECIAL | changes))).float().eval()

    return build


gemma = small(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig)  # its embedding is its head
qwen2 = small(tf.Qwen2ForCausalLM, tf.Qwen2Config)  # biases on q, k and v
qwen3 = small(tf.Qwen3ForCausalLM, tf.Qwen3Config)
phi3 = small(tf.Phi3ForCausalLM, tf.Phi3Config)  # qkv_proj and gate_up_proj

PATTERNS = {
    "rank_pattern": {"^model.layers.0.self_attn.q_proj$": 6, "k_proj": 1, r".*\.1\..*v_proj": 2},
    "alpha_pattern": {"q_proj": 5, "layers.1.self_attn.k_proj": 3},
}
# what newer versions of PEFT write and older ones do not know, all of it off; and what bitsandbytes leaves behind
NEWER = {"key_of_tomorrow": None, "other_config": {}, "use_something": False, "a_list": [], "peft_version": "9.9.9"}
GOOD = {
    "all-linear": (tiny_llama, {"target_modules": "all-linear", "use_rslora": True}, {}),
    "patterns": (tiny_llama, {"target_modules": ["q_proj", "k_proj", "v_proj"], **PATTERNS}, {}),
    "regex": (tiny_llama, {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"}, {}),
    "some layers": (tiny_llama, {"layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "excluded": (tiny_llama, {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, {}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {}),
    "gemma": (gemma, {"target_modules": "all-linear"}, {}),
    "qwen2": (qwen2, {"target_modules": "all-linear"}, {}),
    "qwen3": (qwen3, {"target_modules": "all-linear"}, {}),
    "phi3": (phi3, {"target_modules": "all-linear"}, {}),
    "gaussian": (tiny_llama, {"init_lora_weights": "gaussian"}, {}),
    "orthogonal": (tiny_llama, {"init_lora_weights": "orthogonal"}, {}),
    "mica": (tiny_llama, {"init_lora_weights": "mica"}, {}),
    "eva": (tiny_llama, {}, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}),
    "newer": (tiny_llama, {}, NEWER),
    "loftq's default": (tiny_llama, {}, {"loftq_config": {"loftq_bits": 4}}),
}


def mixed(make, base, folder):
    """What the one expert of a mixture answers."""
    model = make(base, [folder]).eval()
    with molora.pin(model, torch.ones(1)):
        return logits(model)


def is_what_peft_says(folder, build):
    want = logits(PeftModel.from_pretrained(build(), folder).eval())
    assert (want - logits(build())).abs().max() > 1e-4  # it does something
    for make in (molora.import_peft, molora.compose):
        assert (mixed(make, build(), folder) - want).abs().max() <= 2e-6 * max(1, want.abs().max())


DTYPES = [("all-linear", torch.bfloat16), ("all-linear", torch.float16), ("gpt2", torch.bfloat16)]  # of the file


@pytest.mark.parametrize(("name", "dtype"), [(name, torch.float32) for name in GOOD] + DTYPES)
def test_it_computes_what_peft_does(name, dtype, tmp_path):
    build, options, changes = GOOD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = peft_lora(tmp_path / "lora", 1, build, dtype, **options)
        change_config(folder, **changes)
        assert check_folder(folder, base=build()).ok
        is_what_peft_says(folder, build)


# --- weights of the base beside the LoRA ------------------------------------------------------------------------------

# what PEFT is told when it saves -> what it saves of the base
SAVED = {
    "embeddings": (tiny_llama, {}, {"save_embedding_layers": True}, "lm_head, model.embed_tokens"),
    "one weight for both": (gemma, {}, {"save_embedding_layers": True}, "lm_head, model.embed_tokens"),
    "whole modules": (tiny_llama, {"modules_to_save": ["lm_head", "embed_tokens"]}, {}, "lm_head, model.embed_tokens"),
    "a head": (
        tiny_bert_classifier,
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {},
        "classifier, classifier.bias",
    ),
}


HEAD = ("base_model.model.classifier.weight", "base_model.model.classifier.bias")


def beside(folder, build, options, how):
    """Save a LoRA with what `how` makes PEFT save beside it."""
    peft_lora(folder, 1, build, **options)
    if how:
        PeftModel.from_pretrained(build(), folder).save_pretrained(folder, **how)
    return folder


@pytest.mark.parametrize("case", SAVED)
def test_what_peft_saves_of_an_unchanged_base_changes_nothing(case, tmp_path):
    build, options, how, paths = SAVED[case]
    folder = beside(tmp_path / "lora", build, options, how)
    extra = sorted(name for name in load_file(folder / WEIGHTS) if "lora_" not in name)
    assert extra  # or this would prove nothing
    is_what_peft_says(folder, build)
    (note,) = molora.report(molora.compose(build(), [folder])).notes
    assert note == f"'lora' also holds the base's own weight of {paths}, which stays as it is"
    # one value of one of them makes it another model
    for name in extra:
        whole = (folder / WEIGHTS).read_bytes()
        change_tensors(folder, lambda tensors, name=name: tensors[name].view(-1)[:1].add_(2**-10))
        with pytest.raises(LoadError, match=rf"'{name}' differs from the base's own by up to 0.000977.*into the base"):
            molora.compose(build(), [folder])
        (folder / WEIGHTS).write_bytes(whole)


def test_a_trained_head_that_is_put_into_the_base_first_is_the_bases_own(tmp_path):
    """The way out that the refusal names."""
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    folder = peft_lora(tmp_path / "lora", 1, tiny_bert_classifier, **options)
    change_tensors(folder, lambda tensors: tensors["base_model.model.classifier.weight"].add_(0.5))
    want = logits(PeftModel.from_pretrained(tiny_bert_classifier(), folder).eval())
    base = tiny_bert_classifier()
    with pytest.raises(LoadError, match="copy it into the base first"):
        molora.compose(base, [folder])
    base.classifier.weight.data.copy_(load_file(folder / WEIGHTS)["base_model.model.classifier.weight"])
    assert (mixed(molora.compose, base, folder) - want).abs().max() < 1e-6


def test_a_head_that_peft_trains_in_this_model_is_not_the_bases_own(tmp_path):
    folder = peft_lora(tmp_path / "lora", 1, modules_to_save=["lm_head"])
    change_tensors(folder, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(0.5))
    loaded = PeftModel.from_pretrained(tiny_llama(), folder)  # its lm_head answers with the trained copy
    from molora.base_weights import copy_problems

    names = {"lm_head": "base_model.model.lm_head.weight"}
    assert copy_problems(names, load_file(folder / WEIGHTS).items(), loaded.get_base_model())


@pytest.mark.parametrize("case", [case for case in SAVED if case != "a head"])
def test_a_library_leaves_out_what_the_base_has_anyway(case, tmp_path):
    build, options, how, _ = SAVED[case]
    folder, hub = beside(tmp_path / "lora", build, options, how), Hub(tmp_path / "hub")
    want = logits(PeftModel.from_pretrained(build(), folder).eval())
    with pytest.raises(LoadError, match=r"cannot|was not added"):
        hub.add(folder, "one")  # without the base nobody knows
    assert check_folder(folder, base=build()).ok
    probe = dict(tiny_inputs(build()))
    assert not proof_of_effect(build(), folder, [probe]).problems
    with pytest.warns(UserWarning, match="left out, since the base has the same: base_model.model"):
        entry = hub.add(folder, "one", base_model=build(), probes=[probe])
    assert not any("lora_" not in name for name in load_file(entry.folder / WEIGHTS))
    assert hub.verify() == {entry.ref: []}
    assert torch.equal(logits(PeftModel.from_pretrained(build(), entry.folder).eval()), want)
    assert not json.loads((entry.folder / CONFIG).read_text()).get("modules_to_save")
    assert (folder / WEIGHTS).stat().st_size > entry.bytes  # what was given is as it was
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing more is left out
        again = hub.add(entry.folder, "two", base_model=build())
    assert again.digest == entry.digest


def test_a_library_takes_no_classifier_whose_head_peft_wants(tmp_path):
    folder, hub = peft_lora(tmp_path / "lora", 1, tiny_bert_classifier, **SAVED["a head"][1]), Hub(tmp_path / "hub")
    change_tensors(copy := shutil.copytree(folder, tmp_path / "bare"), lambda t: [t.pop(n) for n in HEAD])
    with pytest.raises(KeyError, match=r"classifier\.weight"):
        PeftModel.from_pretrained(tiny_bert_classifier(), copy)  # so leaving it out would make it useless
    with pytest.raises(
        LoadError, match=r"no SEQ_CLS adapter without its head \(classifier, classifier.bias\).*compose"
    ):
        hub.add(folder, "one", base_model=tiny_bert_classifier())
    assert not hub.list()


def test_a_library_takes_no_trained_head(tmp_path):
    folder, hub = peft_lora(tmp_path / "lora", 1, modules_to_save=["lm_head"]), Hub(tmp_path / "hub")
    change_tensors(folder, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(0.5))
    with pytest.raises(LoadError, match=r"was not added: tensor 'base_model.model.lm_head.weight' differs"):
        hub.add(folder, "one", base_model=tiny_llama())
    assert not hub.list()


# --- refusals that say what to do -------------------------------------------------------------------------------------


def renamed(change):
    def apply(folder):
        change_tensors(folder, lambda t: [t.update({change(name): t.pop(name)}) for name in list(t)])

    return apply


def sharded(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for number, name in enumerate(tensors, 1):
        save_file({name: tensors[name]}, folder / f"adapter_model-{number:05}-of-{len(tensors):05}.safetensors")


INSIDE = r"the model has no linear layer '{}model.layers.0.self_attn.q_proj', but 'model.layers.0.self_attn.q_proj': "
REFUSED = {
    "adapter's name": (renamed(lambda n: n.replace(".weight", ".news.weight")), "take '.news' out of the name"),
    "compiled": (
        renamed(lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.")),
        INSIDE.format("_orig_mod.") + "'_orig_mod' was wrapped around the model; save the LoRA from what is inside",
    ),
    "prefix twice": (renamed(lambda n: f"base_model.model.{n}"), "'base_model.model' was wrapped around the model"),
    "sharded": (
        sharded,
        "adapter_model.safetensors is missing; 'adapter_model-00001-of-00004.safetensors' and 3 more is there, which "
        "PEFT does not read either: save all tensors as one",
    ),
    "loftq": (lambda f: change_config(f, init_lora_weights="loftq"), "convert it with PEFT's save_pretrained"),
    "olora": (lambda f: change_config(f, init_lora_weights="olora"), "convert it with PEFT's save_pretrained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_what_to_do(case, tmp_path):
    spoil, says = REFUSED[case]
    spoil(peft_lora(tmp_path / "lora", 1))
    for make in (molora.import_peft, molora.compose):
        with pytest.raises(LoadError) as caught:
            make(tiny_llama(), [tmp_path / "lora"])
        assert says in str(caught.value)


def test_a_lora_of_the_model_around_and_of_the_model_inside(tmp_path):
    with pytest.raises(LoadError, match="holds this one as 'model'; load the base as that"):
        molora.compose(tiny_llama().model, [peft_lora(tmp_path / "around")])
    inside = peft_lora(tmp_path / "inside", build=lambda: tiny_llama().model)
    with pytest.raises(LoadError, match="the LoRA is of the model inside, 'model'; give that"):
        molora.compose(tiny_llama(), [inside])


def test_many_problems_of_one_kind_are_told_briefly(tmp_path):
    """An adapter of another base has one in every layer, which nobody reads."""
    other = peft_lora(tmp_path / "other", build=lambda: tiny_llama(hidden_size=64), target_modules="all-linear")
    deep = peft_lora(tmp_path / "deep", build=lambda: tiny_llama(num_hidden_layers=9), target_modules=["q_proj"])
    dora = peft_lora(tmp_path / "dora", target_modules="all-linear", use_dora=True)
    for folder, number in ((other, 13), (deep, 6), (dora, 13)):
        with pytest.raises(LoadError, match=rf"\(and {number} more like it\)") as caught:
            molora.compose(tiny_llama(), [folder])
        assert len(str(caught.value).splitlines()) <= 3
