"""The assumptions about PEFT, transformers and bitsandbytes in molora/compat: each fails here when they change."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from peft import PeftModel, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import molora
from molora import MoloraConfig
from molora.compat.caches import tokens_in_cache
from molora.compat.layers import PLAIN_LINEARS, keep_4bit_layout, linear_sizes, linear_sizes_of, module_paths
from molora.compat.models import (
    add_output,
    checkpointing_is_on,
    embeddings_of,
    encoder_of,
    is_encoder_decoder,
    labels_are_shifted,
    stack_of,
)
from molora.compat.registration import MOLORA, PREFIX
from molora.layers import RoutedLinear
from molora.tuner import MoloraModel
from tests.adapters import RECIPE, wrapped
from tests.tiny import (
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_inputs,
    tiny_llama,
    tiny_mamba,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_vit_classifier,
)

# --- registration -----------------------------------------------------------------------------------------------------


def test_the_type_is_in_the_three_tables_of_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOLORA"] is MoloraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOLORA"] is MoloraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["MOLORA"] == "molora_"


def test_a_type_outside_of_the_enum_passes_where_peft_reads_its_value():
    """PEFT and transformers read `peft_type.value`, compare with strings and write JSON."""
    assert MOLORA.value == "MOLORA" == MOLORA and hash(MOLORA) == hash("MOLORA")
    assert json.dumps({"peft_type": MOLORA}) == '{"peft_type": "MOLORA"}'
    for copied in (copy.deepcopy(MOLORA), pickle.loads(pickle.dumps(MOLORA))):
        assert copied.value == "MOLORA"
    model = wrapped()
    assert model.peft_type.value == "MOLORA"
    model.set_requires_grad("default", False)  # reads active_peft_config.is_prompt_learning and peft_type
    assert not any(p.requires_grad for p in model.parameters())


def test_the_prefix_is_the_type_in_lower_case(tmp_path):
    """transformers builds the prefix that way in delete_adapter, and PEFT looks for it in parameter names."""
    assert MoloraModel.prefix == PREFIX == MOLORA.value.lower() + "_"
    assert all(name.startswith(PREFIX) for name in RoutedLinear.adapter_layer_names)
    molora.save(wrapped(), tmp_path)
    native = tiny_llama()
    native.load_adapter(str(tmp_path))
    assert any("molora_" in name for name, _ in native.named_parameters())
    native.delete_adapter("default")
    assert not any("molora_" in name for name, _ in native.named_parameters())


def test_the_methods_that_we_override_are_still_called_by_peft():
    """They are internal to PEFT: same names, same arguments."""
    for name, arguments in {
        "_get_adapter_state_dict": ["model", "config", "adapter_name", "state_dict"],
        "_remove_adapter_name_from_key": ["key", "adapter_name"],
        "_remap_adapter_state_dict_for_load": ["model", "config", "adapter_name", "state_dict"],
        "_cast_adapter_dtype": ["self", "adapter_name", "autocast_adapter_dtype"],
        "_check_merge_allowed": ["self"],
        "_check_target_module_compatiblity": ["self", "peft_config", "model", "target_name"],
        "inject_adapter": ["self", "model", "adapter_name"],
        "delete_adapter": ["self", "adapter_name"],
    }.items():
        assert list(inspect.signature(getattr(BaseTuner, name)).parameters)[: len(arguments)] == arguments
        assert getattr(MoloraModel, name) is not getattr(BaseTuner, name)
    source = inspect.getsource(get_peft_model_state_dict)
    assert "_get_adapter_state_dict(" in source and "_remove_adapter_name_from_key(" in source
    assert "_remap_adapter_state_dict_for_load(" in inspect.getsource(set_peft_model_state_dict)
    # PEFT swallows adapter_names= unless the tuner has this method
    assert "_enable_peft_forward_hooks" in inspect.getsource(PeftModel._enable_peft_forward_hooks)
    for name in ("_freeze_non_trainable_peft_weights", "_move_adapter_to_device_of_base_layer"):
        assert hasattr(BaseTunerLayer, name)
    assert "special_peft_forward_args" in inspect.getsource(PeftModel.generate)


def test_task_types_are_pefts():
    for build in (tiny_llama, tiny_gpt2, tiny_t5, tiny_bert_classifier, tiny_mamba):
        task = molora.wrap(build(), RECIPE, experts={"num": 2}).peft_config["default"].task_type
        assert task in list(TaskType)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, shifted", [(tiny_llama, True), (tiny_gpt2, False), (tiny_t5, False), (tiny_bert_classifier, False)]
)
def test_labels_are_counted_as_the_trainer_counts_them(build, shifted, tmp_path):
    model = build()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, dataloader_pin_memory=False)
    trainer = Trainer(molora.wrap(build(), RECIPE), arguments)
    assert labels_are_shifted(model) == shifted == trainer._loss_shifts_labels
    # and as the model's own loss does: the first label matters exactly when labels are not shifted. GPT-2 shifts them,
    # but Trainer goes by the name of the class and counts all: what matters for us is to count like Trainer.
    if build in (tiny_llama, tiny_t5):
        inputs = {**tiny_inputs(model), "labels": tiny_inputs(model)["input_ids"].clone()}
        loss = model(**inputs).loss
        inputs["labels"][:, 0] = -100
        assert torch.equal(model(**inputs).loss, loss) == shifted


def test_conv1d_keeps_its_weight_the_other_way_round():
    layer = Conv1D(5, 3)  # d_out, d_in
    assert layer.weight.shape == (3, 5) and layer.nf == 5
    assert linear_sizes(layer) == (3, 5) == linear_sizes(nn.Linear(3, 5))
    assert layer(torch.zeros(2, 3)).shape == (2, 5)
    assert set(PLAIN_LINEARS) == {nn.Linear, Conv1D} and PLAIN_LINEARS[1] is Conv1D
    assert not isinstance(layer, nn.Linear)


def test_sizes_of_quantised_layers():
    bnb = pytest.importorskip("bitsandbytes")
    assert linear_sizes(bnb.nn.Linear4bit(64, 128)) == (64, 128)
    assert linear_sizes(bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)) == (64, 128)
    assert type(bnb.nn.Linear4bit(64, 64)) not in PLAIN_LINEARS
    other = nn.Module()
    other.qweight, other.in_features, other.out_features = torch.zeros(1), 3, 5
    assert linear_sizes(other) == (3, 5)
    assert linear_sizes(nn.Embedding(3, 5)) is None and linear_sizes(nn.Conv1d(3, 5, 1)) is None


def test_encoders_and_cross_attention():
    model = tiny_t5()
    path, encoder = encoder_of(model)
    assert path == "encoder" and encoder is model.encoder and is_encoder_decoder(model)
    stacks = {
        "encoder.block.0.layer.0.SelfAttention.k": "encoder",
        "decoder.block.0.layer.0.SelfAttention.k": "main",
        "decoder.block.0.layer.1.EncDecAttention.k": "cross",
        "decoder.block.0.layer.1.EncDecAttention.q": "main",
    }
    for layer, stack in stacks.items():
        assert isinstance(model.get_submodule(layer), nn.Linear)
        assert stack_of(layer, path) == stack
    assert encoder_of(tiny_llama()) is None and encoder_of(tiny_bert_classifier()) is None


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba])
def test_tokens_in_a_cache(build):
    model = build()
    inputs = {"input_ids": tiny_inputs(model)["input_ids"]}
    outputs = model(**inputs, use_cache=True)
    cache = getattr(outputs, "past_key_values", None)
    cache = cache if cache is not None else outputs.cache_params
    assert tokens_in_cache(None) == 0
    assert tokens_in_cache(type(cache)(config=model.config)) == 0
    assert tokens_in_cache(cache) == (7 if build is not tiny_mamba else 1)  # a state counts no tokens


def test_outputs_take_fields_that_they_do_not_declare():
    model = tiny_llama()
    outputs = model(**tiny_inputs(model))
    add_output(outputs, "aux_loss", torch.tensor(1.0))
    add_output(outputs, "aux_loss", torch.tensor(2.0))
    assert outputs.aux_loss == outputs["aux_loss"] == 3.0
    outputs = tiny_qwen3_moe()(**tiny_inputs(model), output_router_logits=True)
    own = outputs.aux_loss  # a mixture has its own, which stays in
    add_output(outputs, "aux_loss", torch.tensor(2.0))
    assert torch.equal(outputs.aux_loss, own + 2.0)


def test_checkpointing_is_seen_where_transformers_sets_it():
    model = tiny_llama()
    assert not checkpointing_is_on(model)
    model.gradient_checkpointing_enable()
    assert checkpointing_is_on(model)
    model.gradient_checkpointing_disable()
    assert not checkpointing_is_on(model)


def test_embeddings_are_found_where_there_are_any():
    found = embeddings_of(tiny_llama())
    assert set(found) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(embeddings_of(wrapped())) == {f"base_model.model.{name}" for name in found}
    assert embeddings_of(tiny_vit_classifier()) == {} == embeddings_of(nn.Linear(2, 2))


def test_paths_of_a_wrapped_model_are_those_of_its_base():
    for build in (tiny_llama, tiny_bert_classifier):
        base = build()
        paths = sorted(name for name, _ in base.named_modules() if name)
        assert sorted(module_paths(base)) == paths
        model = wrapped(base=build())
        assert set(module_paths(model.get_base_model())) == set(paths)
        heads = {"classifier"} if build is tiny_bert_classifier else set()
        plain = {k: v for k, v in linear_sizes_of(base).items() if k not in heads}
        wrapped_sizes = linear_sizes_of(model.get_base_model())
        assert plain and {k: v for k, v in wrapped_sizes.items() if k not in heads} == plain


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["", "double quantisation"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after eval"])
def test_4bit_layers_pass_gradients_on_after_evaluation(nested, ran):
    """On some CPUs bitsandbytes repacks weights in eval mode: then backward stops there, and saving breaks them."""
    bnb = pytest.importorskip("bitsandbytes")
    weight, x = torch.randn(128, 256), torch.randn(4, 256)

    def layer():
        made = bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": nested}
        made.weight = bnb.nn.Params4bit(weight.clone(), **options)
        return made.to("cpu")

    want = layer().train()(x.clone().requires_grad_()).detach()
    one = layer().eval()
    packs = ran and one.support_avx512bf16_for_cpu
    if ran:
        one(x)
    if packs:
        with pytest.warns(UserWarning, match="1 4-bit layers had been run in eval mode on this CPU"):
            keep_4bit_layout(one)
    else:
        keep_4bit_layout(one)
    near = dict(rtol=0, atol=0.01 * want.abs().max().item()) if packs else dict(rtol=0, atol=1e-4)
    assert torch.allclose(one(x), want, **near)
    one.state_dict()
    one(x)
    given = x.clone().requires_grad_()
    out = one.train()(given)
    out.sum().backward()
    assert torch.allclose(out, want, **near)
    dense = bnb.functional.dequantize_4bit(layer().weight.data, layer().weight.quant_state)
    assert torch.allclose(given.grad, dense.sum(0).expand(4, -1), atol=0.02 * dense.sum(0).abs().max().item())
