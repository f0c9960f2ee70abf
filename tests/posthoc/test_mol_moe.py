"""Mol-MoE: its two rewards, its start from prompts, and routers that learn to follow a preference."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

import molora
from molora import ConfigError
from molora.control import routed_layers
from molora.posthoc import mol_moe
from molora.posthoc.mol_moe import PreferenceTuner, gates_by_preference, maximisation, precision
from molora.posthoc.rerouting import routers_of
from tests.adapters import logits
from tests.posthoc.mixtures import mixture_of, save_loras, trainable
from tests.tiny import tiny_inputs, tiny_llama

WORDS = (20, 30, 40)  # property j of a text: how often it says WORDS[j]


def speaker():
    """A model whose states share a direction, so that an expert can say one word whatever came before."""
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[:, 0] = 3.0
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """One expert per property: expert j makes the model say WORDS[j]."""
    folders = []
    for word in WORDS:
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"])
        model = get_peft_model(speaker(), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.zero_()
                parameter.data[(0, 0) if "lora_A" in name else (word, 0)] = 1.0 if "lora_A" in name else 2.5
        folders.append(tmp_path_factory.mktemp("speakers") / str(word))
        model.save_pretrained(folders[-1], save_embedding_layers=False)
    return folders


def counts(text, counted):
    return torch.stack([((text == word) & counted).sum(1) for word in WORDS], 1).float()


def prompts(rows, seed=0):
    ids = torch.randint(50, 90, (rows, 4), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 250.0])
def test_scores_in_the_wanted_proportions_have_precision_one_whatever_their_size(scale):
    w = torch.softmax(torch.randn(6, 4), -1)
    torch.testing.assert_close(precision(w, scale * w), torch.ones(6))


def test_the_rewards_are_their_formulas():
    w, s = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[2.0, 0.0, 2.0]])
    torch.testing.assert_close(precision(w, s), torch.tensor([1 - (0.0 + 0.3 + 0.3) / 3]))
    torch.testing.assert_close(maximisation(w, s), torch.tensor([1.4]))
    torch.testing.assert_close(precision(w, torch.zeros(1, 3)), torch.tensor([1 - 1 / 3]))  # not 0 / 0
    assert maximisation(torch.zeros(1, 3), s) == 0  # a prompt without weights: nothing to learn from


# --- routers ----------------------------------------------------------------------------------------------------------


def test_rows_start_as_the_states_of_prompts_that_name_the_property(tmp_path):
    folders = save_loras(tmp_path, 2)
    model = mixture_of(folders)
    batches = {name: [tiny_inputs(tiny_llama(), seed=seed)] for seed, name in enumerate(("lora_1", "base"))}
    batches["lora_1"][0]["attention_mask"][0, 5:] = 0
    mol_moe.build(model, preferences=2, prompts=batches)
    seen = {}
    base = tiny_llama()
    for path, router in zip(routed_layers(model), routers_of(model), strict=True):
        for expert, name in ((1, "lora_1"), (2, "base")):
            hook = base.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
            with torch.no_grad():
                base(**batches[name][0])
            hook.remove()
            last = [4 if name == "lora_1" else 6, 6]
            mean = torch.stack([seen["x"][row, at] for row, at in enumerate(last)]).mean(0)
            row = router.scorer.weight[expert]
            torch.testing.assert_close(row[:-2], torch.nn.functional.normalize(mean, dim=0), atol=1e-5, rtol=1e-5)
            assert row[-2:].eq(0).all()
        assert router.scorer.weight[0].eq(0).all()


def test_all_experts_and_the_base_take_part_and_only_routers_learn(tmp_path):
    model = mol_moe.build(mixture_of(save_loras(tmp_path, 3)))
    with molora.record(model) as log, torch.no_grad():
        model(**tiny_inputs(tiny_llama()))
    for routing in log.values():
        assert routing.gates.shape[-1] == 3 and routing.probs.shape[-1] == 4
        torch.testing.assert_close(routing.gates, torch.full_like(routing.gates, 0.25))
    names = trainable(model)
    assert names and all(name.endswith("molora_router.default.scorer.weight") for name in names)
    without = mol_moe.build(model, base=False)
    with molora.record(without) as log, torch.no_grad():
        without(**tiny_inputs(tiny_llama()))
    assert all(torch.allclose(routing.gates, torch.tensor(1 / 3)) for routing in log.values())


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["precision", "maximisation"])
def test_trained_routers_put_more_weight_on_what_is_asked_for(speakers, reward):
    model = mol_moe.build(mixture_of(speakers, speaker), preferences=3)
    size = 8.0 if reward == "precision" else 1.0
    wanted = precision if reward == "precision" else maximisation
    tuner = PreferenceTuner(model, counts, lambda w, s: size * wanted(w, s), samples=6, new_tokens=6, kl=0.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    generator, rewards = torch.Generator().manual_seed(1), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(60):
        w = torch.distributions.Dirichlet(torch.full((3,), 0.7)).sample((16,))
        loss = tuner.loss(prompts(16, step), w)
        assert loss == 0  # only its gradient says something
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(tuner.mean_reward)
    assert sum(rewards[-10:]) > sum(rewards[:10])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model)
    if reward == "precision":  # the best answer to the other reward is the one largest preference, whatever the rest
        w = torch.softmax(1.5 * torch.randn(60, 3, generator=generator), -1)
        gates = gates_by_preference(model, prompts(60, 999), w)
        found = [spearmanr(w[:, j], gates[:, j]).statistic for j in range(3)]
        assert min(found) > 0.9, found
    line = torch.linspace(0.05, 0.9, 10)  # with the rest shared out evenly it must rise strictly
    for j in range(3):
        along = ((1 - line) / 2)[:, None].repeat(1, 3)
        along[:, j] = line
        same = {name: tensor[:1].repeat(10, 1) for name, tensor in prompts(1, 5).items()}
        rising = gates_by_preference(model, same, along)[:, j]
        assert (rising[1:] > rising[:-1]).all() and spearmanr(line, rising).statistic > 0.9


def test_the_gradient_is_the_leave_one_out_policy_gradient(speakers):
    """The loss by hand, for the texts that were sampled."""
    model = mol_moe.build(mixture_of(speakers, speaker), preferences=3)
    for router in routers_of(model):
        torch.nn.init.normal_(router.scorer.weight, std=0.2)
    tuner = PreferenceTuner(model, counts, "maximisation", samples=3, new_tokens=4, kl=0.1)
    with torch.no_grad():
        for router in routers_of(model):
            router.scorer.weight.add_(0.05 * torch.randn_like(router.scorer.weight))
    reference = [weight.clone() for weight in tuner._reference]
    kept, w, rows = {}, torch.softmax(torch.randn(2, 3), -1), prompts(2)
    sampled = tuner._sampled
    tuner._sampled = lambda *args: kept.setdefault("text", sampled(*args))
    tuner.loss(rows, w).backward()
    weight = routers_of(model)[0].scorer.weight
    got, weight.grad = weight.grad.clone(), None
    text, _ = kept["text"]

    def log_prob(row, tokens):
        ids = torch.cat([rows["input_ids"][row], tokens])[None]
        with molora.using(model, router_extra=w[row : row + 1]):
            log_p = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        return sum(log_p[3 + t, token] for t, token in enumerate(tokens.tolist()))

    total = 0.0
    for row in range(2):
        texts = [text[sample * 2 + row] for sample in range(3)]
        own = [log_prob(row, tokens) for tokens in texts]
        now = weight.data
        weight.data = reference[0]
        past = [float(log_prob(row, tokens).detach()) for tokens in texts]
        weight.data = now
        scores = [torch.tensor([float((tokens == word).sum()) for word in WORDS]) for tokens in texts]
        value = [float(w[row] @ s) - 0.1 * (float(o.detach()) - p) for s, o, p in zip(scores, own, past, strict=True)]
        for m in range(3):
            others = sum(value[i] for i in range(3) if i != m) / 2
            total = total - (value[m] - others) * own[m] / 3 / 2
    total.backward()
    assert got.abs().max() > 1e-4
    torch.testing.assert_close(got, weight.grad, atol=1e-5, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(tuner._reference, reference, strict=True))


def test_padding_on_the_left_changes_no_probability(speakers):
    model = mol_moe.build(mixture_of(speakers, speaker), preferences=3)
    for router in routers_of(model):
        torch.nn.init.normal_(router.scorer.weight, std=0.2)
    tuner = PreferenceTuner(model, counts, samples=2, new_tokens=5)
    rows, w = prompts(3), torch.softmax(torch.randn(3, 3), -1)
    text, counted = torch.randint(4, 90, (3, 5)), torch.arange(5).expand(3, 5) < torch.tensor([[5], [3], [1]])
    padded = {name: torch.nn.functional.pad(tensor, (2, 0)) for name, tensor in rows.items()}
    with torch.no_grad():
        plain, other = (tuner._log_prob(inputs, text, counted, w) for inputs in (rows, padded))
        assert (plain.abs() > 1e-2).all()
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)
        text[1, 3:], text[2, 1:] = 7, 8  # what comes after the end
        torch.testing.assert_close(tuner._log_prob(rows, text, counted, w), plain)


def test_text_after_its_end_does_not_count(speakers):
    model = mol_moe.build(mixture_of(speakers, speaker), preferences=3)
    model.generation_config.eos_token_id = WORDS[1]
    tuner = PreferenceTuner(model, counts, samples=2, new_tokens=6)
    text, counted = tuner._sampled(prompts(12), torch.full((12, 3), 1 / 3))
    for tokens, own in zip(text.tolist(), counted.tolist(), strict=True):
        end = tokens.index(WORDS[1]) if WORDS[1] in tokens else len(tokens) - 1
        assert own == [position <= end for position in range(len(tokens))]
    assert not counted.all()


def test_it_is_saved_and_wrong_options_change_nothing(tmp_path):
    folders = save_loras(tmp_path, 2)
    model = mol_moe.build(mixture_of(folders), preferences=2)
    for router in routers_of(model):
        torch.nn.init.normal_(router.scorer.weight)
    with molora.using(model, router_extra=torch.tensor([[0.2, 0.8], [0.9, 0.1]])):
        want = logits(model)
    with pytest.raises(ConfigError, match=r"(?s)expert 'lora_9'; did you mean 'lora_.'.*preferences must be"):
        mol_moe.build(model, preferences=0, prompts={"lora_9": []})
    with pytest.raises(ConfigError, match="reward 'precise' is unknown; did you mean 'precision'"):
        PreferenceTuner(model, counts, "precise")
    with pytest.raises(ConfigError, match="samples >= 2"):
        PreferenceTuner(model, counts, samples=1)
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    with molora.using(loaded, router_extra=torch.tensor([[0.2, 0.8], [0.9, 0.1]])):
        assert torch.equal(logits(loaded), want)
    with molora.using(loaded, router_extra=torch.tensor([[0.8, 0.2], [0.9, 0.1]])):
        assert not torch.allclose(logits(loaded)[0], want[0])
