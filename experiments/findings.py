"""Generated sentences: whether the study's numbers agree with the paper's ordering.

A difference of two means is *told apart* if it is at least two standard errors of that difference.
About one pair in nine of equal variants with three seeds each is told apart by this rule.
"""

from itertools import pairwise
from typing import Any, NamedTuple

from summary import AIM, Row, Share, Spread, front, retention, summarize

HOLDS, FAILS, EQUAL = "holds", "does not hold", "not told apart"
ERRORS = 2  # standard errors that tell a difference apart
MEASURES = {"domain": ("domain loss", ".3f"), "general": ("general change", "+z.3f")}
TAKEN = "The learning rate is that of the variant they vary, chosen without them, for"
ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"


class Claim(NamedTuple):
    """Says that one variant has the lower number; "" is the variant that all are compared with."""

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
    Claim("Placed where layers change least, new blocks learn more", "similar", "", "domain"),
    Claim("Placed where layers change least, they forget less", "similar", "", "general"),
    Claim("Placed where layers matter least, new blocks learn more", "unimportant", "", "domain"),
    Claim("Placed where layers matter least, they forget less", "unimportant", "", "general"),
)  # fmt: skip


def verdict(lower: Spread, higher: Spread) -> str:
    """Returns whether the first mean is the lower one: `HOLDS`, `FAILS` or `EQUAL`.

    One seed has no standard error, so that only the sign is told.
    """
    difference = higher.mean - lower.mean
    if lower.error is None or higher.error is None:
        sign = "the same" if difference == 0 else "as claimed" if difference > 0 else "opposite"
        return f"one seed, only the sign: {sign}"
    if difference == 0 or abs(difference) < ERRORS * (lower.error**2 + higher.error**2) ** 0.5:
        return EQUAL
    return HOLDS if difference > 0 else FAILS


def findings(results: dict[str, Any]) -> str:
    """Returns what holds here and what does not, study by study, in Markdown.

    A claim about variants that a study does not have is left out; one without a finished run says
    so. Shares on the other general sets are compared with the share on the first.
    """
    parts = [
        "Each claim is followed by its verdict and its two numbers, mean ± standard deviation over "
        f"seeds. *{HOLDS.capitalize()}* and *{FAILS}* are said of differences of at least "
        f"{ERRORS} standard errors, *{EQUAL}* of smaller ones. With three seeds each, this rule "
        "tells apart about one pair in nine of equal variants. The paper's numbers are its Table 5 "
        "(LLaMA-2-7B on law; higher is better); here, lower is better. The aim of what is done "
        f"against forgetting: {AIM}; a share's ± is its standard error. Shares on other general "
        "sets are compared with that on the first: if replayed text is of the first one's source, "
        "*less* elsewhere is a sign of text learned by heart, a like share one of ability kept. "
        "All are at the chosen learning rates, on which learning and forgetting both depend."
    ]
    for study in results["studies"]:
        rows = {row["name"]: row for row in summarize(study)}
        sentences = [*_numbers(rows), *_claims(study, rows)]
        text = " ".join(sentences)
        counts = {word: text.count(f"**{word}**") for word in (HOLDS, FAILS, EQUAL)}
        if any(counts.values()):
            listed = ", ".join(f"{word}: {n}" for word, n in counts.items())
            sentences.insert(0, f"Of the comparisons that follow, {listed}.")
        sentences += [*_gradients(study), *_retention(study, rows), *_front(rows), *_rates(rows)]
        lines = "\n".join(f"- {sentence}" for sentence in sentences)
        parts.append(f"### {study['name']}\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def _numbers(rows: dict[str, Row]) -> list[str]:
    """More new blocks against fewer, neighbours on the axis."""
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
    """The verdict with its two numbers."""
    missing = [row for row in (lower, higher) if not row["runs"]]
    if missing:
        return " and ".join(
            f"`{row['label']}` has no finished run ({row['failed']} failed)" for row in missing
        )
    name, form = MEASURES[measure]
    low, high = lower[measure], higher[measure]
    numbers = f"{low.text(form)} of `{lower['label']}`, {high.text(form)} of `{higher['label']}`"
    return f"**{verdict(low, high)}** ({name}: {numbers})"


def _gradients(study: dict[str, Any]) -> list[str]:
    """Which tensors of a new block can learn, and what that says of Appendix A."""
    gradients, sentences = study["gradients"] or {}, []
    for kind, steps in gradients.items():
        texts = []
        for number, norms in enumerate(steps, 1):
            zero = [name for name, norm in norms.items() if norm == 0]
            which = f" ({', '.join(zero)})" if 0 < len(zero) < len(norms) else ""
            texts.append(f"step {number}: exactly 0 for {len(zero)} of {len(norms)} tensors{which}")
        sentences.append(f"Gradients of a new block, {kind}: " + "; ".join(texts) + ".")
    norms = gradients.get("zero-norms", [])
    if norms and all(ATTENTION_NORM in step and FFN_NORM in step for step in norms):
        first = norms[0]
        ffn = "exactly 0" if all(step[FFN_NORM] == 0 for step in norms) else "not always 0"
        attention = "0, too" if first[ATTENTION_NORM] == 0 else f"{first[ATTENTION_NORM]:.2e}"
        sentences.append(
            "With zero norms, Appendix A derives that the gradient of the FFN's norm is 0: "
            f"it is {ffn} at the {len(norms)} steps measured. That of the attention's norm, "
            f"which the values can reach, is {attention} at step 1."
        )
    return sentences


def _retention(study: dict[str, Any], rows: dict[str, Row]) -> list[str]:
    """Which options against forgetting meet the aim, and whether all general sets moved alike."""
    options = retention(study, list(rows.values()))
    compared = {option["name"] for option in options}
    first, *others = study["general"]
    sentences = []
    for option in sorted(options, key=lambda option: not option["meets"]):
        words, gone = "meets" if option["meets"] else "does not meet", option["gone"]
        share = f"`{option['plain']}` forgets nothing" if gone is None else f"{gone.text()} gone"
        shares = option["sets"]
        if others and shares[first] is not None:
            listed = [f"{_alike(shares[first], shares[name])} of `{name}`" for name in others]
            share += f" ({shares[first].text()} of `{first}`; {'; '.join(listed)})"
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
    """The share of another general set, and how it stands to that of the first."""
    if other is None:
        return "nothing was forgotten"
    difference = other.gone - first.gone
    word = "more" if difference > 0 else "less" if difference < 0 else "the same"
    if first.error is None or other.error is None:
        return f"{other.text()} (one seed, only the sign: {word})"
    is_apart = abs(difference) >= ERRORS * (first.error**2 + other.error**2) ** 0.5
    return f"{other.text()} (**{word if is_apart and difference else EQUAL}**)"


def _front(rows: dict[str, Row]) -> list[str]:
    """Who is on the Pareto front; differences that are not told apart count as well."""
    best = [f"`{label}`" for label in front(list(rows.values())) if label != "base"]
    if not best or sum(row["runs"] > 0 for row in rows.values()) < 2:
        return []
    return [f"No other variant's means are lower in both, domain and general: {', '.join(best)}."]


def _rates(rows: dict[str, Row]) -> list[str]:
    """At which variants the learning rate is less well chosen than at others."""
    sentences = []
    for end in ("highest", "lowest"):
        labels = [f"`{row['label']}`" for row in rows.values() if end in row["rate"]]
        if labels:
            sentences.append(
                f"The chosen learning rate is the {end} of those tried, so that a better one may "
                f"lie beyond, for {', '.join(labels)}."
            )
    alone = [row for row in rows.values() if row["runs"] and row["tried"] == 1]
    for is_varied, words in ((False, "Only one learning rate was tried for"), (True, TAKEN)):
        labels = [f"`{row['label']}`" for row in alone if bool(row["varies"]) is is_varied]
        if labels:
            sentences.append(f"{words} {', '.join(labels)}.")
    return sentences
