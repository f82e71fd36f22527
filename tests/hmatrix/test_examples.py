"""Every example in the package's documentation runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import hmatrix

MODULES = [
    module.name for module in pkgutil.walk_packages(hmatrix.__path__, "hmatrix.")
]
README = Path(__file__).parents[2] / "packages" / "hmatrix" / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    # Nothing of the module's own: a reader has only what the example imports.
    failed, _ = doctest.testmod(importlib.import_module(name), globs={})
    assert not failed


def test_readme_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})  # noqa: S102


def test_the_public_names_are_there_and_documented():
    for name in hmatrix.__all__:
        assert getattr(hmatrix, name).__doc__, f"{name} has no docstring"
