"""The terminal view of an explanation, and what its page has in common with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from curvcli.documents import Explanation, Removal, SequenceShare, TokenShare
from curvcli.errors import counted, plain
from curvcli.judge.limits import certified
from curvcli.render.frame import number
from curvcli.render.style import COLOURS, said
from curvcli.render.table import bar, finding_line

LEAST = 0.005  # of the whole: what has less is not listed in a terminal
NAME, BAR = 34, 30  # columns
_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
WHAT = {"full": "the full model", "body": "the full model without the rows that the shard hardly looks up"}


@dataclass(frozen=True)
class Line:
    """A share of something, in words; `text` is a token's, null where there is none or no tokenizer says it."""

    label: str
    share: float
    text: str | None = None


@dataclass(frozen=True)
class Section:
    """Shares of one whole, those that are next to nothing left out."""

    title: str
    lines: Sequence[Line]

    @property
    def most(self) -> float:
        """The share whose bar is a whole one."""
        return max(LEAST, *(line.share for line in self.lines))


def sections(found: Explanation) -> list[Section]:
    """The direction by part, kind of matrix, head and row, and lambda by predicted token; empty ones left out."""
    heads = [(f"layer {m.layer}, {'' if m.of == 'query' else 'key-value '}head {m.head}", m.mass) for m in found.heads]
    rows = [Line(f"{m.tensor.rsplit('.', 2)[-2]}, {m.rows_of[:-1]} {m.row}", m.mass, m.text) for m in found.rows]
    tokens = [Line(f"token {m.token}, predicted {counted(m.count, 'time')}", m.share, m.text) for m in found.tokens]
    every = [
        # In the order of the network: the others are sorted by their share.
        Section("where the sharpest direction lies, by part", _kept([Line(m.name, m.mass) for m in found.parts])),
        Section("by kind of matrix", _heaviest([Line(m.name, m.mass) for m in found.kinds])),
        Section("by attention head", _heaviest([Line(label, mass) for label, mass in heads])),
        Section("by row", _heaviest(rows)),
        Section("what carries lambda, by the token that was to be predicted", _heaviest(tokens)),
    ]
    return [section for section in every if section.lines]


def _kept(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if abs(line.share) >= LEAST]


def _heaviest(lines: Sequence[Line]) -> list[Line]:
    return sorted(_kept(lines), key=lambda line: -line.share)[:8]


def show(found: Explanation, console: Console) -> None:
    """Print the direction by parts, the data that carry it, and what is left without them; fits 80 columns."""
    blocks = [_head(found)]
    blocks += [text for section in sections(found) for text in _section(section, console)]
    if found.sequences:
        blocks.append(Text("\nby sequence", style="dim"))
        blocks += [line for sequence in found.sequences for line in _sequence(sequence)]
    blocks += _removals(found)
    if found.findings:
        blocks.append(Text())
        blocks += [finding_line(finding) for finding in found.findings]
    cost = found.cost
    blocks.append(Text(f"\n{cost.hvps} Hessian-vector products ({cost.mode}), {cost.seconds:.1f} s", style="dim"))
    console.print(*blocks, sep="\n")


def _head(found: Explanation) -> Text:
    text = Text(plain(found.checkpoint.path), style="bold")
    step = f"step {found.checkpoint.step:,}, " if found.checkpoint.step is not None else ""
    text.append(f"\n{step}{found.data.tokens:,} predictions, loss {found.data.loss:.3f}\n\n", style="not bold")
    text.append(f" {said(found.verdict).upper()} ", style=f"bold reverse {COLOURS[found.verdict]}")
    estimate = found.estimate
    value = f"rho {number(estimate.rho, 3)}, " if estimate.rho is not None else ""
    doubt = "" if certified(estimate) or estimate.eigenvalue is None else f", {estimate.status}"
    missing = f"no estimate: {estimate.status}"
    eigenvalue = missing if estimate.eigenvalue is None else f"lambda {number(estimate.eigenvalue)}"
    text.append(f"  {value}{eigenvalue}{doubt}, of {WHAT[found.direction]}", style="not bold")
    if found.participation is not None:
        text.append(
            f"\n its direction is spread over {found.participation:,.0f} of {found.checkpoint.parameters:,} parameters",
            style="not bold",
        )
    return text


def _section(section: Section, console: Console) -> list[Text]:
    """Shares with bars; the text beside a bar is a token's."""
    found = [Text(f"\n{section.title}", style="dim")]
    for line in section.lines:
        quoted = _quoted(line.text)
        text = Text(f" {_cut(plain(line.label), NAME):{NAME}} {_percent(line.share)}  ")
        text.append_text(bar(line.share, section.most, BAR if not quoted else BAR - 12, None, console))
        found.append(text.append(f" {quoted}" if quoted else "", style=COLOURS["measured"]))
    return found


def _sequence(found: SequenceShare) -> list[Text]:
    loss = f", loss {number(found.loss, 3)}" if found.loss is not None else ""
    lines = [Text(f" sequence {found.sequence:<8,} {_percent(found.share)}  lambda there {number(found.quotient)}{loss}")]
    return lines + [_token(token) for token in found.tokens[:3]]


def _token(found: TokenShare) -> Text:
    """A prediction in its place, itself marked."""
    line = Text(f"   {_percent(found.share)}  at {found.position:<5,} ")
    if found.text is None:
        return line.append(f"token {found.token}", style=COLOURS["measured"])
    line.append(visible(found.context or "")[-36:].rjust(36), style="dim")
    return line.append(f"[{visible(found.text)[:16]}]", style=f"bold {COLOURS['measured']}")


def _removals(found: Explanation) -> list[Text]:
    if not found.removals:
        return []
    lines = [Text(f"\n{'what is left without':42} {'lambda':>10} {'rho':>8}  verdict", style="dim")]
    whole = f" {'nothing':41} {number(found.estimate.eigenvalue):>10} {number(found.estimate.rho, 3):>8}  "
    lines.append(Text(whole).append(said(found.verdict), style=COLOURS[found.verdict]))
    return lines + [_removal(removal) for removal in found.removals]


def _removal(found: Removal) -> Text:
    label = f"{found.removed:,} of {found.total:,} {found.what} ({found.share:.0%} of lambda)"
    doubt = "" if certified(found.estimate) else "?"
    values = (number(found.estimate.eigenvalue) + doubt, number(found.estimate.rho, 3) + doubt)
    return Text(f" {label:41} {values[0]:>10} {values[1]:>8}  ").append(said(found.verdict), style=COLOURS[found.verdict])


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _quoted(text: str | None) -> str:
    return f"'{visible(text)[:14]}'" if text is not None else ""


def visible(text: str) -> str:
    """Without what a terminal obeys; line ends as a sign of one column."""
    return plain("".join(_SHOWN.get(letter, letter) for letter in text))
