"""What a training job's record has beside rho, in words: its level, the cheap numbers, and what measuring costs."""

from __future__ import annotations

from curvcli.documents import Record
from curvcli.errors import plain
from curvcli.judge.level import alert_of
from curvcli.render.frame import number

# As they stand in a line: what each is called, and its field.
COMPANIONS = (
    ("gradient", "gradient_norm"),
    ("update RMS", "update_rms"),
    ("g'Hg/g'g", "gradient_quotient"),
    ("attention logit", "attention_logit"),
    ("attention entropy", "attention_entropy"),
    ("spectral norm", "spectral_norm"),
)


def level_line(record: Record) -> str:
    """As "WARN: the gradient's norm is 7.1 standard deviations above the run's own"; empty at INFO."""
    alert = alert_of(record)
    if alert.level == "INFO":
        return ""
    todo = "" if alert.action == "go on" else f"; {alert.action}" + ("" if alert.lr is None else f" to {alert.lr:.2g}")
    return f"{alert.level}: {plain(alert.text)}{todo}"


def idle_line(newest: Record, stands: Record) -> str:
    """As "the learning rate is 0 at step 300, as at a schedule's end: this is of step 280"; empty where both are one."""
    if newest.step == stands.step:
        return ""
    at = "" if stands.lr is None else f", at {number(stands.lr, 3)}"
    return f"the learning rate is 0 at step {newest.step:,}, as at a schedule's end: this is of step {stands.step:,}{at}"


def companions_line(record: Record) -> str:
    """As "gradient 2.1 (0.4 sd), update RMS 0.97, attention logit 12"; empty where the record has none of them."""
    found = []
    for name, field in COMPANIONS:
        if (value := getattr(record, field)) is not None:
            sigmas = record.gradient_sigmas if field == "gradient_norm" else None
            found.append(f"{name} {number(value, 3)}" + ("" if sigmas is None else f" ({sigmas:+.1f} sd)"))
    return ", ".join(found)


def cost_line(record: Record) -> str:
    """As "measuring takes 4.8 % of the training's time, 2 batches of the probe"; empty in an older version's record."""
    if record.overhead is None:
        return ""
    count = record.probe_batches
    batches = "" if count is None else f", on {count} {'batch' if count == 1 else 'batches'} of the probe"
    share = 100 * record.overhead
    said = f"{share:.2g}" if share < 99.5 else f"{share:,.0f}"  # over the whole with every=
    return f"measuring takes {said} % of the training's time{batches}"
