"""The level of a training job's record, INFO, WARN or ERROR, and what to do: the one rule that every alert goes by."""

from __future__ import annotations

from curvcli.documents import Alert, Record, StableLr
from curvcli.judge.limits import STABLE_BELOW
from curvcli.judge.steepest import EDGE_TO
from curvcli.judge.verdict import verdict_of

# Of the log of a step's loss above the run's own; of the zoo's quiet runs 2 % come to it (docs/how-to/training.md).
LOSS_SIGMAS = 6.0
_BROKEN = ("failed", "asymmetric")  # statuses of a measurement that could not be made


def alert_of(record: Record) -> Alert:
    """What a record says, as an alert.

    - ERROR: the loss, a number of the model or of its curvature is not finite; or the verdict is unstable.
    - WARN: the verdict is hot; Z of Muon or Lion is past its edge, which is advisory; the gradient or the loss is out of the
      run's own range, whatever the curvature says; or nothing could be measured.
    - INFO: everything else: stable, edge, unresolved, whatever a young optimizer's record says (`early`), and a learning
      rate of 0, at which nothing is to be measured.
    """
    verdict = verdict_of(record)
    if record.status == "non-finite":
        return _alert(record, "ERROR", record.message or "a number is not finite", action="stop")
    # Before the verdict and what is broken: of a young optimizer rho says nothing, and at lr 0 nothing is measured.
    if record.loss_finite is False:
        return _alert(record, "ERROR", "a loss since the last record is not finite", action="stop")
    if record.early or record.lr == 0:
        return _alert(record, "INFO", "too early to tell" if record.early else "the learning rate is 0")
    said = _joined(_gradient(record), _loss(record))
    if verdict in ("unstable", "hot"):
        lr = lower_lr(record.lr, record.rho, record.stable_lr)
        level, words = ("ERROR", "unstable") if verdict == "unstable" else ("WARN", "probably too hot")
        return _alert(record, level, _joined(f"rho is {record.rho:.3g}: {words}", said), action="lower the lr", lr=lr)
    # Advisory, so never an error and no advice on lr.
    past = record.z is not None and record.z > EDGE_TO
    if said or past:
        edge = f"Z is {record.z:.3g}: past the edge of normalised descent" if past else ""
        return _alert(record, "WARN", _joined(edge, said))
    if record.status in _BROKEN:
        return _alert(record, "WARN", record.message or f"the measurement is {record.status}")
    rho = "" if record.rho is None else f"rho is {record.rho:.3g}: {verdict}"
    z = "" if record.z is None else f"Z is {record.z:.3g}"
    return _alert(record, "INFO", _joined(rho, z) or verdict)


def lower_lr(lr: float | None, rho: float | None, stable: StableLr | None) -> float | None:
    """Where to lower a learning rate to: the low end of the largest stable one, else where rho would be stable.

    None where neither is known, or neither is lower.
    """
    if stable is not None and lr is not None and stable.low < lr:
        return stable.low
    return lr * STABLE_BELOW / rho if lr and rho and rho > STABLE_BELOW else None


def _gradient(record: Record) -> str:
    if not record.gradient_outlier or record.gradient_sigmas is None:
        return ""
    return f"the gradient's norm is {record.gradient_sigmas:.2g} standard deviations above the run's own"


def _loss(record: Record) -> str:
    if record.loss_sigmas is None or record.loss_sigmas <= LOSS_SIGMAS:
        return ""
    return f"the loss was {record.loss_sigmas:.2g} standard deviations above the run's own"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _alert(record: Record, level: str, text: str, *, action: str = "go on", lr: float | None = None) -> Alert:
    # What would raise the rate, or leave it, is no advice on an alert.
    lowers = lr is not None and record.lr is not None and 0 < lr < record.lr
    return Alert.model_validate(
        {
            "step": record.step,
            "level": level,
            "verdict": verdict_of(record),
            "text": text,
            "action": action,
            "lr": lr if lowers else None,
            "factor": lr / record.lr if lowers and lr and record.lr else None,
            "rho": record.rho,
            "loss": record.loss,
        }
    )
