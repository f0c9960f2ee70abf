"""docs/systems.md is what its generator writes now, and no system is without a proof."""

import importlib.util

import pytest

import molora
from molora.paths import recipes_dir


@pytest.fixture(scope="module")
def generator():
    path = recipes_dir().parent / "docs" / "make_systems.py"
    spec = importlib.util.spec_from_file_location("make_systems", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(generator):
    return generator.page()


def test_the_page_is_up_to_date(generator, page):
    assert generator.PAGE.read_text(encoding="utf-8") == page, "run make docs"


@pytest.mark.parametrize("recipe", molora.recipes())
def test_every_system_has_parts_a_paper_a_difference_and_a_proof(page, recipe):
    (row,) = [line for line in page.splitlines() if line.startswith(f"| [{recipe}](")]
    cells = [cell.strip() for cell in row.strip("|").replace("\\|", "/").split(" | ")]
    assert len(cells) == 4 and all(cells), f"empty cell in the row of {recipe}: {cells}"
    assert "arXiv" in cells[0] or recipe == "lora"


def test_a_recipe_without_a_proof_would_be_seen(generator, monkeypatch):
    monkeypatch.setattr(generator, "proofs", dict)
    assert generator.page().splitlines()[-1].rstrip().endswith("|  |")
