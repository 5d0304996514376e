"""Files that claim more than they hold: refused in one line, before memory or time is given to them."""

from __future__ import annotations

import json
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pace import in_time
from safetensors.torch import load_file, save_file

from curvcli.checkpoints import open_checkpoint
from curvcli.errors import CurvError, InputError
from curvcli.files.limits import check_config, check_document, inside
from curvcli.files.safe import load_bytes, load_pickle, read_json
from curvcli.files.tensors import safetensors_header

MANY = 10**12


def _op(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle torch.save writes for a float32 tensor, with any claim."""
    storage = b"(" + _op("storage") + b"ctorch\nFloatStorage\n" + _op("0") + _op("cpu") + _op(numel) + b"tQ"
    rest = _op(0) + _op(size) + _op(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."


def _call(module: str, name: str, *arguments: object) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + _op(arguments) + b"R."


def _laughs() -> bytes:
    """Thirty lists, each of ten references to the one before: ten lines that print 10^30 numbers."""
    value: object = 0
    for _ in range(30):
        value = [value] * 10
    return pickle.dumps(value, 2)


def _loop() -> bytes:
    value: list[object] = []
    value.append(value)
    return pickle.dumps(value, 2)


PICKLES: dict[str, tuple[bytes, str]] = {
    "storage of terabytes": (_tensor(MANY, (MANY,), (1,)), ""),
    "shape of terabytes": (_tensor(16, (MANY,), (1,)), ""),
    "one value repeated to terabytes": (_tensor(16, (10**6, 10**6), (0, 0)), "of which the file stores"),
    "storage past its record": (_tensor(10**6, (10**6,), (1,)), ""),
    "negative storage": (_tensor(-5, (2,), (1,)), ""),
    "negative stride": (_tensor(16, (2,), (-1,)), ""),
    "bytearray of terabytes": (_call("builtins", "bytearray", MANY), "bytearray"),
    "tensor made from a number": (_call("torch", "FloatTensor", MANY), "FloatTensor"),
    "quantized": (_call("torch._utils", "_rebuild_qtensor", 1), "_rebuild_qtensor"),
    "lists in lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nests deeper"),
    "a list that holds itself": (_loop(), "nests deeper"),
    "a short text that unfolds for ever": (_laughs(), "unfolds into"),
    "an integer of a megabit": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "an integer of"),
    "cut short": (_tensor(16, (16,), (1,))[:-20], "it was not loaded"),
}


def _archive(path: Path, text: bytes, data: bytes = b"\0" * 64) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
    return path


def _refused(call: Callable[[], object], *said: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CurvError) as caught:
        call()
    line = str(caught.value)
    assert any(part in line for part in said), line
    assert "\n" not in line
    assert len(line) < 600
    assert in_time(time.perf_counter() - start, 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_claims_more_than_it_holds(name: str, meta: bool, tmp_path: Path) -> None:
    text, said = PICKLES[name]
    file = _archive(tmp_path / "optimizer.pt", text)
    if meta and name.startswith("negative"):
        return  # a shape is read, and no data for it
    _refused(lambda: load_pickle(file, meta=meta), said)


def test_the_crafted_pickle_is_else_a_good_one(tmp_path: Path) -> None:
    file = _archive(tmp_path / "a.pt", _tensor(16, (4, 4), (4, 1)))
    assert load_pickle(file).shape == (4, 4)
    attributed = torch.nn.Parameter(torch.ones(3))
    attributed.note = "kept"  # type: ignore[attr-defined]
    torch.save({"p": attributed, "view": torch.arange(6.0).view(2, 3).t(), "empty": torch.empty(0)}, file)
    assert load_pickle(file)["p"].shape == (3,)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_tied_and_transposed_tensors_are_no_attack(form: str, tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    torch.save(
        {"a": weight, "b": weight, "t": weight.t(), "row": weight[2]},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=form == "zip",
    )
    assert load_pickle(tmp_path / "a.pt")["t"].shape == (4, 6)
    if form == "zip":
        assert load_pickle(tmp_path / "a.pt", meta=True)["row"].shape == (4,)


def test_a_legacy_file_of_terabytes(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    torch.save(torch.zeros(16), file, _use_new_zipfile_serialization=False)
    text = file.read_bytes()
    assert text.count(b"K\x10") >= 1
    file.write_bytes(text.replace(b"K\x10", b"\x8a\x05" + MANY.to_bytes(5, "little")))
    _refused(lambda: load_pickle(file), "")


def _overlapping(path: Path) -> None:
    """Twenty names in the directory of the archive for one record."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/0", b"\0" * 4096)
        first = archive.infolist()[0]
        for index in range(1, 20):
            twin = zipfile.ZipInfo(f"a/data/{index}")
            twin.header_offset, twin.file_size, twin.compress_size, twin.CRC = 0, 4096, 4096, first.CRC
            archive.filelist.append(twin)


def _two_of_a_name(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        archive.filelist.append(archive.infolist()[0])
        archive.writestr("a/pad", b"2" * 100)


def _climbing(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../etc/x", b"1")


def _long(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N" * (2**26 + 1))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_long, "bytes, data apart"),
        (_overlapping, "in a file of"),
        (_two_of_a_name, "two records"),
        (_climbing, "'../../etc/x'"),
    ],
)
def test_archives_that_no_torch_wrote(write: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    write(tmp_path / "a.pt")
    # A zipfile with the fix of CVE-2024-0450, as Debian's, sees some of them first.
    _refused(lambda: load_pickle(tmp_path / "a.pt"), said, "Overlapped entries")


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [MANY], "data_offsets": [0, 4 * MANY]}},
        {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_a_safetensors_header_that_claims_terabytes(header: dict, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    _refused(lambda: safetensors_header(tmp_path / "m.safetensors"), "m.safetensors")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, '{"a": 1' + "0" * 5000 + "}", "\ud800", ""])
def test_json_of_absurd_depth_or_size(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    _refused(lambda: read_json(tmp_path / "a.json"), "not readable JSON")


def test_json_larger_than_any(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(2**40)
    _refused(lambda: read_json(tmp_path / "a.json"), "larger than")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**5},
        {"intermediate_size": 10**12},
        {"vocab_size": 10**12},
        {"vocab_size": 10**400},
        {"num_attention_heads": 10**7},
        {"head_dim": 10**10},
        {"max_position_embeddings": -1},
        {"hidden_size": -32},
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"rms_norm_eps": None},
        {"architectures": {"a": 1}},
        {"architectures": 7},
        {"text_config": [1]},
        {"hidden_act": "os.system"},
        {"layer_types": ["x"] * 8},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 10**9},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 90_000},
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**5},
    ],
    ids=str,
)
def test_a_configuration_that_asks_for_the_machine(change: dict, run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **change}))

    def read() -> None:
        checkpoint = open_checkpoint(run)
        model = checkpoint.model()
        if "max_position_embeddings" in change or "architectures" in change or "text_config" in change:
            # Says nothing about the weights: the model is the one that was trained.
            assert sum(p.numel() for p in model.parameters()) == 123_424
            raise InputError("harmless")

    _refused(read, "")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "", ".", "sub/../../a", "out", "a\0b", "folder"])
def test_no_path_leaves_the_directory(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "a").write_text("")
    (home / "out").symlink_to(tmp_path / "a")
    (home / "folder").symlink_to(tmp_path)
    with pytest.raises(InputError, match="outside its directory"):
        inside(home, name + "/a" if name == "folder" else name)


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(InputError):
        inside(tmp_path, "a")


def test_paths_and_links_that_stay_are_fine(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b" / "snapshots" / "123"
    home.mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("")
    (home / "shard").symlink_to(blob)
    (home / "near").symlink_to(home / "shard")
    assert inside(home, "shard").exists()
    assert inside(home, "near").exists()
    assert inside(home, "sub/file") == home / "sub/file"
    (tmp_path / "link").symlink_to(home)
    assert inside(tmp_path / "link", "plain") == tmp_path / "link" / "plain"


def test_nothing_beside_the_weights_runs(run: Path, tmp_path: Path) -> None:
    """Code of a model's own, a chat template and a generation configuration lie there, and none is asked."""
    fired = tmp_path / "fired"
    (run / "modeling_evil.py").write_text(f"open({str(fired)!r}, 'w').close()\n")
    config = json.loads((run / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (run / "generation_config.json").write_text(json.dumps({"custom_generate": "evil", "max_length": 10**400}))
    try:
        open_checkpoint(run).model()
    except CurvError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert not fired.exists()


def test_inspect_of_a_huge_optimizer_reads_no_data(tmp_path: Path, run: Path) -> None:
    """Four gigabytes of moments, of which only the archive's directory and its pickle are looked at."""
    file = run / "optimizer.pt"
    with torch.serialization.skip_data():
        # Empty tensors that nobody touches are addresses and no memory.
        state = {i: {"step": torch.tensor(5.0), "exp_avg_sq": torch.empty(2**28)} for i in range(4)}
        torch.save({"state": state, "param_groups": [{"lr": 1.0, "params": list(range(4))}]}, file)
    assert file.stat().st_size > 4e9
    start = time.perf_counter()
    found = open_checkpoint(run).optimizer
    assert found is not None
    assert found.summary()["parameters with state"] == 4
    assert in_time(time.perf_counter() - start, 5)


def test_tensors_of_another_shape_are_refused(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
    _refused(lambda: open_checkpoint(run).model(), "")


def test_sparse_tensors_and_pieces_of_ranks_are_no_weights(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse_csr()}, tmp_path / "a.pt")
    _refused(lambda: load_pickle(tmp_path / "a.pt"), "sparse")
    for odd in (torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)):
        with pytest.raises(InputError, match="sparse, nested or quantized"):
            check_document({"w": odd}, "x", 100)
    with pytest.raises(InputError, match=r"one rank's piece"):
        check_document({"w": torch.ones(3).as_subclass(_Piece)}, "x", 100)


class _Piece(torch.Tensor):
    """Stands for DTensor, which takes a process group to make."""


@pytest.mark.parametrize("entry", [{"a": float("nan")}, {"a": 2**60}, {"b": {"num_layers": [10**6]}}, {"n_head": 10**6}])
def test_numbers_of_a_configuration_that_none_has(entry: dict) -> None:
    check_config({"rope_theta": 1e6, "vocab_size": 10**6, "num_layers": 126, "tied": True}, Path("x"))
    with pytest.raises(InputError, match="out of any range"):
        check_config(entry, Path("x"))


def test_a_part_of_a_file_that_is_no_record() -> None:
    with pytest.raises(InputError, match=r"is no torch\.save record"):
        load_bytes(b"\x80\x02N." * 20, "x")


def test_more_classes_than_any_checkpoint_names(tmp_path: Path) -> None:
    """Each would be a class made for it."""

    def naming(count: int) -> bytes:
        return b"\x80\x02]" + b"".join(f"cmegatron.x\nC{i}\na".encode() for i in range(count)) + b"."

    assert len(load_pickle(_archive(tmp_path / "few.pt", naming(256)))) == 256
    _refused(lambda: load_pickle(_archive(tmp_path / "many.pt", naming(257))), "it was not loaded")
