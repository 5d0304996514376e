"""What CI runs, one step at a time: `nox` for lint, types and tests, `nox --list` for all of it.

.ci/run calls the sessions lint, types, docs, package and oldest in the environment that it has made (`--no-venv`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nox

VERDICT = re.compile(r"^ ([A-Z][A-Z ]*?) +rho ([\d.]+)", re.MULTILINE)
ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
# Tests that need no trainer and meet each dependency: documents, the command line, pages, products, the solver, networks of
# transformers. How help is framed is the newest typer's affair; in transformers 4 there are no experts'
# kernels to choose, and some networks (vit, albert, bloom, t5) have other names and ways within.
OLDEST = [
    "tests/test_readme.py",
    "tests/curvature/test_davidson.py",
    "tests/render/test_html.py",
    "tests/judge/test_gate.py",
    "tests/models/test_architectures.py",
]
FRAMED = "tests/test_readme.py::test_the_page_of_help_texts_is_up_to_date"
NEWER = "not (vit and found) and not albert and not bloom and not mixtral and not shared and not t5"

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and its layout."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on the package."""
    session.install("-e", ".[lint]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the slow ones, or those named behind --."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=["3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """A part of the tests on the newer Pythons that the classifiers name, and the demo."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "0", *(session.posargs or [*OLDEST, "tests/training/test_warmup.py"]))
    session.run("curv", "demo")


@nox.session
def slow(session: nox.Session) -> None:
    """The slow tests: training to its plateau, whole analyses of the samples."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-m", "slow", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Tests with a report of the lines that none reaches, also in subprocesses: build/coverage/html/index.html."""
    session.install("-e", ".[test]", "pytest-cov>=7")
    session.run("python", "-m", "pytest", "--cov", "--cov-report=term:skip-covered", "--cov-report=html", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in build/site. A warning is an error: a broken link, a name that the Python reference no longer finds."""
    session.install("-e", ".[docs]")
    # Not --quiet: warnings that are not shown are not counted either.
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and README's own example run from the wheel in an environment that has only it."""
    session.install("build", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", silent=True)
    built = sorted(str(path) for path in (ROOT / "dist").iterdir())
    session.run("twine", "check", "--strict", *built)
    (wheel,) = (path for path in built if path.endswith(".whl"))
    # What the Dockerfile copies is enough to install from: its RUN steps as far as a machine without docker goes.
    image = Path(session.create_tmp()) / "src"
    for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            place = image.parent / target.lstrip("/") / ("" if (ROOT / source).is_dir() else source)
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    session.run("python", "-m", "build", "--wheel", "--outdir", str(image / "dist"), str(image), silent=True)
    if "OWNER" in PROJECT["urls"]["Homepage"]:
        session.warn("OWNER stands for the project's home, in the metadata too: not to be published (CONTRIBUTING.md)")
    if dead := _relative_links(Path(wheel)):
        session.error(f"a package page has no file behind {dead[0]}")
    python = _clean_environment(session, "package", wheel)
    example, verdict, rho = _example()
    session.log(f"+ {example}")
    with session.chdir(session.create_tmp()):
        command = example.replace("sample_checkpoints", str(ROOT / "sample_checkpoints")).split()
        curv = str(Path(python).with_name(command[0]))
        printed = session.run(curv, *command[1:], external=True, silent=True, env={"PYTHONPATH": ""})
    session.log(printed)
    found = VERDICT.search(str(printed))
    # The last digit is the machine's: sums go in another order with another number of threads.
    if not found or found[1] != verdict or abs(float(found[2]) - rho) > 0.01 * rho:
        session.error(f"README shows {verdict} and rho {rho:g}")


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest releases that pyproject.toml allows. Not of torch: its old wheels are CUDA builds of gigabytes."""
    bounds = [re.match(r"([\w-]+)>=([\w.]+)", line) for line in PROJECT["dependencies"]]
    pinned = [f"{bound[1]}=={bound[2]}" for bound in bounds if bound and bound[1] != "torch"]
    assert len(pinned) == len(bounds) - 1, "a dependency has no lower bound"
    tools = ["hypothesis", "jsonschema", "pytest", "pytest-timeout", "pytest-xdist"]
    python = _clean_environment(session, "oldest", *pinned, "-e", str(ROOT), *tools)
    chosen = session.posargs or [*OLDEST, "--deselect", FRAMED, "-k", NEWER]
    session.run(python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *chosen, external=True)
    # A checkpoint of transformers, read, measured, drawn and written.
    out = session.create_tmp()
    analyze = [python, "-m", "curvcli", "analyze", str(ROOT / "sample_checkpoints" / "calm" / "checkpoint-10")]
    session.run(*analyze, "--no-depths", "--tokens=256", "-q", "--format=csv", f"--plot={out}/curv.png", external=True)


def _example() -> tuple[str, str, float]:
    """The command that README shows first, and the verdict and rho that it says come out."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, found = re.search(r"^\$ (curv [^\n]*)$", readme, re.MULTILINE), VERDICT.search(readme)
    assert command, "README.md shows no command"
    assert found, "README.md shows no verdict"
    return command[1], found[1], float(found[2])


def _relative_links(wheel: Path) -> list[str]:
    """Links and pictures of the package page that only a repository has."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(name).decode()
    return re.findall(r"\]\((?!\w+:|#)[^)]+\)", text)


def _clean_environment(session: nox.Session, name: str, *packages: str) -> str:
    """A new environment with these packages, and the path of its Python. The torch of this session is installed first."""
    place = BUILD / f"environment-{name}"
    shutil.rmtree(place, ignore_errors=True)
    session.run(sys.executable, "-m", "venv", str(place), external=True)
    python = str(place / "bin" / "python")
    torch = ["torch==" + _version("torch")] if _version("torch") else []
    session.run(python, "-m", "pip", "install", "-q", *torch, *packages, external=True)
    return python


def _version(name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}).partition('+')[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip()
