"""Objects of other classes in files of torch.save: records of what the file says, and nothing in them runs."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import pathlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import Evil, one_line
from tiny import build

from curvcli.errors import InputError
from curvcli.files.foreign import Foreign
from curvcli.files.safe import load_pickle


@dataclasses.dataclass
class Settings:
    """A training script's own class, saved beside the weights."""

    lr: float = 1e-3


Settings.__module__ = "__main__"


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_foreign_objects_are_records(form: str, tmp_path: Path) -> None:
    saved = {
        "args": argparse.Namespace(lr=0.1), "settings": Settings(), "path": pathlib.PurePosixPath("a/b"),
        "best": np.float64(2.5), "rng": np.arange(3), "t": torch.ones(2),
    }  # fmt: skip
    sys.modules["__main__"].Settings = Settings  # type: ignore[attr-defined]
    try:
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "zip")
    finally:
        del sys.modules["__main__"].Settings  # type: ignore[attr-defined]
    before = set(torch.serialization.get_safe_globals())
    found = load_pickle(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    assert {key: type(value).__mro__[-2] for key, value in found.items() if key != "t"} == {
        key: Foreign for key in saved if key != "t"
    }
    assert found["args"].attributes == {"lr": 0.1}
    assert found["settings"].attributes == {"lr": 1e-3}
    assert "/".join(found["path"].arguments) == "a/b"  # in one piece from Python 3.13 on
    assert repr(found["args"]) == "<argparse.Namespace, not loaded>"


def test_transformers_own_arguments(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    torch.save(TrainingArguments(str(tmp_path), learning_rate=3e-4, use_cpu=True), tmp_path / "training_args.bin")
    assert load_pickle(tmp_path / "training_args.bin").attributes["learning_rate"] == 3e-4


class Runs:
    """In a pickle: a call of a named function, with a state set on what it returns."""

    def __init__(self, function: str, *arguments: object, state: object = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def bytes(self) -> bytes:
        def op(value: object) -> bytes:
            return value.bytes() if isinstance(value, Runs) else pickle.dumps(value, 2)[2:-1]

        module, _, name = self.function.rpartition(".")
        call = f"c{module}\n{name}\n".encode() + b"(" + b"".join(op(a) for a in self.arguments) + b"tR"
        return call + (op(self.state) + b"b" if self.state is not None else b"")


def _with_pickle(path: Path, value: Runs) -> Path:
    """A good file of torch.save with another pickle in it."""
    import zipfile

    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, b"\x80\x02" + value.bytes() + b"." if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("form", ["call", "argument", "state"])
@pytest.mark.parametrize("function", ["os.system", "subprocess.call", "builtins.eval", "builtins.exec", "builtins.getattr"])
def test_functions_that_act_are_refused_wherever_they_stand(function: str, form: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    act = Runs(function, f"touch {trap}" if "." in function and "builtins" not in function else f"open({str(trap)!r}, 'w')")
    value = {
        "call": act,
        "argument": Runs("argparse.Namespace", act),
        "state": Runs("argparse.Namespace", state=act),
    }[form]
    with pytest.raises(InputError, match=function.rpartition(".")[2]):
        load_pickle(_with_pickle(tmp_path / "a.pt", value))
    assert not trap.exists()


class Old(enum.Enum):
    """Written down as Python 3.11.0 to 3.11.3 do every enumeration: by getattr."""

    FULL = 2
    __module__ = "__main__"

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return getattr, (type(self), self.name)


def test_a_member_of_an_enumeration_by_its_name_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "Old", Old, raising=False)
    torch.save({"stage": Old.FULL, "t": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)
    found = load_pickle(tmp_path / "a.pt")["stage"]
    assert isinstance(found, Foreign)
    assert (found.name, found.arguments) == ("__main__.Old", ("FULL",))


@pytest.mark.parametrize("arguments", [("torch", "os"), (Runs("argparse.Namespace"), "__init__"), (), (1,)])
def test_getattr_of_anything_else_is_refused(arguments: tuple[object, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"builtins\.getattr"):
        load_pickle(_with_pickle(tmp_path / "a.pt", Runs("builtins.getattr", *arguments)))


def test_a_function_under_a_good_name_is_never_called(tmp_path: Path) -> None:
    """numpy.testing's runstring executes its text; the package is one that is stood in for."""
    trap = tmp_path / "executed"
    text = f"open({str(trap)!r}, 'w')"
    from numpy.testing._private.utils import runstring

    runstring(text, {})
    assert trap.exists(), "the payload itself works"
    trap.unlink()
    name = "numpy.testing._private.utils.runstring"
    found = load_pickle(_with_pickle(tmp_path / "a.pt", Runs(name, text, {}, state={"__class__": 1, "__setstate__": 2})))
    assert isinstance(found, Foreign)
    assert found.arguments == (text, {})
    assert not trap.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "epoch=0-step=2.ckpt"])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_nothing_is_executed(name: str, form: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save(
        {"state_dict": build().state_dict(), "pytorch-lightning_version": "2.6", "hyper_parameters": Evil(trap)},
        tmp_path / name,
        _use_new_zipfile_serialization=form == "zip",
    )
    assert "system" in one_line([str(tmp_path / name)])
    assert not trap.exists()
