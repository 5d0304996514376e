"""Colours, each named by what it means: in pictures, on pages and in the terminal."""

from __future__ import annotations

# For a light page and for a dark one. What shares a picture differs in lightness too, for readers who see fewer hues.
PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#14181e"),
    "ink": ("#1b2430", "#e6eaf0"),
    "soft": ("#5b6676", "#a3adbb"),
    "line": ("#d7dde6", "#364050"),
    "panel": ("#f4f6f9", "#1d232c"),
    "stable": ("#00664f", "#6fd0ae"),
    "edge": ("#8a5a00", "#f0bf5a"),
    "hot": ("#a85c38", "#f2703a"),
    "unstable": ("#9b0020", "#ff8a80"),
    "early": ("#1e3ce0", "#8088ff"),
    "unresolved": ("#7a2e8f", "#d79be8"),
    "limit": ("#9b0020", "#ff8a80"),  # rho = 1, and the threshold of lambda
    "measured": ("#1f4e9c", "#86b3ff"),
    "restricted": ("#1f4e9c", "#86b3ff"),
    "first": ("#1f4e9c", "#86b3ff"),  # of two runs
    "second": ("#b05410", "#ffab6b"),
    "truncated": ("#b05410", "#ffab6b"),
    "surge": ("#b05410", "#ffab6b"),
    "unlock": ("#b05410", "#ffab6b"),
    "logged": ("#b05410", "#ffab6b"),  # what the run itself wrote: learning rate and loss
    "layer": ("#b8c4d6", "#47566b"),
    "ends": ("#8a99b0", "#75869f"),
    "bracket": ("#b8c4d6", "#47566b"),
    # rho in the map, in order: lightness goes one way, from the page's own to what stands out from it.
    "rho0": ("#f6f0c8", "#2c2440"),
    "rho1": ("#fbd976", "#4e2a66"),
    "rho2": ("#f9b04a", "#7c2f5c"),
    "rho3": ("#ee8337", "#a43b5a"),
    "rho4": ("#d9532c", "#d1573f"),
    "rho5": ("#b01f2e", "#f08f3a"),
    "rho6": ("#6e0b2b", "#fbd87a"),
}

# The terminal's own sixteen, which a reader's theme has made legible.
COLOURS = {
    "stable": "green", "edge": "yellow", "hot": "bright_red", "unstable": "red", "early": "blue", "unresolved": "magenta",
    "passed": "green", "broken": "red", "failed": "red",
    "error": "red", "warning": "yellow", "info": "dim",
    "measured": "cyan", "doubtful": "yellow", "limit": "red", "unlock": "yellow",
}  # fmt: skip

# The verdict on a run, by the verdict on a checkpoint whose colour it has.
RUN_LIKE = {
    "healthy": "stable", "hot": "unstable", "wrecked": "unstable", "collapsed": "unstable", "unresolved": "unresolved",
    "early": "unresolved",
}  # fmt: skip

GATE_LIKE = {"passed": "stable", "broken": "unstable", "unresolved": "unresolved"}

# A verdict's name where people read it.
SAID = {"hot": "probably too hot", "early": "too early"}


def said(verdict: str) -> str:
    """The verdict as it is shown."""
    return SAID.get(verdict, verdict)


def light(name: str) -> str:
    """The colour of that meaning as #rrggbb, for paper."""
    return PALETTE[name][0]


def variables() -> str:
    """CSS that defines each colour as --name: light, dark where the reader asks for that, and light on paper."""
    on_light, on_dark = (" ".join(f"--{name}: {pair[n]};" for name, pair in PALETTE.items()) for n in (0, 1))
    return (
        f":root {{ color-scheme: light dark; {on_light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {on_dark} }} }}\n"
        "@media print { :root { color-scheme: light; } }\n"
    )
