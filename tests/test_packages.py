"""What is installed beside the code: the manual page, extras, the image, the demo."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
from types import ModuleType

import pytest
from places import ROOT
from typer.main import get_command

from curvcli.analysis import doctor
from curvcli.cli import app

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_man", ROOT / "docs" / "write_man.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_manual_page_is_up_to_date_and_installed(writer: ModuleType) -> None:
    assert writer.PAGE.read_text() == writer.page(), "run python docs/write_man.py"
    shared = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    assert {(ROOT / source).resolve(): place for source, place in shared.items()} == {
        writer.PAGE: "share/man/man1/curv.1"
    }  # fmt: skip


def test_it_has_every_verb_and_option(writer: ModuleType) -> None:
    text = writer.page().replace(r"\-", "-")
    for name, verb in get_command(app).commands.items():  # type: ignore[attr-defined]
        section = text.split(f".SS curv {name} ")[1].split(".SS")[0]
        for parameter in verb.params:
            for option in parameter.opts:
                if option.startswith("-") and not getattr(parameter, "hidden", False):
                    assert f"\\fB{option}\\fR" in section, (name, option)


def test_roff_obeys_nothing_of_the_text(writer: ModuleType) -> None:
    assert writer._plain(".so /etc/passwd") == r"\&.so /etc/passwd"
    assert writer._plain("a\\b -x") == r"a\eb \-x"
    known = (".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".I", ".nf", ".fi", r".\"")
    assert not [line for line in writer.page().splitlines() if line.startswith((".", "'")) and not line.startswith(known)]


def test_groff_has_no_complaint(writer: ModuleType) -> None:
    if shutil.which("groff") is None:
        pytest.skip("no groff")
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", writer.PAGE],  # noqa: S607
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    shown = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    assert "--max-rho" in shown


def test_remedies_name_extras_that_exist() -> None:
    for package, _, remedy in doctor._EXTRAS:
        (extra,) = re.findall(r"curvcli\[(\w+)\]", remedy)
        assert any(line.startswith(package) for line in EXTRAS[extra]), (package, extra)


def test_the_image_copies_what_is_there_and_installs_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in kept, "the build would not see it"
    for extra in re.findall(r"/src\[(\w+)\]", text):
        assert extra in EXTRAS
    readme = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["fragments"]
    assert {fragment["path"] for fragment in readme} <= set(re.findall(r"\S+\.md", text))


def test_every_test_dependency_that_an_extra_has_is_bounded_alike() -> None:
    tests = {re.split(r"[>=\[]", line)[0]: line for line in EXTRAS["test"]}
    for name in ("data", "lightning", "peft", "notebook", "s3", "gcs"):
        for line in EXTRAS[name]:
            assert tests[re.split(r"[>=\[]", line)[0]] == line
