"""Rights: no sequence of calls shows a tenant that another one's adapter exists, or lets it be used."""

import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from molora.serve.request import ServeError
from molora.serve.tenants.store import Tenants
from molora.serve.tenants.tenant import Tenant, resolve
from tests.serve.databases import Clock

PEOPLE = ("ann", "bob")
NAMES = ("a", "a-1", "a-2", "b", "b-1", "shared", "ghost")
ALIASES = ("best", "b-2", "a-9")
PATTERNS = (*NAMES, "a-*", "b*", "best", "*", "a@1", "shared@2")
BASE = "gemma"


def covers(pattern, name):
    """What a pattern means, said in another way than in the code: as a regular expression."""
    start, star, _ = pattern.partition("*")
    if star:
        return re.match(re.escape(start), name) is not None
    return re.fullmatch(rf"{re.escape(pattern)}(@\d+)?", name) is not None


class Callers(RuleBasedStateMachine):
    """Two tenants and an operator on one server; what a tenant may know is worked out from the calls alone."""

    def __init__(self):
        super().__init__()
        self.tenants = Tenants("sqlite://", clock=Clock(), cache=5.0)
        self.keys, self.rights, self.base = {}, {}, {}
        self.loaded, self.aliases = set(), {}

    @initialize()
    def people(self):
        for name in PEOPLE:
            self.give(name, set(), False)
            self.keys[name] = self.tenants.add_key(name).secret

    def teardown(self):
        self.tenants.close()

    # --- what the operator does -----------------------------------------------------------------------------------

    @rule(name=st.sampled_from(PEOPLE), models=st.sets(st.sampled_from(PATTERNS), max_size=3), base=st.booleans())
    def give(self, name, models, base):
        self.tenants.put(Tenant(name, models=frozenset(models), base=base))
        self.rights[name], self.base[name] = models, base

    @rule(name=st.sampled_from(NAMES), version=st.sampled_from(("", "@1", "@2")))
    def load(self, name, version):
        self.loaded.add(name + version)

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name):
        self.loaded.discard(name)

    @rule(alias=st.sampled_from(ALIASES), name=st.sampled_from(NAMES))
    def alias(self, alias, name):
        if name in self.loaded:
            self.aliases[alias] = name

    @rule(name=st.sampled_from(PEOPLE), grace=st.sampled_from((0.0, 10.0)))
    def rotate(self, name, grace):
        self.keys[name] = self.tenants.rotate(name, grace).secret

    @rule(seconds=st.sampled_from((1.0, 5.0, 20.0)))
    def time_passes(self, seconds):
        self.tenants.clock.wait(seconds)

    # --- what a tenant can do -------------------------------------------------------------------------------------

    def known(self):
        """As the server has it: names and aliases, to what they stand for."""
        return {name: name for name in self.loaded} | {a: n for a, n in self.aliases.items() if n in self.loaded}

    def allowed(self, who, target):
        return any(covers(pattern, target) for pattern in self.rights[who])

    @rule(who=st.sampled_from(PEOPLE), name=st.sampled_from((*NAMES, *ALIASES, "a@1", "shared@2", BASE, "*", "")))
    def ask(self, who, name):
        caller, known = self.tenants.authenticate(self.keys[who]), self.known()
        assert caller is not None and caller.name == who
        try:
            found = resolve(caller, name, known, base=(BASE,))
        except ServeError as error:
            with pytest.raises(ServeError) as unknown:
                resolve(caller, name, {}, base=())  # a server that has nothing at all
            assert error.body() == unknown.value.body() and error.status == unknown.value.status == 404
            assert error.retry_after is None and error.__cause__ is None and error.__context__ is None
            said = error.message.replace(repr(name), "")  # what the caller wrote itself tells it nothing
            assert not any(re.search(rf"\b{re.escape(other)}\b", said) for other in (*NAMES[1:], *ALIASES, BASE))
            assert name not in known or not self.allowed(who, known[name])
            assert name != BASE or not self.base[who]
        else:
            assert (found == BASE and self.base[who]) if name == BASE else self.allowed(who, known[name])
            assert found == known.get(name, BASE)

    @rule(key=st.sampled_from(("", "mlr_0000000000000000_" + "A" * 43, "Bearer", "\x00")))
    def stranger(self, key):
        assert self.tenants.authenticate(key) is None and not self.tenants.is_admin(key)

    @invariant()
    def lists_show_what_is_allowed_and_no_more(self):
        for who in self.keys:
            caller, known = self.tenants.authenticate(self.keys[who]), self.known()
            shown = [name for name, target in known.items() if caller.may(target)]
            assert set(shown) == {name for name, target in known.items() if self.allowed(who, target)}
            assert caller.visible(self.loaded) == [name for name in self.loaded if self.allowed(who, name)]

    @invariant()
    def what_others_have_changes_no_answer(self):
        """The same questions with and without everything that the caller may not use: the answers are equal."""
        for who in self.keys:
            caller, known = self.tenants.authenticate(self.keys[who]), self.known()
            own = {name: target for name, target in known.items() if self.allowed(who, target)}
            for name in (*NAMES, *ALIASES, *known):
                assert answer(caller, name, known) == answer(caller, name, own)


def answer(caller, name, known):
    try:
        return resolve(caller, name, known)
    except ServeError as error:
        return error.body(), error.status, error.retry_after


TestCallers = Callers.TestCase
TestCallers.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
