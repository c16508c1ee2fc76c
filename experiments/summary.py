"""The study's numbers: one row per variant over its seeds, and the page that shows every run.

Losses are in nats per token. A *change* is a loss minus that of the base: negative if a domain was
learned, positive if it was forgotten. A spread is the standard deviation over seeds (n - 1).
"""

from collections.abc import Callable, Sequence
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from llamapro.formatting import flatten, format_bytes, format_count, format_duration
from llamapro.report import MISSING, show, table

LEAST_GONE, MOST_LOSS, MOST_COST = 0.9, 0.02, 1.25  # the aim: share gone, domain loss, cost
AIM = (
    f"at least {LEAST_GONE:.0%} of the forgetting is gone, the domain loss is at most "
    f"{MOST_LOSS:.0%} higher, and training costs at most {MOST_COST} times as much"
)

Row = dict[str, Any]


class Spread(NamedTuple):
    """A number over n seeds: its mean and its standard deviation (None for one seed)."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Returns the spread of these values, or None if there are none."""
        sd = stdev(values) if len(values) > 1 else None
        return cls(mean(values), sd, len(values)) if values else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for one seed."""
        return None if self.sd is None else self.sd / self.n**0.5

    def text(self, form: str) -> str:
        """Returns mean and standard deviation in one format."""
        plain = form.replace("+", "").replace("z", "")
        return f"{self.mean:{form}}" + ("" if self.sd is None else f" ± {self.sd:{plain}}")


# ---- One row per variant ------------------------------------------------------------------------


def final_changes(study: dict[str, Any], trial: dict[str, Any]) -> dict[str, float]:
    """Returns, for each set, the change of a trial's last loss."""
    base = study["base_result"]["losses"]
    return {name: curve[-1][1] - base[name] for name, curve in trial["curves"].items()}


def general_change(study: dict[str, Any], changes: dict[str, float]) -> float:
    """Returns the mean change over the general sets."""
    return mean(changes[name] for name in study["general"])


def failure(trial: dict[str, Any]) -> str | None:
    """Returns the reason why a trial has no result, or None if it has one."""
    if trial["failed"] is not None:
        return str(trial["failed"])
    # JSON has null for a loss that is not finite.
    is_finite = all(curve[-1][1] is not None for curve in trial["curves"].values())
    return None if is_finite else "the last loss is not finite"


def done(study: dict[str, Any], variant: str | None = None) -> list[dict[str, Any]]:
    """Returns all trials with a result, or those of one variant at the chosen learning rate.

    A trial of a shorter search for the rate is none of them.
    """
    trials = [t for t in study["trials"] if failure(t) is None and not t.get("only_losses")]
    return [t for t in trials if variant is None or (t["variant"] == variant and t["chosen"])]


def summarize(study: dict[str, Any]) -> list[Row]:
    """Returns one row per variant, in their order.

    A row has the variant's own keys, the counts `runs` (chosen) and `failed` (at any learning
    rate), and, over the chosen runs (None without any):

    - `lr`; `tried`, the number of rates; `rate`, a text that says if `lr` is the highest or lowest.
    - `general`, `sets` (by general set), `domain_change`, `domain`: spreads of the mean change, of
      each set's change, of the domain's change and of its loss.
    - `accuracy`, `unshifted`: spreads, as shares of 1.
    - `tokens`, read in training (mean); `trainable`, parameters; `tokens_per_s` (median);
      `memory_bytes` (largest); `train_s`, `replay_s` (means).
    """
    return [_row(study, variant) for variant in study["variants"]]


def _row(study: dict[str, Any], variant: dict[str, Any]) -> Row:
    runs, domain = done(study, variant["name"]), study["domain_set"]
    tried = [trial for trial in study["trials"] if trial["variant"] == variant["name"]]
    changes = [final_changes(study, run) for run in runs]
    rates = sorted({trial["lr"] for trial in tried})
    lr = runs[0]["lr"] if runs else None

    def over(function: Callable[[list[Any]], Any], part: str, key: str = "") -> Any:
        values = [run[part] for run in runs if run[part] is not None]
        values = [value[key] for value in values] if key else values
        return function(values) if values else None

    return variant | {
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
        "unshifted": over(Spread.of, "shift", "unshifted"),
        "tokens": mean(run["curves"][domain][-1][0] for run in runs) if runs else None,
        "trainable": over(max, "trainable"),
        "tokens_per_s": over(median, "tokens_per_s"),
        "memory_bytes": over(max, "memory_bytes"),
        "train_s": over(mean, "train_s"),
        "replay_s": over(mean, "replay_s"),
    }


def _rate(lr: float, tried: Sequence[float]) -> str:
    """Marks the ends of the learning rates tried, beyond which a better one may lie."""
    end = "" if len(tried) < 2 else {tried[0]: "lowest", tried[-1]: "highest"}.get(lr, "")
    return f"{lr:g} ({end} of {len(tried)})" if end else f"{lr:g}"


def front(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Returns the Pareto front, by label: changes of the domain and of the general sets.

    The base or a variant is on it if no other one is better at both. Who learns most comes first.
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
    """The share of plain expansion's forgetting that is gone, and its standard error."""

    gone: float
    error: float | None

    def text(self) -> str:
        return f"{self.gone:.1%}" + ("" if self.error is None else f" ± {self.error:.1%}")


def share_gone(change: Spread, plain: Spread) -> Share | None:
    """Returns 1 - change / plain, or None if the plain expansion forgot nothing.

    The error is that of a ratio of two independent means, to first order.
    """
    if plain.mean <= 0:
        return None
    ratio = change.mean / plain.mean
    if change.error is None or plain.error is None:
        return Share(1 - ratio, None)
    return Share(1 - ratio, (change.error**2 + (ratio * plain.error) ** 2) ** 0.5 / plain.mean)


def retention(study: dict[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Compares each way to forget less with the plain expansion that it varies.

    Returns:
        For each, if both have runs: `name`, `label`; `plain`, the other's label; `gone`, the share
        on the mean of the general sets; `sets`, the share on each of them; `domain`, the increase
        of the domain loss, relative; `tokens` and `cost`, tokens read and seconds of training,
        relative; `replay_s`, the seconds of writing; `written`, these relative to one plain run;
        `meets`, whether it meets the aim.
    """
    by_name, options = {row["name"]: row for row in rows}, []
    for row in rows:
        plain = by_name.get(row["varies"])
        if row["group"] != "retention" or plain is None or not (row["runs"] and plain["runs"]):
            continue
        gone = share_gone(row["general"], plain["general"])
        domain = row["domain"].mean / plain["domain"].mean - 1
        tokens = row["tokens"] / plain["tokens"]
        cost = tokens * study["step_ratios"][row["name"]]
        is_gone = gone is not None and gone.gone >= LEAST_GONE
        options.append(
            {key: row[key] for key in ("name", "label", "replay_s")}
            | {
                "plain": plain["label"],
                "gone": gone,
                "sets": {s: share_gone(c, plain["sets"][s]) for s, c in row["sets"].items()},
                "domain": domain,
                "tokens": tokens,
                "cost": cost,
                "written": row["replay_s"] / plain["train_s"],
                "meets": is_gone and domain <= MOST_LOSS and cost <= MOST_COST,
            }
        )
    return options


# ---- The page -----------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """Returns the page of all numbers, in Markdown: each study, every trial, and the settings."""
    parts = [
        "Losses are in nats per token. A change is the loss minus the base's: a negative one was "
        "learned, a positive one forgotten. After ± stands the standard deviation over seeds "
        "(n - 1), or, for a share of forgetting, its standard error. Each row shows the chosen "
        "learning rate. Where it is the *highest* or *lowest* of those tried, a better one may lie "
        "beyond. All trials are listed below."
    ]
    for study in results["studies"]:
        rows = summarize(study)
        parts += [f"## {study['name']}", _compared(study, rows)]
        if "instructed" in study["base_result"]:
            parts += ["### Abilities", _abilities(study)]
            parts.append(
                "Chats and texts are the base's own; the number is KL(base || model) in nats per "
                "token. After ± stands the standard error of a share of questions."
            )
        if options := retention(study, rows):
            parts += ["### Against forgetting", _retention_table(study, options)]
            parts.append(
                f"The aim: {AIM}. The means decide. *Forgetting gone* is a share of the plain "
                "expansion's increase in loss. *Tokens* counts everything that training read, "
                "replayed or not, relative to the plain expansion. *Training cost* multiplies this "
                "by the time of a step, measured in turn with the plain expansion's. A base writes "
                "its text for replay once, for any number of domains, so *writing* is not part of "
                "the training cost."
            )
    for study in results["studies"]:
        parts += [f"## All trials: {study['name']}", _trials(study)]
    about = results["about"]
    facts = {"machine": about["machine"], "elapsed": format_duration(about["elapsed_s"])}
    nested = {"versions": about["versions"], "settings": about["settings"]}
    facts |= {key: show(value) for key, value in flatten(nested).items()}
    parts += ["## Settings", table([["setting", "value"], *map(list, facts.items())])]
    return "\n\n".join(parts) + "\n"


def _spread(value: Spread | None, form: str) -> str:
    return show(value, lambda spread: spread.text(form))


def _compared(study: dict[str, Any], rows: Sequence[Row]) -> str:
    """A table like the paper's Table 5. The row of the base has its losses."""
    base, general, domain = study["base_result"], study["general"], study["domain_set"]
    losses, choices = base["losses"], base["choices"]
    accuracy = "choices" + ("" if choices is None else f" (chance {choices['chance']:.1%})")
    head = ["variant", "learning rate", "trained", "general change"]
    head += [*(f"{name} change" for name in general), f"{domain} loss", accuracy, "unshifted"]
    first = ["base", MISSING, MISSING, f"loss {mean(losses[name] for name in general):.3f}"]
    first += [*(f"loss {losses[name]:.3f}" for name in general), f"{losses[domain]:.3f}"]
    first += [show(choices, lambda c: f"{c['accuracy']:.1%}"), *[MISSING] * 4]
    lines = [[*head, "tokens/s", "peak memory", "seeds"], first]
    for row in rows:
        cells = [row["label"], row["rate"], show(row["trainable"], format_count)]
        cells += [_spread(c, "+z.3f") for c in (row["general"], *row["sets"].values())]
        change = f" ({row['domain_change'].mean:+z.3f})" if row["runs"] else ""
        cells += [_spread(row["domain"], ".3f") + change, _spread(row["accuracy"], ".1%")]
        cells += [_spread(row["unshifted"], ".1%"), show(row["tokens_per_s"], format_count)]
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        lines.append([*cells, show(row["memory_bytes"], format_bytes), f"{row['runs']}{failed}"])
    return table(lines)


def _abilities(study: dict[str, Any]) -> str:
    """A table like the paper's Tables 1 and 11: what each model knows, and can still do."""
    asked = {"instructions": "instructed", "choices": "choices", "HumanEval": "human_eval"}
    asked = {name: key for name, key in asked.items() if study["base_result"].get(key)}
    kept, domain = study["general"], study["domain_set"]
    losses = study["base_result"]["losses"]
    cells = ["base", f"{losses[domain]:.3f}", *(f"{losses[name]:.3f}" for name in kept)]
    lines = [["model", f"{domain} loss", *kept, *asked]]
    lines.append([*cells, *(_passed([study["base_result"][key]]) for key in asked.values())])
    for variant in study["variants"]:
        if runs := done(study, variant["name"]):
            ends = [mean(run["curves"][name][-1][1] for run in runs) for name in (domain, *kept)]
            shares = [_passed([run[key] for run in runs]) for key in asked.values()]
            lines.append([variant["label"], *(f"{end:.3f}" for end in ends), *shares])
    return table(lines)


def _passed(results: Sequence[dict[str, Any]]) -> str:
    """Returns the share of tasks that are solved, in the mean of runs, and its standard error."""
    n = results[0].get("asked") or results[0]["questions"]
    share = mean(r["passed"] / n if "passed" in r else r["accuracy"] for r in results)
    return f"{share:.1%} ± {(share * (1 - share) / n) ** 0.5:.1%}"


def _retention_table(study: dict[str, Any], options: Sequence[Row]) -> str:
    head = ["variant", "against", "forgetting gone", *(f"on {name}" for name in study["general"])]
    head += [f"{study['domain_set']} loss", "tokens", "training cost"]
    lines = [[*head, "writing, once", "meets the aim"]]
    for option in options:
        shares = [show(s, Share.text) for s in (option["gone"], *option["sets"].values())]
        cells = [option["label"], option["plain"], *shares, f"{option['domain']:+z.1%}"]
        cells += [f"{option['tokens']:.2f}x", f"{option['cost']:.2f}x"]
        writing = f"{option['replay_s']:.1f} s ({option['written']:.2f} of a run)"
        cells.append(writing if option["replay_s"] else MISSING)
        lines.append([*cells, "yes" if option["meets"] else "no"])
    return table(lines)


def _trials(study: dict[str, Any]) -> str:
    """All trials: chosen, not chosen and failed."""
    labels = {variant["name"]: variant["label"] for variant in study["variants"]}
    sets = [*study["general"], study["domain_set"]]
    head = ["variant", "learning rate", "seed", "chosen", "general change", *sets]
    lines = [[*head, "choices", "time"]]
    for trial in study["trials"]:
        cells = [labels[trial["variant"]], f"{trial['lr']:g}", str(trial["seed"])]
        if (reason := failure(trial)) is not None:
            lines.append([*cells, f"failed: {reason}", *[MISSING] * (len(sets) + 3)])
            continue
        changes = final_changes(study, trial)
        general = None if trial.get("only_losses") else general_change(study, changes)
        cells += ["yes" if trial["chosen"] else "no", show(general, "{:+z.3f}".format)]
        cells += [show(changes.get(name), "{:+z.3f}".format) for name in sets]
        cells.append(show(trial["choices"], lambda c: f"{c['accuracy']:.1%}"))
        lines.append([*cells, format_duration(trial["train_s"] + trial["replay_s"])])
    return table(lines)
