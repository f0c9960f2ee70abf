"""A planted task: tokens of E known kinds, each needing its own expert, and a router that has to find them.

Kind k has a direction c_k; its tokens are x = c_k + noise (d,) and want y = M_k x with a map M_k of rank 1 of its own.
A layer of E experts of rank 1 can do it only when every kind has an expert to itself. `agreement` is the share of
tokens whose most weighted expert is the one of their kind, under the best one-to-one matching of experts and kinds.

The layer is wrapped as any model is, so that losses, prices, controllers and settle() take part as in training.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PretrainedConfig

import molora
from tests.needs import config_of, routers

KINDS, D, D_OUT, TOKENS, VOCAB = 4, 16, 12, 64, 50


class Layer(nn.Module):
    """A model of one frozen linear layer that is zero: whatever comes out is from the experts."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(vocab_size=VOCAB)
        self.proj = nn.Linear(D, D_OUT, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, inputs_embeds, input_ids=None):
        return self.proj(inputs_embeds)


class Task:
    """Draws batches of the planted task; the kinds and their maps are fixed by the seed.

    `noise` is the deviation of each coordinate of a token around the centre of its kind, which is 3 long.
    """

    def __init__(self, seed=0, noise=0.7):
        self.noise = noise
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.linalg.qr(torch.randn(D, D, generator=self.generator))[0][:KINDS] * 3
        left = torch.randn(KINDS, D_OUT, 1, generator=self.generator)
        self.maps = left @ torch.randn(KINDS, 1, D, generator=self.generator)
        self.maps /= self.maps.flatten(1).norm(dim=1)[:, None, None] / D**0.5

    def batch(self, tokens=TOKENS):
        """Inputs of the layer, y (1, T, d_out) and kind (T,); the token ids say nothing about the kinds."""
        kind = torch.randint(0, KINDS, (tokens,), generator=self.generator)
        x = self.centres[kind] + self.noise * torch.randn(tokens, D, generator=self.generator)
        y = torch.einsum("tod,td->to", self.maps[kind], x)
        ids = torch.randint(0, VOCAB, (1, tokens), generator=self.generator)
        return {"inputs_embeds": x[None], "input_ids": ids}, y[None], kind


def wrapped(recipe, **changes):
    """A layer wrapped by a recipe, with E experts of rank 1; `changes` as those of molora.wrap."""
    config = config_of(recipe)
    experts = {"num": KINDS, "rank": 1, "alpha": 16, "scaling": 1.0, "rslora": False, "dropout": 0.0}
    selector = config.selector
    if isinstance(selector, dict) and isinstance(selector.get("k"), int):
        selector = selector | {"k": min(selector["k"], 2)}
    experts |= changes.pop("experts", {})
    changes = {"target_modules": ["proj"], "selector": selector, "layers": [], **changes}
    model = molora.wrap(Layer(), recipe, experts=experts, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("Bt"):  # past the first step, where B = 0 teaches routers nothing
            nn.init.normal_(parameter, std=0.1)
    return model


def train(recipe, *, steps=400, seed=0, lr=2e-2, noise=0.7, **changes):
    """Train a recipe on the task; returns the model and the task."""
    torch.manual_seed(seed)
    task, model = Task(seed, noise), wrapped(recipe, **changes).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        molora.set_progress(model, step / steps)
        inputs, y, _ = task.batch()
        loss = molora.add_aux(model, ((told(model, inputs) - y) ** 2).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        molora.settle(model)
    molora.set_progress(model, 1.0)
    return model.eval(), task


def told(model, inputs):
    """Call the layer with what its routers may ask for; the extra features say nothing."""
    extra = next((f.extra for r in routers(model) for f in r.feature if hasattr(f, "extra")), 1)
    rows = len(inputs["input_ids"])
    with molora.using(model, task_ids=torch.zeros(rows, dtype=torch.long), router_extra=torch.zeros(rows, extra)):
        return model(**inputs)


@torch.no_grad()
def decided(model, task, tokens=1000):
    """Gates (T, E) and kind (T,) of fresh tokens, each in a row of its own."""
    inputs, _, kind = task.batch(tokens)
    rows = {name: value.transpose(0, 1) for name, value in inputs.items()}
    with molora.record(model) as log:
        told(model, rows)
    (routing,) = log.values()
    return routing.gates[:, 0], kind


def agreement(model, task):
    """Share of tokens whose most weighted expert is that of their kind, under the best matching."""
    gates, kind = decided(model, task)
    table = torch.zeros(KINDS, KINDS)
    table.index_put_((kind, gates.argmax(-1)), torch.ones(len(kind)), accumulate=True)
    rows, columns = linear_sum_assignment(-table.numpy())
    return float(table[rows, columns].sum() / len(kind))


def load_variation(model, task):
    """Standard deviation of the experts' load over its mean."""
    load = (decided(model, task)[0] != 0).float().sum(0)
    return float(load.std(correction=0) / load.mean())
