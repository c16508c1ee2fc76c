"""Sentences that say whether the study's numbers agree with the paper's.

Two means *differ* if their difference is at least two of its standard errors. With three seeds
each, this rule finds a difference between two equal variants in about one case of nine.
"""

from itertools import pairwise
from typing import Any, NamedTuple

from summary import AIM, Row, Share, Spread, front, retention, summarize

HOLDS, FAILS, EQUAL = "holds", "does not hold", "no clear difference"
ERRORS = 2  # standard errors that make a clear difference
MEASURES = {"domain": ("domain loss", ".3f"), "general": ("general change", "+z.3f")}


class Claim(NamedTuple):
    """The claim that one variant has the lower number; "" names the compared number of blocks."""

    text: str
    lower: str
    higher: str
    measure: str
    paper: str = ""


CLAIMS = (
    Claim("Interleaved new blocks learn more than stacked at the end", "", "suffix", "domain",
          "Unfair-ToS 75.11 against 60.98"),
    Claim("Interleaved new blocks learn more than stacked at the front", "", "prefix", "domain",
          "Unfair-ToS 75.11 against 0.81"),
    Claim("Stacked at the front, they forget more", "", "prefix", "general",
          "general average 56.70 against 29.36, the base's 58.26"),
    Claim("New blocks forget less than full fine-tuning", "", "full", "general",
          "general average 56.70 against 55.01"),
    Claim("New blocks learn more than full fine-tuning", "", "full", "domain",
          "Unfair-ToS 75.11 against 70.63"),
    Claim("LoRA of as many parameters learns less than new blocks", "", "lora", "domain",
          "Unfair-ToS 65.34 against 75.11"),
    Claim("LoRA of as many parameters forgets less than new blocks", "lora", "", "general",
          "general average 58.15 against 56.70"),
    Claim("The MoE baseline learns less than new blocks", "", "moe", "domain",
          "Unfair-ToS 67.27 against 75.11"),
    Claim("New blocks learn more than as many of the base's own", "", "originals", "domain"),
    Claim("New blocks forget less than as many of the base's own", "", "originals", "general"),
    Claim("Copies that are not zeroed learn less", "", "copies", "domain"),
    Claim("Copies that are not zeroed forget more", "", "copies", "general"),
    Claim("Zero norms instead of zero outputs learn less", "", "zero-norms", "domain"),
)  # fmt: skip


def is_clear(difference: float, *errors: float | None) -> bool | None:
    """Returns whether a difference of means with these errors is clear; None for one seed."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return difference != 0 and abs(difference) >= ERRORS * sum(e**2 for e in known) ** 0.5


def verdict(lower: Spread, higher: Spread) -> str:
    """Returns whether the first mean is the lower one. For one seed, only the sign counts."""
    difference = higher.mean - lower.mean
    clear = is_clear(difference, lower.error, higher.error)
    if clear is None:
        sign = "the same" if difference == 0 else "as claimed" if difference > 0 else "opposite"
        return f"one seed, only the sign: {sign}"
    return EQUAL if not clear else HOLDS if difference > 0 else FAILS


def findings(results: dict[str, Any]) -> str:
    """Returns the verdicts on all claims, study by study, in Markdown.

    A claim about a variant that a study does not have is left out. Shares on the other general sets
    are compared with the share on the first.
    """
    parts = [
        "A verdict and two numbers follow each claim. The numbers are means ± standard deviations "
        f"over seeds. A claim *{HOLDS}* or *{FAILS}* if the means differ by at least {ERRORS} "
        f"standard errors of their difference; otherwise there is *{EQUAL}*. With three seeds, "
        "this rule finds a difference between two equal variants in about one case of nine. The "
        "paper's numbers are those of its Table 5 (LLaMA-2-7B on law), where higher is better; "
        f"here, lower is better. A way to forget less meets the aim if {AIM}. After the ± of a "
        "share stands its standard error. The shares on the other general sets are compared with "
        "the share on the first. If the replayed text comes from the first set's source, *less* on "
        "the others suggests that the model learned that text by heart, and no clear difference "
        "that it kept its abilities. All numbers belong to the chosen learning rates, on which "
        "learning and forgetting depend."
    ]
    for study in results["studies"]:
        rows = {row["name"]: row for row in summarize(study)}
        sentences = [*_numbers(rows), *_claims(study, rows)]
        text = " ".join(sentences)
        counts = {word: text.count(f"**{word}**") for word in (HOLDS, FAILS, EQUAL)}
        if any(counts.values()):
            listed = ", ".join(f"*{word}* {n}" for word, n in counts.items())
            sentences.insert(0, f"Number of verdicts: {listed}.")
        sentences += [*_retention(study, rows), *_front(rows), *_rates(rows)]
        lines = "\n".join(f"- {sentence}" for sentence in sentences)
        parts.append(f"### {study['name']}\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def _numbers(rows: dict[str, Row]) -> list[str]:
    """Compares neighbouring numbers of new blocks."""
    axis = [r for r in rows.values() if r["group"] == "number" and r["new_blocks"] is not None]
    axis.sort(key=lambda row: row["new_blocks"])
    if len(axis) < 2:
        return []
    steps = "; ".join(_compare(more, fewer, "domain") for fewer, more in pairwise(axis))
    paper = "Unfair-ToS 67.45, 69.57, 71.31, 75.11, 75.17, 73.93 for +1, +2, +4, +8, +16, +32"
    ends = _compare(axis[0], axis[-1], "general")
    return [
        f"More new blocks learn more: {steps}. (Paper: {paper}.)",
        f"Fewer new blocks forget less: {ends}. (Paper: general average 55.96, 56.52, 55.87, "
        "56.70, 56.35, 56.52, without a trend.)",
    ]


def _claims(study: dict[str, Any], rows: dict[str, Row]) -> list[str]:
    sentences = []
    for claim in CLAIMS:
        lower, higher = (rows.get(n or study["compared"]) for n in (claim.lower, claim.higher))
        if lower is None or higher is None or lower is higher:
            continue
        paper = f" (Paper: {claim.paper}.)" if claim.paper else ""
        sentences.append(f"{claim.text}: {_compare(lower, higher, claim.measure)}.{paper}")
    return sentences


def _compare(lower: Row, higher: Row, measure: str) -> str:
    """Returns the verdict with its two numbers."""
    if missing := [row for row in (lower, higher) if not row["runs"]]:
        return " and ".join(
            f"`{row['label']}` has no finished run ({row['failed']} failed)" for row in missing
        )
    name, form = MEASURES[measure]
    low, high = lower[measure], higher[measure]
    numbers = f"{low.text(form)} of `{lower['label']}`, {high.text(form)} of `{higher['label']}`"
    return f"**{verdict(low, high)}** ({name}: {numbers})"


def _retention(study: dict[str, Any], rows: dict[str, Row]) -> list[str]:
    """Says which ways to forget less meet the aim, and whether all general sets moved alike."""
    options = retention(study, list(rows.values()))
    compared = {option["name"] for option in options}
    first, *others = study["general"]
    sentences = []
    for option in sorted(options, key=lambda option: not option["meets"]):
        words, gone = "meets" if option["meets"] else "does not meet", option["gone"]
        share = f"`{option['plain']}` forgets nothing" if gone is None else f"{gone.text()} gone"
        shares = option["sets"]
        if others and shares[first] is not None:
            listed = [f"{_alike(shares[first], shares[name])} on `{name}`" for name in others]
            share += f" ({shares[first].text()} on `{first}`; {'; '.join(listed)})"
        sentences.append(
            f"`{option['label']}` **{words} the aim**: {share}, domain loss "
            f"{option['domain']:+z.1%}, training cost {option['cost']:.2f}x."
        )
    return sentences + [
        f"`{row['label']}` cannot be compared: {row['runs']} runs finished, {row['failed']} failed."
        for row in rows.values()
        if row["group"] == "retention" and row["name"] not in compared
    ]


def _alike(first: Share, other: Share | None) -> str:
    """Compares the share on another general set with the share on the first."""
    if other is None:
        return "nothing was forgotten"
    difference = other.gone - first.gone
    word = "more" if difference > 0 else "less" if difference < 0 else "the same"
    clear = is_clear(difference, first.error, other.error)
    if clear is None:
        return f"{other.text()} (one seed, only the sign: {word})"
    return f"{other.text()} (**{word if clear else EQUAL}**)"


def _front(rows: dict[str, Row]) -> list[str]:
    """Lists the Pareto front, on which every difference of means counts."""
    best = [f"`{label}`" for label in front(list(rows.values())) if label != "base"]
    if not best or sum(row["runs"] > 0 for row in rows.values()) < 2:
        return []
    return [
        "The Pareto front, where no other variant has lower means on both domain and general text, "
        f"consists of {', '.join(best)}."
    ]


def _rates(rows: dict[str, Row]) -> list[str]:
    """Names the variants whose learning rate is less well chosen than that of others."""
    run = [row for row in rows.values() if row["runs"]]
    alone = [row for row in run if row["tried"] == 1]
    beyond = "The chosen rate is the {} of those tried, so a better one may lie beyond, for"
    taken = "The learning rate was chosen for the plain expansion and taken over by"
    groups = {
        beyond.format("highest"): [row for row in run if "highest" in row["rate"]],
        beyond.format("lowest"): [row for row in run if "lowest" in row["rate"]],
        "Only one learning rate was tried for": [row for row in alone if not row["varies"]],
        taken: [row for row in alone if row["varies"]],
    }
    labels = {words: [f"`{row['label']}`" for row in group] for words, group in groups.items()}
    return [f"{words} {', '.join(named)}." for words, named in labels.items() if named]
