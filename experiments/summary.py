"""The study's numbers: one row a variant over its seeds, and the page that shows every run.

Losses are in nats per token, and a *change* is from the base's: below 0 a domain is learned, above
0 what the base knew is forgotten. A spread is the standard deviation over seeds (n - 1).
"""

from collections.abc import Callable, Sequence
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from llamapro.formatting import format_bytes, format_count, format_duration
from llamapro.report import MISSING, flatten, show, table

MOST_GONE, MOST_LOSS, MOST_COST = 0.9, 0.02, 1.25  # the aim: share gone, domain loss, cost
AIM = (
    f"at least {MOST_GONE:.0%} of the forgetting gone, at a domain loss at most {MOST_LOSS:.0%} "
    f"higher and at most {MOST_COST} times the training cost"
)


class Spread(NamedTuple):
    """A number over seeds: its mean, standard deviation (None for one seed), and how many."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Returns the spread of these values; None of none."""
        if not values:
            return None
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for one seed."""
        return None if self.sd is None else self.sd / self.n**0.5

    def text(self, form: str) -> str:
        """Returns the mean and the standard deviation, if there is one, in one format."""
        of_sd = form.replace("+", "").replace("z", "")
        return f"{self.mean:{form}}" + ("" if self.sd is None else f" ± {self.sd:{of_sd}}")


# ---- One row a variant --------------------------------------------------------------------------


def final_changes(study: dict[str, Any], trial: dict[str, Any]) -> dict[str, float]:
    """Returns how far a trial's last loss on each set is from the base's."""
    base = study["base_result"]["losses"]
    return {name: curve[-1][1] - base[name] for name, curve in trial["curves"].items()}


def general_change(study: dict[str, Any], changes: dict[str, float]) -> float:
    """Returns the mean change over the general sets."""
    return mean(changes[name] for name in study["general"])


def failure(trial: dict[str, Any]) -> str | None:
    """Returns why a trial has no result; None if it has one."""
    if trial["failed"] is not None:
        return str(trial["failed"])
    ends = [curve[-1][1] for curve in trial["curves"].values()]
    return "the last loss is not finite" if None in ends else None  # as JSON has it


def done(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the trials that have a result."""
    return [trial for trial in study["trials"] if failure(trial) is None]


def chosen(study: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    """Returns a variant's trials at the chosen learning rate, a trial a seed."""
    return [trial for trial in done(study) if trial["variant"] == variant and trial["chosen"]]


def summarize(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns one row a variant, in their order.

    Each row has the variant's own keys, `runs` and `failed` (how many; failed ones at any learning
    rate), and, of the runs that were chosen, None where there is none:

    - `lr`; `tried`, how many there were; `rate`, the first with "highest of 3" or "lowest of 3" if
      the ones tried end there.
    - `general`, `sets` (by general set), `domain_change`, `domain`: spreads of the mean change, of
      each set's change, of the domain's change and of its loss.
    - `accuracy`, `unshifted`, `marginal`, `shifted`: spreads, as shares of 1.
    - `tokens`, read in training (mean); `trainable`, `total` (parameters), `tokens_per_s` (median),
      `memory_bytes` (largest), `train_s`, `replay_s` (means), `cost_s` (their sum).
    """
    return [_row(study, variant) for variant in study["variants"]]


def _row(study: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    runs = chosen(study, variant["name"])
    tried = [t for t in study["trials"] if t["variant"] == variant["name"]]
    changes = [final_changes(study, run) for run in runs]
    domain = study["domain_set"]

    def over(
        how: Callable[[list[Any]], Any], part: str, key: str = ""
    ) -> Any:  # of the runs that have it
        found = [run[part] for run in runs if run[part] is not None]
        values = [value[key] for value in found] if key else found
        return how(values) if values else None

    lr = runs[0]["lr"] if runs else None
    rates = sorted({trial["lr"] for trial in tried})
    train_s, replay_s = over(mean, "train_s"), over(mean, "replay_s")
    return {
        **variant,
        "runs": len(runs),
        "failed": sum(failure(trial) is not None for trial in tried),
        "lr": lr,
        "rate": MISSING if lr is None else _rate(lr, rates),
        "tried": len(rates),
        "general": Spread.of([general_change(study, c) for c in changes]),
        "sets": {name: Spread.of([c[name] for c in changes]) for name in study["general"]},
        "domain_change": Spread.of([c[domain] for c in changes]),
        "domain": Spread.of([run["curves"][domain][-1][1] for run in runs]),
        "accuracy": over(Spread.of, "choices", "accuracy"),
        **{key: over(Spread.of, "shift", key) for key in ("unshifted", "marginal", "shifted")},
        "tokens": mean(run["curves"][domain][-1][0] for run in runs) if runs else None,
        "trainable": over(max, "trainable"),
        "total": over(max, "total"),
        "tokens_per_s": over(median, "tokens_per_s"),
        "memory_bytes": over(max, "memory_bytes"),
        "train_s": train_s,
        "replay_s": replay_s,
        "cost_s": None if train_s is None or replay_s is None else train_s + replay_s,
    }


def _rate(lr: float, tried: Sequence[float]) -> str:
    """A learning rate, and whether a better one may lie beyond those tried."""
    end = "" if len(tried) < 2 else {tried[0]: "lowest", tried[-1]: "highest"}.get(lr, "")
    return f"{lr:g} ({end} of {len(tried)})" if end else f"{lr:g}"


def front(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Returns the base and the variants that no other one beats at learning and forgetting both.

    Returns:
        label -> change of the domain and of the general sets, from who learns most on.
    """
    means = {"base": (0.0, 0.0)} | {
        row["label"]: (row["domain_change"].mean, row["general"].mean)
        for row in rows
        if row["runs"]
    }
    best: dict[str, tuple[float, float]] = {}
    lowest = float("inf")
    for label, point in sorted(means.items(), key=lambda item: item[1]):
        if point[1] < lowest:
            best[label], lowest = point, point[1]
    return best


# ---- Retention ----------------------------------------------------------------------------------


class Share(NamedTuple):
    """What part of the plain expansion's forgetting is gone, and the standard error of that."""

    gone: float
    error: float | None

    def text(self) -> str:
        """Returns both in percent."""
        return f"{self.gone:.1%}" + ("" if self.error is None else f" ± {self.error:.1%}")


def share_gone(change: Spread, plain: Spread) -> Share | None:
    """Returns 1 - change / plain; None where the plain expansion forgot nothing.

    The error is that of a ratio of two independent means, to first order.
    """
    if plain.mean <= 0:
        return None
    ratio = change.mean / plain.mean
    if change.error is None or plain.error is None:
        return Share(1 - ratio, None)
    return Share(1 - ratio, (change.error**2 + (ratio * plain.error) ** 2) ** 0.5 / plain.mean)


def retention(study: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what each option against forgetting gives, compared with the expansion it varies.

    Returns:
        For each that has runs, as has what it varies: its `name` and `label`; `plain`, that one's
        label; `gone` on the mean of the general sets and `sets`, each of them (`Share`, or None);
        `domain`, its loss over that one's, minus 1; `tokens`, read in training, and `cost`, the
        seconds of training, over that one's; `replay_s`, once for the base, the seconds of writing,
        and `written`, these over one plain run's; `meets`.
    """
    by_name, found = {row["name"]: row for row in rows}, []
    for row in rows:
        plain = by_name.get(row["varies"])
        if row["group"] != "retention" or plain is None or not (row["runs"] and plain["runs"]):
            continue
        gone = share_gone(row["general"], plain["general"])
        domain = row["domain"].mean / plain["domain"].mean - 1
        tokens = row["tokens"] / plain["tokens"]
        cost = tokens * study["step_ratios"][row["name"]]
        found.append(
            {
                "name": row["name"],
                "label": row["label"],
                "plain": plain["label"],
                "gone": gone,
                "sets": {s: share_gone(c, plain["sets"][s]) for s, c in row["sets"].items()},
                "domain": domain,
                "cost": cost,
                "tokens": tokens,
                "replay_s": row["replay_s"],
                "written": row["replay_s"] / plain["train_s"],
                "meets": gone is not None
                and gone.gone >= MOST_GONE
                and domain <= MOST_LOSS
                and cost <= MOST_COST,
            }
        )
    return found


# ---- The page -----------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """Returns the page of all numbers, in Markdown: each study, every trial, and the settings."""
    parts = [
        "Losses are in nats per token; a change is from the base's loss: below 0 is learned, above "
        "0 forgotten. ± is the standard deviation over seeds (n - 1), of a share of forgetting its "
        "standard error. The rows show the learning rate that was chosen; *highest* or *lowest* of "
        "those tried says that a better one may lie beyond. All trials are listed below."
    ]
    for study in results["studies"]:
        rows = summarize(study)
        parts += [f"## {study['name']}", _compared(study, rows)]
        kept = retention(study, rows)
        if kept:
            parts += ["### Against forgetting", _retention_table(study, kept)]
            parts.append(
                f"The aim is {AIM}; the means are held against it. The share is of the plain "
                "expansion's increase. *Tokens* are all that training read, replayed or not, over "
                "the plain expansion's; *training cost* is this times what a step takes, both "
                "sides' steps in turn. *Writing* what is replayed comes once for a base, whatever "
                "it is then trained on and for how long; it is not part of the training cost."
            )
        if study["gradients"]:
            parts += ["### Gradients of a new block's tensors", gradient_table(study["gradients"])]
            parts.append("The norm over all new blocks, in fp64; 0 is exactly 0.")
    for study in results["studies"]:
        parts += [f"## All trials: {study['name']}", _trials(study)]
    about = results["about"]
    facts = {"machine": about["machine"], "elapsed": format_duration(about["elapsed_s"])}
    facts |= flatten({"versions": about["versions"], "settings": about["settings"]})
    parts += ["## Settings", table([["setting", "value"], *map(list, facts.items())])]
    return "\n\n".join(parts) + "\n"


def _compared(study: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A table like the paper's Table 5; the base's row has its losses."""
    base, general, domain = study["base_result"], study["general"], study["domain_set"]
    losses, marks = base["losses"], base["choices"]
    changes = [f"{name} change" for name in general]
    accuracy = "choices" + ("" if marks is None else f" (chance {marks['chance']:.1%})")
    head = ["variant", "learning rate", "trained", "general change", *changes, f"{domain} loss"]
    lines = [[*head, accuracy, "unshifted", "tokens/s", "peak memory", "seeds"]]
    general_loss = f"loss {mean(losses[name] for name in general):.3f}"
    of_base = ["base", MISSING, MISSING, general_loss, *(f"loss {losses[n]:.3f}" for n in general)]
    of_base += [f"{losses[domain]:.3f}", show(marks, lambda found: f"{found['accuracy']:.1%}")]
    lines.append([*of_base, *[MISSING] * 4])
    for row in rows:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        cells = [row["label"], row["rate"], show(row["trainable"], format_count)]
        cells += [_spread(c, "+z.3f") for c in (row["general"], *row["sets"].values())]
        change = _spread(row["domain_change"] and row["domain_change"]._replace(sd=None), "+z.3f")
        cells.append(_spread(row["domain"], ".3f") + (f" ({change})" if row["runs"] else ""))
        cells += [_spread(row["accuracy"], ".1%"), _spread(row["unshifted"], ".1%")]
        cells += [show(row["tokens_per_s"], format_count), show(row["memory_bytes"], format_bytes)]
        lines.append([*cells, f"{row['runs']}{failed}"])
    return table(lines)


def _spread(value: Spread | None, form: str) -> str:
    return show(value, lambda spread: spread.text(form))


def _retention_table(study: dict[str, Any], kept: Sequence[dict[str, Any]]) -> str:
    head = ["variant", "against", "forgetting gone", *(f"on {name}" for name in study["general"])]
    lines = [[*head, f"{study['domain_set']} loss", "tokens", "training cost"]]
    lines[0] += ["writing, once", "meets the aim"]
    for found in kept:
        shares = [show(s, Share.text) for s in (found["gone"], *found["sets"].values())]
        cells = [found["label"], found["plain"], *shares, f"{found['domain']:+z.1%}"]
        cells += [f"{found['tokens']:.2f}x", f"{found['cost']:.2f}x"]
        wrote = f"{found['replay_s']:.1f} s ({found['written']:.2f} of a run)"
        cells.append(wrote if found["replay_s"] else MISSING)
        lines.append([*cells, "yes" if found["meets"] else "no"])
    return table(lines)


def gradient_table(gradients: dict[str, list[dict[str, float]]]) -> str:
    """Returns the gradient norms of a new block's tensors, a column for each kind and step."""
    steps = [(kind, i) for kind, found in gradients.items() for i in range(len(found))]
    lines = [["tensor", *(f"{kind}, step {i + 1}" for kind, i in steps)]]
    tensors = dict.fromkeys(name for found in gradients.values() for step in found for name in step)
    for name in tensors:
        norms = [gradients[kind][i].get(name) for kind, i in steps]
        lines.append([name, *(show(n, lambda n: "0" if n == 0 else f"{n:.2e}") for n in norms)])
    return table(lines)


def _trials(study: dict[str, Any]) -> str:
    """Every trial, whether it was chosen, not chosen, or failed."""
    labels = {variant["name"]: variant["label"] for variant in study["variants"]}
    sets = [*study["general"], study["domain_set"]]
    lines = [
        ["variant", "learning rate", "seed", "chosen", "general change", *sets, "choices", "time"]
    ]
    for trial in study["trials"]:
        cells = [labels.get(trial["variant"], trial["variant"]), f"{trial['lr']:g}"]
        cells.append(str(trial["seed"]))
        if (reason := failure(trial)) is not None:
            lines.append([*cells, f"failed: {reason}", *[MISSING] * (len(sets) + 3)])
            continue
        changes = final_changes(study, trial)
        cells += ["yes" if trial["chosen"] else "no", f"{general_change(study, changes):+z.3f}"]
        cells += [f"{changes[name]:+z.3f}" for name in sets]
        cells.append(show(trial["choices"], lambda found: f"{found['accuracy']:.1%}"))
        lines.append([*cells, format_duration(trial["train_s"] + trial["replay_s"])])
    return table(lines)
