#!/usr/bin/env python3
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""Every job of the project. ``python3 noxfile.py -s demo`` needs nothing but Python.

With nox installed, ``nox -s demo`` does the same; ``nox -l`` lists the sessions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def bootstrap() -> None:
    """Install nox into a private environment and run this file again with it."""
    home = ROOT / ".nox" / "bootstrap"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "ready").exists():
        print("Setting up nox in .nox/bootstrap (once) ...", flush=True)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "nox>=2025.2.9"], check=True
        )
        (home / "ready").touch()
    raise SystemExit(
        subprocess.run([python, __file__, *sys.argv[1:]], check=False).returncode
    )


try:
    import nox
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    bootstrap()

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typecheck", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")
# Machines without a GPU: keeps pip from taking gigabytes of CUDA packages.
CONSTRAINTS = "constraints/cpu.txt"


def install(session: nox.Session, *groups: str) -> None:
    """Install both packages, editable, and the given dependency groups."""
    session.install(
        "-c",
        CONSTRAINTS,
        "-e",
        "packages/hmatrix",
        "-e",
        "packages/sylva_train",
        *nox.project.dependency_groups(PROJECT, *groups),
    )


def pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Run pytest, offline: no test may reach for a model hub."""
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | env
    session.run("pytest", *args, *session.posargs, env=env)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Score, sparsify, fine-tune and evaluate MiniLM beside its rivals (CPU)."""
    install(session, "demo")
    session.run("sylva", "demo", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the default tests (CPU, a few minutes on two cores)."""
    install(session, "test")
    # One BLAS thread for each of the workers: more only fight over the cores.
    env = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
    pytest(session, "-n", "2", "-m", "not property and not gpu", **env)


@nox.session(default=False)
def property(session: nox.Session) -> None:
    """Run the long hypothesis profile and every slow property."""
    install(session, "test")
    env = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "nightly"}
    pytest(session, "-n", "2", "-m", "not gpu", **env)


@nox.session(default=False)
def peers(session: nox.Session) -> None:
    """Hold Kronecker factors against kronfluence and curvlinops, choices against lm-eval."""
    install(session, "test", "peers")
    # They ask for torchvision and more, of which nothing here makes use.
    libraries = ("kronfluence==1.0.1", "curvlinops-for-pytorch==3.0.1")
    session.install("--no-deps", *libraries, "backpack-for-pytorch>=1.6")
    session.install("-c", CONSTRAINTS, "lm-eval==0.4.13")
    pytest(session, "tests/sylva_train/test_peers.py")


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the default tests with the oldest versions that the packages allow."""
    packages = [Path("packages") / name for name in ("hmatrix", "sylva_train")]
    wanted = list(nox.project.dependency_groups(PROJECT, "test"))
    for package in packages:
        project = nox.project.load_toml(package / "pyproject.toml")["project"]
        wanted += project["dependencies"]
    # Matplotlib of then with pyparsing of now warns, and warnings are errors in tests.
    session.install(
        *(one.replace(">=", "==") for one in wanted if not one.startswith("hmatrix")),
        "pyparsing<3.3",
    )
    for package in packages:
        session.install("--no-deps", "-e", str(package))
    env = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
    ignored = ("-W", "ignore::DeprecationWarning")  # typer of then, with click of now
    pytest(session, "-n", "2", "-m", "not property and not gpu", *ignored, **env)


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run every test, the CUDA ones too, in the current environment."""
    src = os.pathsep.join(
        str(ROOT / "packages" / name / "src") for name in ("hmatrix", "sylva_train")
    )
    session.run(
        "python3",
        "-m",
        "pytest",
        *(session.posargs or ["-m", "not property"]),
        env={"PYTHONPATH": src, "HF_HUB_OFFLINE": "1"},
        external=True,
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types with mypy --strict."""
    install(session, "typecheck")
    session.run("mypy", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors, and run its examples."""
    install(session, "docs", "demo", "metrics")
    for builder in ("html", "doctest"):
        session.run(
            "sphinx-build", "-W", "-b", builder, "docs", f"docs/_build/{builder}"
        )


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run the CPU's benchmarks, or those named; each writes benchmarks/results."""
    install(session, "demo")
    scripts = [
        str(path)
        for path in sorted(Path("benchmarks").glob("bench_*.py"))
        if not path.stem.endswith("_gpu")
    ]
    for script in session.posargs or scripts:
        session.run("python", script, env={"HF_HUB_OFFLINE": "1"})


if __name__ == "__main__":
    os.chdir(ROOT)
    nox.main()
