"""What the fuzz tests share: how they run, and values that nobody expects."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


NUMBERS = st.one_of(
    st.integers(-2, 70), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**400, -1]), st.floats(), st.booleans()
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["F32", "BF16", "F4", "lora_A", "LORA", "MOLORA", "(a+)+", "(", ".*", "\x1b[2J", "softmax", "linear"]
    ),
)
JSON = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def nothing_strange(verdict):
    """Problems are for people: short, printable, and there when the file is bad."""
    for problem in verdict.problems + verdict.notes:
        assert len(problem) < 3000 and "\x1b" not in problem
