"""The one door for text from outside: names, paths and messages of files, on their way to a terminal or a document."""

from __future__ import annotations

import json
import re

# Nothing that a terminal obeys or that turns text around, and no surrogate, has a place in JSON either, where an escape
# says the same. Beyond the basic plane: tags, which nobody sees.
_HIDDEN = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def plain(text: str) -> str:
    """One line of what can be printed: other blanks become blanks, and control and formatting characters "?".

    A terminal obeys escape sequences, marks of direction turn a line around, and a line break forges a second line.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def visible_json(text: str) -> str:
    """JSON that says the same without a character that is not to be printed: each becomes its escape."""
    return _HIDDEN.sub(lambda match: json.dumps(match[0])[1:-1], text)
