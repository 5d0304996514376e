"""Token ids as text, for people, without running anything of the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from curvcli.checkpoints.base import Checkpoint

_MOST = 64 * 2**20  # bytes of a tokenizer.json: those of a vocabulary of 256,000 have half of it
Words = Callable[[Sequence[int]], "str | None"]


def words_of(checkpoint: Checkpoint) -> Words:
    """What makes text of token ids: by tokenizer.json beside the checkpoint, as bytes for a vocabulary of 256, else None.

    The tokenizers library alone reads the file, which is data; where it is not installed or the file is none that it takes,
    there is no text.
    """
    decode = _by_file(checkpoint.tokenizer / "tokenizer.json") if checkpoint.tokenizer is not None else None
    if decode is not None:
        return decode
    if checkpoint.vocabulary == 256 and checkpoint.tokenizer is None:
        return lambda ids: bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")
    return lambda ids: None


def _by_file(file: Path) -> Words | None:
    if not file.is_file() or file.stat().st_size > _MOST:
        return None
    with suppress(Exception):  # not installed, or of another version: the library raises bare exceptions
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))

        def decode(ids: Sequence[int]) -> str | None:
            # -100 among labels.
            known = [i for i in ids if i >= 0]
            # Part of a character that takes several tokens decodes to nothing: then the tokenizer's own name for it.
            text = str(tokenizer.decode(known, skip_special_tokens=False))
            pieces = [tokenizer.id_to_token(i) for i in known]
            return text or "".join(piece for piece in pieces if piece) or None

        return decode
    return None
