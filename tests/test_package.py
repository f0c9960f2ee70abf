"""The package as others install it: metadata, and the files found from a checkout and from a wheel."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from molora import paths
from molora.errors import LoadError

ROOT = Path(__file__).resolve().parent.parent


def test_found_in_a_checkout():
    assert paths.recipes_dir() == ROOT / "recipes"
    assert paths.adapters_hub_dir() == ROOT / "adapters_hub"


def test_a_stranger_beside_the_package_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "molora")
    with pytest.raises(LoadError, match=r"folder 'recipes' of molora is missing.*install molora again"):
        paths.recipes_dir()


def test_every_pinned_version_is_exact_and_named_once_per_python():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*( ; python_version (<|>=) \"3\.11\")?", line), line
    names = [re.split("==", line)[0].lower() + line.partition(";")[2] for line in lines]
    assert len(names) == len(set(names))
    assert "torch==2.13.0" in lines


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from the working tree."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("molora-*.whl")
    return built


def test_wheel_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "adapters_hub"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        kept = {p.relative_to(ROOT) for p in files if not p.name.startswith(".")}  # a library's own index and lock
        assert kept
        missing = {f"molora/_data/{p.as_posix()}" for p in kept} - names
        assert not missing
    assert not [name for name in names if "/_data/adapters_hub/." in name]
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "molora").rglob("*.py")}
    assert sources <= names
    strangers = {n for n in names if not re.match(r"molora/|molora-[^/]+\.dist-info/", n)}
    assert not strangers
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_found_in_a_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from molora.paths import *; print(recipes_dir()); print(adapters_hub_dir())"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = (tmp_path / "site" / "molora" / "_data").resolve()
    assert done.stdout.split() == [str(data / "recipes"), str(data / "adapters_hub")]
