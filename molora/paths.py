"""Where the files that come with molora are: recipes and the adapter library, in a checkout or in a wheel."""

from __future__ import annotations

from pathlib import Path

from molora.errors import LoadError

_PACKAGE = Path(__file__).resolve().parent


def recipes_dir() -> Path:
    """Return the folder of the recipes that come with molora.

    Raises:
        LoadError: the installation does not hold it.
    """
    return _find("recipes")


def adapters_hub_dir() -> Path:
    """Return the folder of the adapter library that comes with molora.

    Raises:
        LoadError: the installation does not hold it.
    """
    return _find("adapters_hub")


def _find(name: str) -> Path:
    """`molora/_data/<name>` in a wheel, `<name>` beside the package in a checkout."""
    wheel, checkout = _PACKAGE / "_data" / name, _PACKAGE.parent / name
    if wheel.is_dir():
        return wheel
    # In site-packages the folder beside the package could be anybody's; a checkout has a pyproject.toml.
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise LoadError(f"folder '{name}' of molora is missing: looked in {wheel} and {checkout}; install molora again")
