"""Names in requests, as the service reads them: the right to one thing is no right to another of the same name."""

from types import SimpleNamespace

import pytest

from molora.serve.request import Auto, Base, ServeError, Weighted
from molora.serve.service import Service
from molora.serve.tenants.store import Tenants
from molora.serve.tenants.tenant import Limits, Tenant


def service(*names):
    """A service with adapters of these names, and nothing behind it: what is asked here needs no model."""
    entries = [SimpleNamespace(name=name, kind="lora", bytes=0) for name in names]
    store = SimpleNamespace(entries=lambda: entries, kinds=lambda: dict.fromkeys(names, "lora"))
    engine = SimpleNamespace(selectors={"knn": None}, store=store)
    return Service(engine, store, name="gemma", tokenizer=None)


def program(names, tenant, model, **options):
    try:
        return service(*names).program(tenant, model, lambda: "text", **options)
    except ServeError as error:
        return error.body()


def test_the_right_to_the_base_is_no_right_to_an_adapter_of_its_name():
    tenant = Tenant("a", models=frozenset({"mine"}))
    assert program(["gemma", "mine"], tenant, "gemma") == program(["mine"], tenant, "gemma") == Base()


@pytest.mark.parametrize("hidden", ["auto", "secret", "gemma"])
def test_what_is_hidden_changes_no_answer(hidden):
    tenant = Tenant("a", models=frozenset({"mine"}))
    for model in ("auto", "secret", "gemma", "mine", "other"):
        assert program(["mine", hidden], tenant, model) == program(["mine"], tenant, model)
        weighted = {"adapters": {"mine": 0.5, hidden: 0.5}}
        assert program(["mine", hidden], tenant, model, **weighted) == program(["mine"], tenant, model, **weighted)
    chosen = program(["mine", hidden], tenant, "auto")
    assert isinstance(chosen, Auto) and chosen.allowed == frozenset({"mine"})
    assert program(["mine", hidden], tenant, "mine") == Weighted((("mine", 1.0),))


def test_an_adapter_called_auto_can_be_used_by_who_may():
    assert program(["auto"], Tenant("a", models=frozenset({"auto"})), "auto") == Weighted((("auto", 1.0),))


def test_who_may_not_use_the_base_is_told_that_it_does_not_exist():
    tenant = Tenant("a", models=frozenset({"mine"}), base=False)
    assert program(["mine"], tenant, "gemma")["error"]["code"] == "model_not_found"


def test_closing_the_service_gives_back_what_it_holds(tenants, database_url):
    """A server that stops in good order leaves no place taken for the length of the lease."""
    tenants.put(Tenant("a", limits=Limits(concurrent=1)))
    with Tenants(database_url, clock=tenants.clock) as other:
        entries = SimpleNamespace(entries=list, close=lambda: None)
        engine = SimpleNamespace(selectors={}, store=entries, drain=lambda timeout: None, close=lambda: None)
        stopping = Service(engine, entries, name="gemma", tokenizer=None, tenants=other)
        other.admit(Tenant("a"), 1, 1)
        with pytest.raises(ServeError, match="1 at a time"):
            tenants.admit(Tenant("a"), 1, 1)
        stopping.close()
        tenants.admit(Tenant("a"), 1, 1)
