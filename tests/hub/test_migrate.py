"""What others save, read and compared with what others compute: X-LoRA by PEFT, the rest by plain loops."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import molora
from molora.errors import ConfigError, LoadError
from molora.hub.migrate import from_mixlora, from_mttl, from_xlora, gates_from_prompts
from molora.hub.migrate.pickles import read_plain, read_tensors
from molora.posthoc.rerouting import routers_of, sites_of
from tests.adapters import CONFIG, WEIGHTS, anatomy, change_config, change_tensors, logits
from tests.posthoc.mixtures import mixture_of, save_loras
from tests.tiny import tiny_inputs, tiny_llama, tiny_tokenizer

# --- X-LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3, target_modules=["q_proj", "v_proj", "down_proj"])


def peft_xlora(loras, seed=0, **options):
    """PEFT's X-LoRA with a head that prefers something."""
    base = tiny_llama()
    base.config.use_cache = False
    folders = {str(number): str(folder) for number, folder in enumerate(loras)}
    options = {"hidden_size": 32, "xlora_size": 16, "xlora_depth": 2, **options}
    model = get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", adapters=folders, **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def save_whole(model, loras, folder):
    """The layout of PEFT, with the classifier and the LoRAs whole."""
    model.save_pretrained(folder)
    head = model.base_model.internal_xlora_classifier.state_dict()
    save_file({f"base_model.internal_xlora_classifier.{name}": value for name, value in head.items()}, folder / WEIGHTS)
    for number, lora in enumerate(loras):
        for file in (CONFIG, WEIGHTS):
            (folder / str(number) / file).write_bytes((lora / file).read_bytes())
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"xlora_depth": 1},
        {"xlora_depth": 3, "layerwise_scalings": True, "softmax_temperature": 0.6},
        {"xlora_dropout_p": 0.0, "top_k_lora": 2, "global_scaling_weight": 1.4},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "softmax_temperature": 3.0},
    ],
    ids=["one map", "layerwise", "top-k", "softmax of top-k"],
)
def test_an_xlora_folder_of_peft_computes_what_peft_does(loras, tmp_path, options):
    theirs = peft_xlora(loras, **options)
    want = logits(theirs)
    mine = from_xlora(tiny_llama(), save_whole(theirs, loras, tmp_path / "x")).eval()
    assert (want - logits(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(mine), want, atol=5e-6, rtol=5e-6)
    molora.save(mine, tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved")), logits(mine))


def test_a_classifier_with_a_lost_layer_is_refused_and_not_filled_at_random(loras, tmp_path):
    folder, model = save_whole(peft_xlora(loras, xlora_depth=3), loras, tmp_path / "x"), tiny_llama()
    change_tensors(folder, lambda t: [t.pop(name) for name in [*t] if ".layers.0." in name])
    before = anatomy(model)
    with pytest.raises(LoadError, match=r"has 3 linear layers by its config, the file holds layers\.3, layers\.6;"):
        from_xlora(model, folder)
    assert anatomy(model) == before


def test_a_folder_as_this_peft_saves_it_is_read_or_refused_but_never_wrong(loras, tmp_path):
    theirs = peft_xlora(loras)
    theirs.save_pretrained(tmp_path / "x")
    head = {name.rpartition("internal_xlora_classifier.")[2] for name in load_file(tmp_path / "x" / WEIGHTS)}
    if head == set(theirs.base_model.internal_xlora_classifier.state_dict()):
        mine = from_xlora(tiny_llama(), tmp_path / "x", {str(n): lora for n, lora in enumerate(loras)}).eval()
        torch.testing.assert_close(logits(mine), logits(theirs), atol=5e-6, rtol=5e-6)
        return
    with pytest.raises(LoadError) as error:
        from_xlora(tiny_llama(), tmp_path / "x")
    for part in ("2 problems", "folders 0, 1, 2 hold no whole LoRAs", "cannot be restored"):
        assert part in str(error.value)
    save_whole(theirs, [], tmp_path / "x")  # the classifier alone is made whole, the LoRAs are given as they were
    mine = from_xlora(tiny_llama(), tmp_path / "x", {f"lora {n}": lora for n, lora in enumerate(loras)}).eval()
    torch.testing.assert_close(logits(mine), logits(theirs), atol=5e-6, rtol=5e-6)


def test_more_than_ten_adapters_are_in_the_order_of_their_numbers(loras, tmp_path):
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        for file in (CONFIG, WEIGHTS):
            (tmp_path / str(number) / file).write_bytes((loras[number % 3] / file).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "XLORA", "xlora_depth": 1}))
    name = "base_model.internal_xlora_classifier.layers.0"
    bias = torch.zeros(11).index_fill(0, torch.tensor([2]), 60.0)  # the class 2 takes all
    save_file({f"{name}.weight": torch.zeros(11, 32), f"{name}.bias": bias}, tmp_path / WEIGHTS)
    mine = from_xlora(tiny_llama(), tmp_path).eval()
    plain = PeftModel.from_pretrained(tiny_llama(), loras[2]).eval()
    torch.testing.assert_close(logits(mine), logits(plain), atol=5e-6, rtol=5e-6)


def authors_folder(theirs, loras, folder, **config):
    """The layout of the authors' package: adapters under their names, and a config and a classifier of their own."""
    names = ["zebra", "ape", "cat"]
    for name, lora in zip(names, loras, strict=True):
        (folder / "adapters" / name).mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            (folder / "adapters" / name / file).write_bytes((lora / file).read_bytes())
    config = {"adapters": dict.fromkeys(names, "elsewhere"), "xlora_depth": 2, "xlora_size": 16, **config}
    (folder / "xlora_config.json").write_text(json.dumps({"hidden_size": 32, "device": "cpu", **config}))
    head = theirs.base_model.internal_xlora_classifier.state_dict()
    save_file(dict(head), folder / "xlora_classifier.safetensors")
    return folder


def test_a_folder_of_the_authors_package_keeps_the_order_of_its_adapters(loras, tmp_path):
    theirs = peft_xlora(loras)
    folder = authors_folder(theirs, loras, tmp_path, enable_relu_and_dropout=True)
    mine = from_xlora(tiny_llama(), folder).eval()
    torch.testing.assert_close(logits(mine), logits(theirs), atol=5e-6, rtol=5e-6)
    assert list(mine.peft_config["default"].experts["names"]) == ["zebra", "ape", "cat"]


def test_linear_maps_with_nothing_between_are_one_linear_map(loras, tmp_path):
    theirs = peft_xlora(loras)
    folder = authors_folder(theirs, loras, tmp_path, enable_relu_and_dropout=False)
    head = theirs.base_model.internal_xlora_classifier
    head.layers = torch.nn.Sequential(head.layers[0], head.layers[-1])
    mine = from_xlora(tiny_llama(), folder).eval()
    torch.testing.assert_close(logits(mine), logits(theirs), atol=2e-5, rtol=2e-5)


def test_what_an_xlora_folder_cannot_be_is_told_at_once(loras, tmp_path):
    folder = save_whole(peft_xlora(loras), loras, tmp_path / "x")
    change_config(folder, scaling_pass_value=0.5, enable_softmax_topk=True, use_trainable_adapters=True)
    with pytest.raises(LoadError) as error:
        from_xlora(tiny_llama(), folder)
    for part in ("3 problems", "scaling_pass_value=0.5", "softmax of a softmax", "were trained, too"):
        assert part in str(error.value)
    change_config(folder, scaling_pass_value=0.0, enable_softmax_topk=False, enable_softmax=False)
    with pytest.raises(LoadError, match="raw scores"):
        from_xlora(tiny_llama(), folder)
    change_config(folder, enable_softmax=True, softmax_temperature="hot", top_k_lora=0, use_trainable_adapters=False)
    with pytest.raises(LoadError, match="2 problems"):
        from_xlora(tiny_llama(), folder)
    change_config(folder, softmax_temperature=1.0, top_k_lora=None)
    model = tiny_llama()
    before = anatomy(model)
    with pytest.raises(LoadError, match="does not fit 2 adapters"):
        from_xlora(model, folder, {"a": loras[0], "b": loras[1]})
    assert anatomy(model) == before
    with pytest.raises(LoadError, match="not XLORA"):
        from_xlora(tiny_llama(), loras[0])
    for number in range(3):
        (folder / str(number) / CONFIG).unlink()
    with pytest.raises(LoadError, match="pass adapters="):
        from_xlora(tiny_llama(), folder)


# --- MixLoRA ----------------------------------------------------------------------------------------------------------

MLP = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
ATTENTION = {"q_proj": (32, 32), "v_proj": (32, 16)}


def mixlora(folder, old=False, mlp=tuple(MLP), seed=0, experts=4, rank=3, **changes):
    """A checkpoint as MoE-PEFT writes it; its tensors."""
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": experts, "top_k": 2, "r": rank}
    config |= {"lora_alpha": 5, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM", **changes}
    own = {**config, **config.get("expert_lora", {})}
    tensors = {}

    def put(name, *shape):
        tensors[name] = 0.3 * torch.randn(shape, generator=generator)

    for block in range(2):
        put(
            f"mixlora.layers.{block}.gate.weight" if old else f"mixlora.layers.{block}.mlp.moe_gate.weight", experts, 32
        )
        for layer, (d_in, d_out) in ATTENTION.items():
            put(f"mixlora.layers.{block}.self_attn.{layer}.lora_A.weight", config["r"], d_in)
            put(f"mixlora.layers.{block}.self_attn.{layer}.lora_B.weight", d_out, config["r"])
        for layer in mlp:
            for e in range(experts):
                middle = f"experts.{e}.{layer}" if old else f"mlp.{layer}.experts.{e}"
                put(f"mixlora.layers.{block}.{middle}.lora_A.weight", own["r"], MLP[layer][0])
                put(f"mixlora.layers.{block}.{middle}.lora_B.weight", MLP[layer][1], own["r"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / CONFIG).write_text(json.dumps(config))
    return tensors


def by_hand(tensors, scale, expert_scale, old=False, experts=4):
    """MixLoRA by plain loops: dense weights per expert, one token at a time."""
    model = tiny_llama()

    def delta(name, factor):
        if f"{name}.lora_A.weight" not in tensors:
            return 0.0
        return factor * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]

    for block, layer in enumerate(model.model.layers):
        start = f"mixlora.layers.{block}"
        for name in ATTENTION:
            getattr(layer.self_attn, name).weight.data += delta(f"{start}.self_attn.{name}", scale)
        weights = [
            {
                name: getattr(layer.mlp, name).weight.data
                + delta(f"{start}.experts.{e}.{name}" if old else f"{start}.mlp.{name}.experts.{e}", expert_scale)
                for name in MLP
            }
            for e in range(experts)
        ]
        gate = tensors[f"{start}.gate.weight" if old else f"{start}.mlp.moe_gate.weight"]

        def forward(x, weights=weights, gate=gate):
            y = torch.zeros_like(x)
            for row in range(x.shape[0]):
                for t in range(x.shape[1]):
                    p = torch.softmax(gate @ x[row, t], 0)
                    best = p.argsort(descending=True)[:2]
                    for e in best:
                        W = weights[e]
                        inner = F.silu(W["gate_proj"] @ x[row, t]) * (W["up_proj"] @ x[row, t])
                        y[row, t] += p[e] / p[best].sum() * (W["down_proj"] @ inner)
            return y

        layer.mlp.forward = forward
    return model


@pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
def test_a_mixlora_checkpoint_computes_what_its_equation_says(tmp_path, old):
    tensors = mixlora(tmp_path, old)
    mine = from_mixlora(tiny_llama(), tmp_path).eval()
    want = logits(by_hand(tensors, 5 / 3, 5 / 3, old))
    assert (want - logits(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(mine), want, atol=1e-5, rtol=1e-5)
    molora.save(mine, tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved")), logits(mine))
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_experts_with_a_rank_and_a_scale_of_their_own_and_an_mlp_trained_in_part(tmp_path):
    own = {"r": 2, "lora_alpha": 7, "use_rslora": True}
    tensors = mixlora(tmp_path, mlp=("gate_proj", "down_proj"), rank=4, expert_lora=own)
    mine = from_mixlora(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(mine), logits(by_hand(tensors, 5 / 4, 7 / 2**0.5)), atol=1e-5, rtol=1e-5)


def test_what_a_mixlora_checkpoint_cannot_be_is_told_and_changes_nothing(tmp_path):
    model = tiny_llama()
    before = anatomy(model)
    cases = [
        ({"routing_strategy": "mixlora-dynamic"}, "only 'mixlora'"),
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LORA"}, "not 'MIXLORA'"),
        ({"top_k": 9}, "top_k the smaller"),
        ({"act_fn": "gelu_new"}, "another activation"),
        ({"r": 7}, r"needs A \(7, 32\)"),
        ({"num_experts": 5}, "of 5 experts"),
        ({"lora_dropout": "much", "bias": "all"}, "2 problems"),
    ]
    for number, (changes, message) in enumerate(cases):
        mixlora(tmp_path / str(number))
        change_config(tmp_path / str(number), **changes)
        with pytest.raises(LoadError, match=message):
            from_mixlora(model, tmp_path / str(number))
    tensors = mixlora(tmp_path / "x")
    tensors["mixlora.layers.7.mlp.moe_gate.weight"] = tensors.pop("mixlora.layers.1.mlp.moe_gate.weight")
    tensors["surprise"] = torch.zeros(1)
    del tensors["mixlora.layers.0.mlp.up_proj.experts.2.lora_B.weight"]
    torch.save(tensors, tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(LoadError) as error:
        from_mixlora(model, tmp_path / "x")
    for part in (
        "4 problems",
        "router of block 1",
        "router of block 7",
        "'surprise'",
        "mlp layer 'up_proj' of block 0",
    ):
        assert part in str(error.value)
    tensors = mixlora(tmp_path / "y")
    tensors["mixlora.layers.1.mlp.moe_gate.weight"] = torch.zeros(4, 48)
    torch.save(tensors, tmp_path / "y" / "adapter_model.bin")
    with pytest.raises(LoadError, match=r"block 1 needs \(4, 32\), the file holds \(4, 48\)"):
        from_mixlora(model, tmp_path / "y")
    assert anatomy(model) == before


class Bomb:
    """Runs code when it is unpickled."""

    armed = False

    def __reduce__(self):
        return (setattr, (Bomb, "armed", True))


def test_objects_in_a_pickle_are_refused_and_never_run(tmp_path):
    mixlora(tmp_path)
    for content in ({"x": Bomb()}, Bomb(), {"x": SimpleNamespace(a=1)}):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(LoadError, match="never unpickled"):
            from_mixlora(tiny_llama(), tmp_path)
    assert not Bomb.armed
    path = tmp_path / "adapter_model.bin"
    for content, message in [
        ([torch.zeros(1)], "mapping from names to tensors"),
        ({}, "mapping from names to tensors"),
        ({"a": torch.zeros(1), "b": 3}, "no finite tensors of floats: b"),
        ({"a": torch.tensor([float("nan")])}, "no finite tensors of floats: a"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "no finite tensors of floats: a"),
        ({"a": torch.zeros(1).expand(10**13)}, "no finite tensors of floats: a"),  # nothing of that size is made
        ({"a": torch.zeros(3, device="meta")}, "no finite tensors of floats: a|never unpickled"),
    ]:
        torch.save(content, path)
        with pytest.raises(LoadError, match=message):
            read_tensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"no archive of torch|damaged"):
        read_plain(path)
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(LoadError, match="no archive of torch"):
        read_plain(path)
    path.unlink()
    with pytest.raises(LoadError, match="is missing"):
        read_plain(path)


# --- mttl -------------------------------------------------------------------------------------------------------------


def mttl(root, name="cook", rank=3, alpha=7.0, **meta):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        for layer, (d_in, d_out) in ATTENTION.items():
            path = f"model.layers.{block}.self_attn.{layer}"
            tensors[f"{path}.lora_a"] = 0.3 * torch.randn(d_in, rank, generator=generator)
            tensors[f"{path}.lora_b"] = 0.3 * torch.randn(rank, d_out, generator=generator)
    torch.save(tensors, root / f"{name}.ckpt")
    info = {"expert_name": name, "expert_model": "tiny/llama", "expert_deleted": False, "training_config": None}
    info["expert_config"] = {"modifier_name": "lora", "lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    torch.save({**info, **meta}, root / f"{name}.meta")
    return tensors


def test_an_expert_of_an_mttl_library_computes_what_mttl_does(tmp_path):
    tensors = mttl(tmp_path)
    model = tiny_llama()
    for name, layer in model.named_modules():
        if f"{name}.lora_a" in tensors:  # mttl: y + x lora_a lora_b alpha / rank
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            layer.register_forward_hook(lambda m, args, y, a=a, b=b: y + args[0] @ a @ b * (7 / 3))
    folder = from_mttl(tmp_path, "cook", tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    want = logits(model)
    assert (want - logits(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), want, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "tiny/llama"
    with molora.pin(mixture_of([folder]), torch.ones(1)):
        pass


def test_what_an_mttl_expert_cannot_be_is_told(tmp_path):
    tensors = mttl(tmp_path)
    with pytest.raises(LoadError, match="known: cook"):
        from_mttl(tmp_path, "bake", tmp_path / "out")
    for config, message in [
        ({"modifier_name": "ia3", "lora_rank": 0, "lora_alpha": None}, "3 problems"),
        ({"modifier_name": "lora", "lora_rank": 2, "lora_alpha": 1.0}, r"\(d_in, 2\)"),
        (None, "scale of the expert is unknown"),
        (Bomb(), "never unpickled"),
    ]:
        mttl(tmp_path, expert_config=config)
        with pytest.raises(LoadError, match=message):
            from_mttl(tmp_path, "cook", tmp_path / "out")
    assert not Bomb.armed
    mttl(tmp_path)
    del tensors["model.layers.0.self_attn.q_proj.lora_a"]
    torch.save(tensors, tmp_path / "cook.ckpt")
    with pytest.raises(LoadError, match="lora_b alone"):
        from_mttl(tmp_path, "cook", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- gates from prompts -----------------------------------------------------------------------------------------------

PROMPTS = {"lora_0": ["good movie .", "the film is great !"], "lora_1": ["stock price"], "lora_2": ["virus cell drug"]}
AGAINST = {"lora_1": ["planet star atom", "who ?"]}


def tokenize(text):
    return tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_rows_are_the_states_of_the_prompts(loras, pool):
    model = gates_from_prompts(mixture_of(loras), tokenize, PROMPTS, AGAINST, pool=pool)
    bare, seen = tiny_llama(), {}
    for name, module in bare.named_modules():
        module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: args[0]} if args else {}))

    def state(path, texts):
        rows = []
        for text in texts:
            with torch.no_grad():
                bare(**tokenize(text))
            rows.append(seen[path][0, -1] if pool == "last" else seen[path][0].mean(0))
        return sum(rows) / len(rows)

    for path, router in zip(sites_of(model), routers_of(model), strict=True):
        for row, name in zip(router.scorer.weight, PROMPTS, strict=True):
            want = state(path, PROMPTS[name]) - (state(path, AGAINST[name]) if name in AGAINST else 0)
            torch.testing.assert_close(row.detach(), want / want.norm(), atol=1e-5, rtol=1e-5)


def test_a_prompt_goes_to_its_expert_and_the_gates_are_saved(loras, tmp_path):
    model = gates_from_prompts(mixture_of(loras), tokenize, PROMPTS, top_k=1)
    first = sites_of(model)[0]  # what it reads depends on no expert
    for number, prompts in enumerate(PROMPTS.values()):
        with molora.record(model) as log, torch.no_grad():
            model(**tokenize(prompts[-1]))
        row = next(routing for site, routing in log.items() if site == first).gates[0, -1]
        assert number == 0 or row.argmax() == number  # the row of the first is a mean of two prompts
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    molora.save(model, tmp_path)
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path)), logits(model))
    trained = gates_from_prompts(mixture_of(loras), tokenize, PROMPTS, train=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad and "router" in n}
    inputs = tiny_inputs(tiny_llama())
    trained(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_prompts_that_say_nothing_are_told_and_change_nothing(loras):
    model = mixture_of(loras)
    before = logits(model)
    with pytest.raises(ConfigError) as error:
        gates_from_prompts(model, tokenize, {"lora_0": ["a"], "lora_7": ["b"]}, pool="first", top_k=4)
    for part in ("5 problems", "'lora_1' has no positive", "no expert 'lora_7'", "pool 'first'", "top_k must be"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="'lora_1' look the same"):
        gates_from_prompts(model, tokenize, PROMPTS, {"lora_1": PROMPTS["lora_1"]})
    assert torch.equal(logits(model), before)
