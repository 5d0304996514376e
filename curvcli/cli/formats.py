"""What stdout gets, by verb."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """Of a report, a comparison or a track."""

    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"


class ShortFormat(StrEnum):
    """Of what is no table of values: a schedule, what would be read."""

    table = "table"
    json = "json"


class GateFormat(StrEnum):
    """Of a gate."""

    text = "text"
    json = "json"
    github = "github"
    junit = "junit"
    markdown = "markdown"
