"""Scorers that know tasks, alone or inside of another scorer, are made for the tasks of the data."""

import pytest

from molora.routing.tasks import tasks_in, with_tasks

INSIDE = {"name": "noisy", "eps": 0.1, "scorer": {"name": "multi_gate", "num_tasks": 4}}


@pytest.mark.parametrize(
    ("scorer", "known", "made"),
    [
        ("linear", 0, {"name": "linear"}),
        ({"name": "mlp", "hidden": 3}, 0, {"name": "mlp", "hidden": 3}),
        ({"name": "noisy", "scorer": "linear"}, 0, {"name": "noisy", "scorer": "linear"}),
        ("table", 0, {"name": "table", "num_tasks": 7}),
        ({"name": "table", "num_tasks": 3, "spread": 0.1}, 3, {"name": "table", "num_tasks": 7, "spread": 0.1}),
        (INSIDE, 4, {"name": "noisy", "eps": 0.1, "scorer": {"name": "multi_gate", "num_tasks": 7}}),
        ({"name": "unheard_of", "num_tasks": 3}, 0, {"name": "unheard_of", "num_tasks": 3}),
    ],
)
def test_scorers_are_made_for_the_tasks_there_are(scorer, known, made):
    assert tasks_in(scorer) == known
    assert with_tasks(scorer, 7) == made
    assert INSIDE["scorer"]["num_tasks"] == 4, "what was given stays as it was"
