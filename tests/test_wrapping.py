"""wrap on the models that users try first: heads that start at random, and models that read sound."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel

import molora
from molora.layers import RoutedLayer
from molora.wrapping import heads_of, task_type_of
from tests.tiny import BOS, EOS, PAD, SPECIAL, VOCAB, _build, tiny_bert_classifier, tiny_llama, tiny_vit_classifier

SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
NARROW = dict(vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=PAD)
PAIRED = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    **SPECIAL,
)
# model: (class, config, what is trained whole beside the experts)
HEADS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**SIZES), ["classifier"]),
    "bert tokens": (tf.BertForTokenClassification, tf.BertConfig(**SIZES), ["classifier"]),
    "bert answers": (tf.BertForQuestionAnswering, tf.BertConfig(**SIZES), ["qa_outputs"]),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(**NARROW),
        ["pre_classifier", "classifier"],
    ),
    "distilbert answers": (tf.DistilBertForQuestionAnswering, tf.DistilBertConfig(**NARROW), ["qa_outputs"]),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**SIZES, pad_token_id=PAD), ["classifier"]),
    "roberta tokens": (tf.RobertaForTokenClassification, tf.RobertaConfig(**SIZES, pad_token_id=PAD), ["classifier"]),
    "deberta": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**SIZES), ["pooler", "classifier"]),
    "bart": (
        tf.BartForSequenceClassification,
        tf.BartConfig(**PAIRED, decoder_start_token_id=EOS),
        ["classification_head"],
    ),
    "llama": (tf.LlamaForSequenceClassification, tf.LlamaConfig(**SIZES, **SPECIAL), ["score"]),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        ["classifier"],
    ),
}


def inputs_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    ids = torch.randint(4, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = EOS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer(model):
    with torch.no_grad():
        out = model.eval()(**inputs_of(model))
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])


def trained_modules(model):
    return {
        name.removeprefix("base_model.model.").partition(".modules_to_save")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "molora_" not in name
    }


@pytest.mark.parametrize("kind", HEADS)
def test_an_adapter_of_a_classifier_holds_all_that_a_backbone_lacks(kind, tmp_path):
    """Loaded again over the same backbone with other random heads, it answers as it did."""
    cls, config, heads = HEADS[kind]
    base = _build(cls, config, 0)
    other = copy.deepcopy(base)
    for name, parameter in other.named_parameters():
        if not name.startswith(f"{base.base_model_prefix}."):
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    model = molora.wrap(base, "dynmole")
    assert trained_modules(model) == set(heads)
    assert not any("molora_" in name for name, _ in model.named_modules() if name.split(".")[2:3] == heads[-1:])
    for number, (_, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    wanted = answer(model)
    molora.save(model, tmp_path)
    torch.testing.assert_close(answer(molora.load(copy.deepcopy(other), tmp_path)), wanted)
    torch.testing.assert_close(answer(PeftModel.from_pretrained(other, str(tmp_path))), wanted)


def test_heads_are_named_once_and_only_where_peft_does_not():
    assert heads_of(tiny_bert_classifier(), "SEQ_CLS") == [] == heads_of(tiny_llama(), "CAUSAL_LM")
    assert heads_of(tiny_vit_classifier(), None) == ["classifier"]
    model = molora.wrap(_build(tf.BertForTokenClassification, tf.BertConfig(**SIZES), 0), "dynmole")
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_a_head_that_is_asked_for_by_name_is_routed():
    base = _build(tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**SIZES), 0)
    model = molora.wrap(base, "dynmole", target_modules=["query_proj", "pooler.dense"])
    assert "pooler.dense" in molora.report(model).wrapped
    assert trained_modules(model) == {"classifier"}


def test_what_else_is_to_be_saved_stays():
    model = molora.wrap(_build(*HEADS["distilbert"][:2], 0), "dynmole", modules_to_save=["embeddings"])
    assert {"embeddings", "pre_classifier", "classifier"} <= set(model.peft_config["default"].modules_to_save)


def tiny_whisper():
    sizes = dict(num_mel_bins=16, max_source_positions=20, max_target_positions=40, decoder_start_token_id=BOS)
    free = dict(suppress_tokens=[], begin_suppress_tokens=[])
    return _build(tf.WhisperForConditionalGeneration, tf.WhisperConfig(**PAIRED, **sizes, **free), 0)


def test_a_model_that_reads_sound():
    """PEFT's class for sequence to sequence hands out input_ids, which Whisper does not take."""
    base = tiny_whisper()
    assert task_type_of(base) is None
    sound, labels = torch.randn(2, 16, 40), torch.randint(4, VOCAB, (2, 6))
    wanted = base(input_features=sound, labels=labels).loss
    tokens = base.generate(input_features=sound, max_new_tokens=4)
    model = molora.wrap(base, "dynmole")
    out = model(input_features=sound, labels=labels)
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    assert torch.equal(model.generate(input_features=sound, max_new_tokens=4), tokens)


def test_falcon_which_adds_into_the_output_of_a_layer():
    config = tf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SPECIAL)
    model = molora.wrap(_build(tf.FalconForCausalLM, config, 0), "dynmole").train()
    ids = inputs_of(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if name.endswith(".Bt")]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def tiny_opt():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    return _build(tf.OPTForCausalLM, tf.OPTConfig(**sizes, word_embed_proj_dim=32, **SPECIAL), 0)


def tiny_bart():
    return _build(tf.BartForConditionalGeneration, tf.BartConfig(**PAIRED, decoder_start_token_id=EOS), 0)


@pytest.mark.parametrize(("recipe", "changes"), [("milora", {}), ("mola", {"share": "group"})])
@pytest.mark.parametrize("build", [tiny_opt, tiny_bart, tiny_whisper])
def test_a_shared_decision_is_taken_by_the_layer_that_runs_first(build, recipe, changes):
    """These define k_proj before q_proj, and run q_proj before k_proj."""
    base = build()
    inputs = {"labels": torch.randint(4, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))}
    if base.main_input_name == "input_features":
        inputs["input_features"] = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    else:
        inputs["input_ids"] = inputs["labels"]
    wanted = base(**inputs).loss
    model = molora.wrap(base, recipe, **changes)
    sites = [layer.sites["default"] for layer in model.modules() if isinstance(layer, RoutedLayer)]
    shared = {site.group for site in sites if site.shared}
    leaders = {site.name.rpartition(".")[2] for site in sites if site.leads and site.shared}
    # the keys and values of cross-attention read the encoder, so no query stands beside them
    assert shared and leaders <= {"q_proj", "k_proj"} and "q_proj" in leaders
    assert build is not tiny_opt or leaders == {"q_proj"}
    torch.testing.assert_close(model.eval()(**inputs).loss, wanted)
    model.train()(**inputs).loss.backward()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["query"],
            r"target_modules=\['query'\] match no layer of LlamaForCausalLM; .*called down_proj, .*'all-linear'",
        ),
        ("q_proj", r"target_modules='q_proj' match no layer.*regular expression of whole paths"),
        ([], r"target_modules=\[\] match no layer"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    base = tiny_llama()
    with pytest.raises(molora.ConfigError, match=message):
        molora.wrap(base, "mola", target_modules=targets)
    assert not any("molora" in name for name, _ in base.named_modules())  # and it can be wrapped still


def test_targets_that_are_all_kept_out():
    with pytest.raises(molora.ConfigError, match="that exclude_modules or modules_to_save keep out"):
        molora.wrap(tiny_llama(), "mola", target_modules=["q_proj"], exclude_modules=["q_proj"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"target_modules 'v_prj' \(did you mean 'v_proj'\?\)"),
        ({"exclude_modules": ["up_prj"]}, r"exclude_modules 'up_prj' \(did you mean 'up_proj'\?\)"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save 'lm_haed' \(did you mean 'lm_head'\?\)"),
        ({"layers": [{"match": r"layers\.9\.", "experts": {"rank": 2}}]}, r"layers.match 'layers\\.9\\.'"),
    ],
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_what_is_named_in_vain_is_said(changes, message):
    with pytest.warns(UserWarning, match=f"matched nothing in LlamaForCausalLM: {message}"):
        molora.wrap(tiny_llama(), "mola", **changes)


@pytest.mark.parametrize("recipe", ["mov", "router_tuning", "post_moe"])
def test_recipes_name_layers_of_several_architectures_in_silence(recipe, recwarn):
    molora.wrap(tiny_llama(), recipe)
    assert not [str(w.message) for w in recwarn if "matched nothing" in str(w.message)]


def test_weighted_adapters_are_refused_with_what_works_instead():
    model = molora.wrap(tiny_llama(), "mola")
    model.add_adapter("second", molora.MoloraConfig.from_recipe("lora"))
    with pytest.raises(molora.ConfigError, match=r"cannot be added up.*set_adapter\(\[.*export_peft.*compose"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


def tiny_deberta_v3():
    """Its keys and queries also read the positions, as one row of their own."""
    positions = dict(relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
    return _build(tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**SIZES, **positions), 0)


@pytest.mark.parametrize("recipe", ["poly", "home", "rmoe"])
def test_layers_that_read_something_else_than_tokens_are_to_be_left_out(recipe):
    inputs = inputs_of(tiny_deberta_v3()) | {"labels": torch.tensor([0, 1])}
    tasks = {} if recipe == "rmoe" else {"task_ids": torch.tensor([0, 1])}
    with pytest.raises(molora.RoutingError, match=r"query_proj and key_proj read positions too.* with exclude_modules"):
        molora.wrap(tiny_deberta_v3(), recipe)(**inputs, **tasks)
    model = molora.wrap(tiny_deberta_v3(), recipe, exclude_modules=["query_proj", "key_proj"])
    model(**inputs, **tasks).loss.backward()
