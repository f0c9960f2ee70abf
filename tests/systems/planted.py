"""A planted task: tokens of E known kinds, each needing its own expert, and a router that has to find them.

Kind k has a direction c_k; its tokens are x = c_k + noise (d,) and want y = M_k x with a map M_k of rank r of its own.
One bank of E experts of rank r can do it only when every kind has an expert to itself. `agreement` is the share of
tokens whose most weighted expert is the one of their kind, under the best one-to-one matching of experts and kinds.
"""

import torch
from scipy.optimize import linear_sum_assignment

from molora.experts.bank import ExpertBank
from molora.routing.losses import Parts, WeightedLoss
from molora.routing.router import Router
from molora.routing.types import Context, Memory
from tests.needs import config_of

KINDS, D, D_OUT, RANK, TOKENS = 4, 16, 12, 1, 64


class Task:
    """Draws batches of the planted task; the kinds and their maps are fixed by the seed."""

    def __init__(self, seed=0, shares=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.linalg.qr(torch.randn(D, D, generator=self.generator))[0][:KINDS] * 3
        self.maps = torch.randn(KINDS, D_OUT, RANK, generator=self.generator) @ torch.randn(
            KINDS, RANK, D, generator=self.generator
        )
        self.maps /= self.maps.flatten(1).norm(dim=1)[:, None, None] / D**0.5
        self.shares = torch.ones(KINDS) if shares is None else torch.tensor(shares)

    def batch(self, tokens=TOKENS):
        """x (1, T, d), y (1, T, d_out), kind (T,), token ids (1, T) that say nothing about the kind's expert."""
        kind = torch.multinomial(self.shares, tokens, replacement=True, generator=self.generator)
        x = self.centres[kind] + 0.7 * torch.randn(tokens, D, generator=self.generator)
        y = torch.einsum("tod,td->to", self.maps[kind], x)
        ids = torch.randint(0, 50, (1, tokens), generator=self.generator)
        return x[None], y[None], kind, ids


def parts_of(recipe, **changes):
    """Router and bank of a recipe for the planted task: its routing, with E experts of the task's rank."""
    config = config_of(recipe)
    experts = config.experts
    router = Router(
        D,
        KINDS,
        **{
            "scorer": config.scorer,
            "link": config.link,
            "selector": config.selector,
            "price": config.price,
            "feature": config.feature,
            "weights": config.weights,
            "null": experts["null"],
        }
        | changes,
    )
    bank = ExpertBank(D, D_OUT, [RANK] * KINDS)
    torch.nn.init.normal_(bank.Bt, std=0.1)  # past the first step, where B = 0 teaches routers nothing
    router.reads(bank)
    return router, bank, [WeightedLoss(loss) for loss in config.losses]


def train(recipe, *, steps=400, seed=0, lr=2e-2, task=None, **changes):
    """Train a recipe's routing on the task; returns router, bank and task."""
    torch.manual_seed(seed)
    task = task or Task(seed)
    router, bank, losses = parts_of(recipe, **changes)
    parameters = [p for m in (router, bank) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        x, y, _, ids = task.batch()
        ctx = Context(training=True, token_ids=ids, memory=Memory(), progress=step / steps)
        routing = router(x, ctx)
        if router.price is not None:
            router.observe(routing, ctx)
        loss = ((bank(x, routing.applied) - y) ** 2).mean()
        for one in losses:
            loss = loss + one(routing, ctx, 1, Parts(router, x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if router.price is not None:
            router.price.settle()
    return router, bank, task


@torch.no_grad()
def agreement(router, task, tokens=1000):
    """Share of tokens whose most weighted expert is that of their kind, under the best matching."""
    router.eval()
    x, _, kind, ids = task.batch(tokens)
    chosen = router(x, Context(token_ids=ids, memory=Memory(), progress=1.0)).gates[0].argmax(-1)
    table = torch.zeros(KINDS, KINDS)
    table.index_put_((kind, chosen), torch.ones(tokens), accumulate=True)
    rows, columns = linear_sum_assignment(-table.numpy())
    return float(table[rows, columns].sum() / tokens)


@torch.no_grad()
def load_variation(router, task, tokens=1000):
    """Standard deviation of the experts' load over its mean, by top choices."""
    router.eval()
    x, _, _, ids = task.batch(tokens)
    selected = router(x, Context(token_ids=ids, memory=Memory(), progress=1.0)).gates[0] != 0
    load = selected.float().sum(0)
    return float(load.std(correction=0) / load.mean())
