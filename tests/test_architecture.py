"""Imports run one way, and optional libraries have one door each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"

# A module (or folder) may import only from those to its left.
ORDER = {
    "hmatrix": "_backend _checks tree _entries lowrank _operator hodlr mlr construct update "
    "arithmetic factor interop io plot",
    "sylva_train": "_checks _files _torch _artifacts _identity processes progress metrics options model_classes config config_files "
    "targets kernels masks curvature importance selection overlaps layers "
    "optimizer tuner checkpoint data pretrained evaluation training baselines "
    "workflow comparison report reproduce cli",
}
# The only modules that may import the library.
DOORS = {
    ("hmatrix", "cupy"): {"_backend", "interop"},
    ("hmatrix", "torch"): {"_backend", "interop"},
    ("hmatrix", "matplotlib"): {"plot"},
    ("sylva_train", "hmatrix"): {"curvature"},
    ("sylva_train", "triton"): {"kernels"},
    ("sylva_train", "sacrebleu"): {"evaluation"},
    ("sylva_train", "nltk"): {"evaluation"},
    ("sylva_train", "rouge_score"): {"evaluation"},
    ("sylva_train", "pycocoevalcap"): {"evaluation"},
    ("sylva_train", "typer"): {"cli"},
}


def rooms(package: str) -> dict[str, list[Path]]:
    """Files of each module or folder of a package, but its root ``__init__``."""
    root = PACKAGES / package / "src" / package
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).parts[0].removesuffix(".py")
        if name not in {"__init__", "__main__"}:
            found.setdefault(name, []).append(path)
    return found


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module but those under ``if TYPE_CHECKING``, which never run."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from running(node)


def imports(path: Path, package: str) -> Iterator[tuple[str, ...]]:
    """Dotted names that a file imports, relative ones made absolute."""
    root = PACKAGES / package / "src"
    here = (*path.relative_to(root).with_suffix("").parts,)
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            stem = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*stem, alias.name) for alias in node.names)


@pytest.mark.parametrize("package", ORDER)
def test_modules_import_only_from_those_before_them(package):
    order = ORDER[package].split()
    assert set(rooms(package)) <= set(order), "name new modules in ORDER"
    wrong = []
    for name, paths in rooms(package).items():
        for path in paths:
            for target in imports(path, package):
                if target[0] != package or len(target) < 2 or target[1] == name:
                    continue
                later = target[1] in order and order.index(target[1]) > order.index(
                    name
                )
                if later or target[1] not in order:
                    wrong.append(f"{path.name} imports {'.'.join(target)}")
    assert not wrong


@pytest.mark.parametrize("package", ORDER)
def test_no_module_reaches_into_another_room(package):
    wrong = [
        f"{path.name} imports {'.'.join(target)}"
        for name, paths in rooms(package).items()
        for path in paths
        for target in imports(path, package)
        if target[0] == package and len(target) > 3 and target[1] != name
    ]
    assert not wrong, "import from the room itself, which exports what others need"


@pytest.mark.parametrize(("package", "library"), DOORS)
def test_each_optional_library_has_its_door(package, library):
    doors = DOORS[package, library]
    wrong = [
        path.name
        for name, paths in rooms(package).items()
        for path in paths
        if name not in doors and any(t[0] == library for t in imports(path, package))
    ]
    assert not wrong


def test_hmatrix_knows_nothing_of_training():
    strangers = {"sylva_train", "transformers", "peft", "datasets"}
    for paths in rooms("hmatrix").values():
        for path in paths:
            assert not strangers & {target[0] for target in imports(path, "hmatrix")}
