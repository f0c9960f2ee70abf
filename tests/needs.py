"""What the recipes ask for in tests, derived from their configurations, so that a new recipe needs no list edited."""

from contextlib import contextmanager

import torch

import molora
from molora.config import MoloraConfig
from molora.registry import split_spec
from molora.routing.features import features, listed
from molora.routing.losses import losses
from molora.routing.router import Router
from molora.routing.scorers import scorers
from molora.routing.selectors import selectors


def config_of(recipe):
    """The configuration of a recipe, as it comes."""
    return MoloraConfig.from_recipe(recipe)


def names_of(recipe):
    """(registry, name) of the parts of a recipe that know about tokens."""
    config = config_of(recipe)
    for registry, key in ((scorers, "scorer"), (selectors, "selector")):
        specs = [branch.get(key, getattr(config, key)) for branch in config.branches or ({},)]
        yield from ((registry, split_spec(one)[0]) for one in specs)
    yield from ((features, split_spec(one)[0]) for one in listed(config.feature))


def has_fact(recipe, fact):
    """Whether any part of a recipe is registered with a fact."""
    return any(bool(registry.fact(name, fact, False)) for registry, name in names_of(recipe))


def looks_at_the_batch(recipe):
    """Whether training decisions of a recipe depend on other tokens of the batch."""
    return has_fact(recipe, "is_batch_coupled")


def has_losses(recipe):
    """Whether a recipe trains with auxiliary losses."""
    return bool(config_of(recipe).losses)


def task_ids(rows):
    """A task per row, among three."""
    return 2 * torch.arange(rows) % 3


@contextmanager
def told(model, rows):
    """Tell routers, for all forwards inside the block, whatever any recipe asks for; the others do not look at it."""
    extra = next((f.extra for r in routers(model) for f in r.feature if hasattr(f, "extra")), 2)
    with molora.using(
        model,
        task_ids=task_ids(rows),
        router_extra=torch.linspace(-1, 1, rows * extra).view(rows, extra),
    ):
        yield


def routers(model):
    """All routers of a wrapped model."""
    return [module for module in model.modules() if isinstance(module, Router)]


def stocked(model):
    """The model with given experts in its frozen banks, whose fresh ones would stay zero and teach routers nothing."""
    generator = torch.Generator().manual_seed(11)
    for bank in [module for module in model.modules() if getattr(module, "all_frozen", False)]:
        for parameter in bank.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def losses_of(recipe):
    """The names of the losses of a recipe."""
    return [loss["name"] for loss in config_of(recipe).losses if loss["name"] in losses]
