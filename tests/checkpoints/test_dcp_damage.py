"""torch.distributed.checkpoint: what is wrong with `.metadata` or the files beside it is one line, and nothing runs."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from refusals import Evil, one_line
from tiny import build, config
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError, UnsupportedError
from curvcli.models.base import Architecture


def _edit(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        document = pickle.loads((path / ".metadata").read_bytes())
        change(document)
        (path / ".metadata").write_bytes(pickle.dumps(document))

    return damage


def _place(document: Any, key: str = "model.model.norm.weight") -> Any:
    return next(place for index, place in document.storage_data.items() if index.fqn == key)


def _bigger(document: Any) -> None:
    described = document.state_dict_metadata["model.model.norm.weight"]
    described.size = described.chunks[0].sizes = torch.Size([2**50])


def _other(document: Any) -> None:
    """The norm's weight is said to lie where another of its shape does not."""
    source = _place(document, "model.model.embed_tokens.weight")
    target = _place(document)
    target.offset, target.length = source.offset, source.length


def _overlap(document: Any) -> None:
    described = document.state_dict_metadata["model.model.norm.weight"]
    chunk = described.chunks[0]
    described.chunks = [chunk, chunk]
    described.size = torch.Size([32])


def _link(path: Path) -> None:
    (path / "__0_0.distcp").rename(path.parent / "elsewhere.distcp")
    (path / "__0_0.distcp").symlink_to(path.parent / "elsewhere.distcp")


def _write(data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / ".metadata").write_bytes(data)


def _truncate(name: str, keep: int) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:keep])


def _disks(path: Path) -> None:
    """The zip around the first hyperparameter says that it spans nine disks."""
    with (path / "__0_0.distcp").open("r+b") as file:
        file.seek(file.read(4096).index(b"PK\x06\x07") + 16)
        file.write(struct.pack("<I", 9))


_NESTED_KEY = b"\x80\x04}" + b"K\x01\x85" + b"2\x86" * 200 + b"K\x01s."
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is named in .metadata and missing"),
    "truncated file": (_truncate("__0_0.distcp", 90_000), "__0_0.distcp has 90000 bytes"),
    "zip of several disks": (_disks, "is a damaged zip: zipfiles that span"),
    "empty file": (_truncate("__0_0.distcp", 0), "__0_0.distcp has 0 bytes"),
    "truncated metadata": (_truncate(".metadata", 9_000), ".metadata is a damaged pickle"),
    "empty metadata": (_truncate(".metadata", 0), ".metadata is a damaged pickle"),
    "metadata is a list": (_write(pickle.dumps([1, 2])), ".metadata is not a checkpoint's metadata"),
    "parent directory": (_edit(lambda d: setattr(_place(d), "relative_path", "../x.distcp")), "outside its directory"),
    "absolute path": (_edit(lambda d: setattr(_place(d), "relative_path", "/etc/hostname")), "outside its directory"),
    "directory": (_edit(lambda d: setattr(_place(d), "relative_path", ".")), "outside its directory"),
    "link": (_link, "outside its directory"),
    "path is no name": (_edit(lambda d: setattr(_place(d), "relative_path", 3)), ".metadata is not a checkpoint's metadata"),
    "negative offset": (_edit(lambda d: setattr(_place(d), "offset", -9)), ".metadata is not a checkpoint's metadata"),
    "petabytes": (_edit(_bigger), "claims 4503599627370496 bytes"),
    "entry of another tensor": (_edit(_other), "(model.model.norm.weight) has shape (64, 16)"),
    "the same piece twice": (_edit(_overlap), "overlap"),
    "piece left out": (_edit(lambda d: d.state_dict_metadata["model.model.norm.weight"].chunks.clear()), "0 of its 16"),
    "outside": (
        _edit(lambda d: setattr(d.state_dict_metadata["model.model.norm.weight"], "size", torch.Size([4]))),
        "outside its shape",
    ),
    "entry not stored": (_edit(lambda d: d.storage_data.clear()), "does not say where"),
    "compressed": (_edit(lambda d: setattr(_place(d), "transform_descriptors", ["stream.zstd/1"])), "stored compressed"),
    # The three that take memory or forever in Python's own C unpickler or a plain one.
    "memo of 32 GiB": (_write(b"\x80\x04Nr" + struct.pack("<I", 2**31) + b"."), ".metadata is a damaged pickle"),
    "bytearray of 1 TiB": (_write(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), "damaged pickle (ValueError)"),
    "key that is never hashed": (_write(_NESTED_KEY), "damaged pickle (ValueError)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, nested: Path, trained: SimpleNamespace) -> None:
    damage, said = DAMAGE[case]
    damage(nested)
    assert said in one_line(
        [str(nested), "--data", str(trained.root / "ids.npy"), "--tokens", "64", "--sequence-length", "16"]
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_that_would_run_code_is_not_run(protocol: int, nested: Path, tmp_path: Path) -> None:
    fired, data = tmp_path / "fired", {}
    data["whole"] = pickle.dumps(Evil(fired), protocol=protocol)
    document = pickle.loads((nested / ".metadata").read_bytes())
    document.planner_data["model.model.norm.weight"] = Evil(fired)
    data["inside"] = pickle.dumps(document, protocol=max(2, protocol))
    for content in data.values():
        (nested / ".metadata").write_bytes(content)
        line = one_line([str(nested)])
        assert "posix.system" in line or "system" in line
        assert not fired.exists()
    pickle.loads(data["whole"])
    assert fired.exists(), "the sample is no live pickle"


def test_metadata_may_name_no_other_class(nested: Path) -> None:
    for target in (os.path.join, torch.compile, torch.nn.Linear, pickle.loads):
        (nested / ".metadata").write_bytes(pickle.dumps(target))
        with pytest.raises(InputError, match="nothing in it was run"):
            open_checkpoint(nested)


def test_a_hyperparameter_that_would_run_code_is_not_run(trained: SimpleNamespace, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    state = get_optimizer_state_dict(trained.model, trained.optimizer)
    state["param_groups"][1]["lr"] = Evil(fired)  # type: ignore[assignment, call-overload]
    dcp.save({"model": get_model_state_dict(trained.model), "optim": state}, checkpoint_id=tmp_path / "step-3")
    checkpoint = open_checkpoint(tmp_path / "step-3", Architecture("ours", build))
    assert checkpoint.optimizer is not None
    for read in (checkpoint.optimizer.summary, lambda: checkpoint.optimizer.view(checkpoint.model())):
        with pytest.raises(InputError, match=r"posix\.system"):
            read()
    assert not fired.exists()


def test_two_optimizers_and_two_models_are_not_guessed_between(trained: SimpleNamespace, tmp_path: Path) -> None:
    weights, state = get_model_state_dict(trained.model), get_optimizer_state_dict(trained.model, trained.optimizer)
    dcp.save({"model": weights, "optim": state, "second": state}, checkpoint_id=tmp_path / "a")
    config().save_pretrained(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    with pytest.raises(UnsupportedError, match="2 optimizers"):
        checkpoint.optimizer.view(checkpoint.model())
    dcp.save({"teacher": weights, "student": weights}, checkpoint_id=tmp_path / "b")
    with pytest.raises(InputError, match="several places"):
        open_checkpoint(tmp_path / "b")


# Several ranks.
