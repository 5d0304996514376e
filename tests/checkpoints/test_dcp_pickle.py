"""The machine that reads `.metadata`, held against Python's own unpickler."""

from __future__ import annotations

import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from curvcli.checkpoints.formats import dcp_pickle

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | DTYPES
SIZES = st.lists(st.integers(0, 2**40), max_size=6).map(torch.Size)
DOCUMENTS = st.recursive(
    PLAIN | SIZES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
    ),
    max_leaves=40,
)


@given(document=DOCUMENTS, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_reads_what_python_reads(document: object, protocol: int) -> None:
    # Integers of more than 255 bytes, and text of more than 4 GiB, are in no metadata and not known here.
    assert dcp_pickle.load(pickle.dumps(document, protocol=protocol)) == document


# Up to more than a thousand: Python writes so many items of a list at a time, and references of one byte end at 255.
@given(shared=SIZES, count=st.sampled_from([1, 2, 255, 256, 1001]), protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_records_and_what_they_share(shared: torch.Size, count: int, protocol: int) -> None:
    pieces = [ChunkStorageMetadata(offsets=shared, sizes=torch.Size([n])) for n in range(count)]
    index = {MetadataIndex("w", torch.Size([n, *shared])): n for n in range(count)}
    read_pieces, read_index = dcp_pickle.load(pickle.dumps((pieces, index), protocol=protocol))
    assert [(piece["offsets"], piece["sizes"]) for piece in read_pieces] == [(shared, (n,)) for n in range(count)]
    assert [(key["fqn"], key["offset"], n) for key, n in read_index.items()] == [
        ("w", (n, *shared), n) for n in range(count)
    ]


def _member(module: str, name: str) -> bytes:
    """getattr of a class and a name, as Python 3.11.0 to 3.11.3 write a member of an enumeration."""
    return (
        pickle.PROTO
        + b"\x04cbuiltins\ngetattr\nc"
        + f"{module}\n{name}\n".encode()
        + pickle.dumps("a", 4)[11:-2]
        + b"\x86R."
    )


def test_a_member_of_an_enumeration_by_its_name_is_a_record() -> None:
    found = dcp_pickle.load(_member("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"))
    assert isinstance(found, dcp_pickle.Record)
    for module, name in (("torch", "Size"), ("torch", "float32"), ("builtins", "getattr")):
        with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr"):
            dcp_pickle.load(_member(module, name))


@given(document=DOCUMENTS, cut=st.floats(0, 1, exclude_max=True))
def test_cut_short_is_an_error_and_no_shorter_document(document: object, cut: float) -> None:
    data = pickle.dumps(document)
    with pytest.raises((IndexError, UnicodeDecodeError, struct.error)):
        dcp_pickle.load(data[: int(cut * len(data))])


LIST = b"\x80\x04](" + b"K\x01" * 8 + b"e"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x04Nr\xff\xff\xff\x7f.", id="a gap of gigabytes in the memo"),
        pytest.param(b"\x80\x04ctorch\nSize\n" + LIST[2:] + b"\x85R.", id="a size made of a list, copied as often as asked"),
        pytest.param(b"\x80\x04}K\x01\x85K\x02s.", id="a tuple for a key"),
        pytest.param(LIST + b"]K\x01sN.", id="an item of a list set"),
        pytest.param(b"\x80\x04K\x05)R.", id="a number called"),
        pytest.param(b"\x80\x04ctorch\nfloat32\n)R.", id="a dtype called"),
        pytest.param(b"\x80\x04ctorch\nfloat32\n}b.", id="a dtype built"),
        pytest.param(b"\x80\x05\x96" + b"\xff" * 8 + b".", id="a bytearray"),
        pytest.param(b"\x80\x04\x8f.", id="a set"),
        pytest.param(b"\x80\x04K\x05Q.", id="a persistent id"),
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        dcp_pickle.load(data)


def test_a_name_is_looked_up_nowhere() -> None:
    for module, name in (
        ("torch", "load"),
        ("torch", "nn"),
        ("os", "system"),
        ("builtins", "tuple"),
        ("torch.utils", "data"),
    ):
        with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name}"):
            dcp_pickle.load(f"c{module}\n{name}\n.".encode())
