"""Heat-maps: the numbers behind the colours, what is labelled, and the file."""

import builtins
import sys

import numpy as np
import pytest
import torch

from molora.errors import ConfigError
from molora.reports.heatmap import draw, share_matrix, write_png
from molora.routing.metrics import Usage
from molora.routing.trace import Site
from molora.routing.types import Context, Routing

pytest.importorskip("matplotlib")


def record(usage, site, choices, experts, task=0):
    gates = torch.nn.functional.one_hot(torch.tensor([choices]), experts).float()
    usage(Site(site, "default", site), Routing(gates, gates, gates), Context(task_ids=torch.tensor([task])))


@pytest.fixture
def usage():
    """Two tasks that use different experts in layer 0 of two; layer 1 has three experts."""
    usage = Usage(["news", "mood"])
    record(usage, "model.layers.0.up", [0, 0, 0, 1], 2, task=0)
    record(usage, "model.layers.0.up", [1, 1, 1, 1], 2, task=1)
    record(usage, "model.layers.1.up", [0, 1], 3, task=0)
    return usage


def test_the_numbers(usage):
    nan = np.nan
    np.testing.assert_allclose(share_matrix(usage), [[3 / 8, 5 / 8, nan], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(share_matrix(usage, "mood"), [[0, 1, nan], [nan, nan, nan]])


def images(figure):
    return [axes.images[0] for axes in figure.axes if axes.images and axes.get_title()]


def test_panels_show_shares_and_what_tasks_differ_by(usage):
    figure = draw(usage, "a title")
    everything, news, mood = images(figure)
    np.testing.assert_allclose(everything.get_array().filled(np.nan), share_matrix(usage))
    points = [[3 / 8 * 100, -3 / 8 * 100, np.nan], [0, 0, 0]]
    np.testing.assert_allclose(news.get_array().filled(np.nan), points, atol=1e-9)
    assert everything.get_clim()[0] == 0
    assert news.get_clim() == mood.get_clim() == (-37.5, 37.5)  # even around zero, and the same for all tasks
    assert (everything.get_cmap().name, news.get_cmap().name) == ("cividis", "PuOr_r")
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0.up", "1.up"]
    # the dead expert 2 of layer 1 is crossed out
    assert first.collections[0].get_offsets().tolist() == [[2.0, 1.0]]
    assert figure.get_suptitle() == "a title"


def test_one_task_has_one_panel():
    usage = Usage(["only"])
    record(usage, "a.0.x", [0, 1], 2)
    figure = draw(usage)
    assert len([axes for axes in figure.axes if axes.images]) == 1
    assert "even: 0.5" in figure.axes[1].get_xlabel()


def test_many_layers_are_labelled_by_block():
    usage = Usage()
    for block in range(30):
        for name in ("q", "k", "v"):
            record(usage, f"model.layers.{block}.{name}", [0, 1], 2)
    axes = draw(usage).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(block) for block in range(30)]
    assert list(axes.get_yticks()) == [3 * block for block in range(30)]
    assert axes.get_ylabel() == "block"


def test_the_file(usage, tmp_path):
    path = write_png(usage, tmp_path / "new" / "map.png", "title")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 10_000
    assert [p.name for p in path.parent.iterdir()] == ["map.png"]
    write_png(usage, path)  # again over the old one


def test_no_display_is_chosen_for_the_process(usage, tmp_path):
    write_png(usage, tmp_path / "map.png")
    assert "matplotlib.pyplot" not in sys.modules or "agg" in sys.modules["matplotlib"].get_backend().lower()


def test_nothing_to_draw():
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw(Usage())


def test_matplotlib_is_optional(usage, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'molora\[report\]'"):
        draw(usage)
