"""Schedules: ends, windows, shapes, rounding, pickling, errors."""

import itertools
import math
import pickle

import pytest

from molora.errors import ConfigError
from molora.routing.schedules import Scheduled, build_schedule, is_schedule, number, schedules


def build(name, **changes):
    return build_schedule({"schedule": name, "from": 2.0, "to": 8.0, **changes})


@pytest.mark.parametrize("name", sorted(set(schedules) - {"constant"}))
def test_ends(name):
    schedule = build(name)
    assert schedule(0.0) == pytest.approx(2)
    assert schedule(1.0) == pytest.approx(8)


@pytest.mark.parametrize("name", sorted(set(schedules) - {"constant"}))
def test_windows_hold_the_ends(name):
    schedule = build(name, start=0.25, end=0.75)
    assert [schedule(p) for p in (0.0, 0.1, 0.25)] == pytest.approx([2, 2, 2])
    assert [schedule(p) for p in (0.75, 0.9, 1.0)] == pytest.approx([8, 8, 8])
    whole = build(name)
    assert schedule(0.4) == pytest.approx(whole(0.3))  # (0.4 - 0.25) / 0.5


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("ends", [(2.0, 8.0), (8.0, 2.0), (3.0, 3.0)])
def test_between_the_ends_and_one_way(name, ends):
    schedule = build_schedule({"schedule": name, "from": ends[0], "to": ends[1]})
    values = [schedule(i / 50) for i in range(51)]
    assert min(ends) - 1e-9 <= min(values) and max(values) <= max(ends) + 1e-9
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(s >= -1e-9 for s in steps) or all(s <= 1e-9 for s in steps)


def test_shapes():
    assert build("linear")(0.25) == pytest.approx(3.5)
    assert build("cosine")(0.25) == pytest.approx(8 - 6 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert build("cosine")(0.5) == pytest.approx(5)
    assert build("exponential")(0.5) == pytest.approx(4)  # 2, 4, 8: the same factor in each half
    assert build("step", end=0.5)(0.499) == 2 and build("step", end=0.5)(0.5) == 8
    assert build_schedule({"schedule": "constant", "from": 3})(0.7) == 3
    assert build("linear", start=0.5, end=0.5)(0.49) == 2 and build("linear", start=0.5, end=0.5)(0.5) == 8


def test_numbers_and_schedules():
    assert number(0.5)(0.3) == 0.5 and number(2)(1.0) == 2
    assert number({"schedule": "linear", "from": 0, "to": 1})(0.3) == pytest.approx(0.3)
    assert is_schedule({"schedule": "linear"}) and not is_schedule(0.1) and not is_schedule({"name": "linear"})
    for wrong in ("0.1", True, None, [1]):
        with pytest.raises(ConfigError, match="neither a number nor a schedule"):
            number(wrong)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"schedule": "liner", "from": 1, "to": 2}, "schedule 'liner' is unknown; did you mean 'linear'"),
        ({"schedule": "linear", "to": 2}, "needs 'from'"),
        ({"schedule": "linear", "from": 1}, "needs 'from'"),
        ({"schedule": "linear", "from": 1, "to": 2, "steps": 3}, "no option"),
        ({"schedule": "linear", "from": 1, "to": 2, "start": 0.8, "end": 0.2}, "0 <= start <= end <= 1"),
        ({"schedule": "linear", "from": 1, "to": 2, "end": 1.5}, "0 <= start <= end <= 1"),
        ({"schedule": "exponential", "from": 1, "to": -2}, "values of one sign"),
        ({"schedule": "exponential", "from": 0, "to": 2}, "values of one sign"),
        ({"schedule": "linear", "from": "a", "to": 2}, "must be numbers"),
        ({"schedule": "linear", "from": 1, "to": 2, "start": "early"}, "must be numbers"),
    ],
)
def test_wrong_schedules_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_schedule(spec)


def component(x, *, k: int = 2, p: float = 0.5, mode: str = "a"):
    return x, k, p, mode


def test_options_are_resolved_and_whole_numbers_stay_whole():
    scheduled = Scheduled(
        component,
        {
            "k": {"schedule": "linear", "from": 2, "to": 16},
            "p": {"schedule": "linear", "from": 0, "to": 1},
            "mode": "b",
        },
    )
    assert scheduled("x", progress=0.0) == ("x", 2, 0.0, "b")
    assert scheduled("x", progress=1.0) == ("x", 16, 1.0, "b")
    _, k, p, _ = scheduled("x", progress=0.31)
    assert (k, p) == (round(2 + 14 * 0.31), pytest.approx(0.31)) and isinstance(k, int)


def test_pickling():
    scheduled = Scheduled(component, {"k": {"schedule": "cosine", "from": 2, "to": 16}})
    for thing in (build("exponential", start=0.1), scheduled):
        again = pickle.loads(pickle.dumps(thing))
        if isinstance(thing, Scheduled):
            assert again("x", progress=0.4) == thing("x", progress=0.4)
        else:
            assert again == thing and again(0.4) == thing(0.4)


def test_multi_step_doubles_and_halves_in_equal_intervals():
    """SMoE-Dropout's 1, 2, 4, 8, 16."""
    up = build_schedule({"schedule": "multi_step", "from": 1, "to": 16})
    assert [up(p) for p in (0, 0.19, 0.2, 0.39, 0.4, 0.6, 0.79, 0.8, 1)] == [1, 1, 2, 2, 4, 8, 8, 16, 16]
    down = build_schedule({"schedule": "multi_step", "from": 12, "to": 2, "end": 0.8})
    assert [down(p) for p in (0, 0.1, 0.2, 0.4, 0.5, 0.6, 1)] == [12, 12, 6, 3, 3, 2, 2]
    with pytest.raises(ConfigError, match="schedule 'multi_step' needs values of one sign"):
        build_schedule({"schedule": "multi_step", "from": 0, "to": 2})


def test_ramp_follows_its_curve():
    ramp = build("ramp")
    low = math.exp(-5)
    assert ramp(0.5) == pytest.approx(2 + 6 * (math.exp(-1.25) - low) / (1 - low))
    assert ramp(0.25) - ramp(0) < ramp(0.75) - ramp(0.5)
