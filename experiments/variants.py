"""The variants of a study: those of the paper (Table 5, Appendix H), controls, ways to forget less.

Each is a start for `train.py` with a few options, or a model of `models.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from options import StudySettings

from llamapro.expansion import interleave


@dataclass(frozen=True)
class Variant:
    """One row of a study's table.

    Attributes:
        name: its name on the command line and of its directory.
        group: "number" or "place" of new blocks, "compared" with them, or "retention".
        new_blocks: their number, or None.
        expand: options of `convert.py expand` that make its start. It starts from the base if there
            are none.
        writing: options of train.py for the text that the base writes for it, if any.
        built: arguments of `models.build`, or None for the model that train.py loads.
        varies: the variant, or "", that it changes by options only and whose rate it takes over.
        longer: how many times as many steps it takes as plain expansion.
    """

    name: str
    label: str
    group: str
    new_blocks: int | None = None
    expand: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    writing: tuple[str, ...] = ()
    built: dict[str, Any] | None = field(default=None, hash=False)
    varies: str = ""
    longer: float = 1.0


def nearest_number(num_layers: int, wanted: int) -> int:
    """Returns the number nearest to `wanted` of new blocks that interleave in a base."""
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def plain(blocks: int) -> Variant:
    """Returns the paper's method, interleaved new blocks that start as the identity."""
    label = f"+{blocks} block{'s' * (blocks > 1)}"
    return Variant(f"new-{blocks}", label, "number", blocks, ("--num-new-blocks", str(blocks)))


def comparisons(num_layers: int, numbers: Sequence[int], compared: int) -> list[Variant]:
    """Returns the variants that differ in what trains, how many new blocks, and where.

    Args:
        numbers: numbers of new blocks. Those that do not interleave in this base are left out.
        compared: the number for comparing places and other methods.
    """
    variants = [plain(n) for n in sorted({n for n in numbers if num_layers % n == 0} | {compared})]
    number = ("--num-new-blocks", str(compared))
    for name in ("prefix", "suffix"):
        expand = (*number, "--placement", name)
        variants.append(Variant(name, f"+{compared}, {name} stacking", "place", compared, expand))
    layout = interleave(num_layers, compared)
    tops = [layout.sources[i] for i in layout.new_layers]  # the layers that plain expansion copies
    variants.append(Variant("full", "full fine-tuning", "compared"))
    for name, label, arguments in (
        ("lora", "LoRA, as many parameters", {"like": compared}),
        ("moe", "MoE, a second W_3 in every block", {}),
        ("originals", f"{compared} of the base's own blocks", {"layers": tops}),
        ("copies", f"+{compared}, copies without zeroing", {"layers": tops}),
        ("zero-norms", f"+{compared}, zero norms", {"layers": tops}),
    ):
        variants.append(Variant(name, label, "compared", built={"model": name} | arguments))
    return variants


# One setting for every base and domain: 3 % of what is learned may be forgotten. An eighth of the
# sequences is replayed, and a seventh more steps read as much of the domain as without.
HOLD, HELD_SHARE = "3%", 1 / 8


def retention(
    s: StudySettings, compared: int, general: Sequence[str], domain: Sequence[str]
) -> list[Variant]:
    """Returns the ways to forget less than plain expansion by `compared` new blocks.

    Args:
        s: how much is replayed.
        compared: the number of new blocks.
        general: general text to replay. Without any, that variant is left out.
        domain: the training text.
    """
    start, distill = plain(compared), "--replay.distill"

    def way(
        name: str,
        label: str,
        options: tuple[str, ...] = (),
        temperature: float = 0.0,
        share: float = 0.0,
    ) -> Variant:
        tokens = 0 if share else s.replay_tokens
        written = f"--replay.tokens {tokens} --replay.temperature {temperature:g}"
        return replace(
            start,
            name=name,
            label=f"+{compared}, {label}",
            group="retention",
            options=("--replay.share", f"{share or s.replay_share:g}", *options),
            writing=(*written.split(), "--replay.batch-size", "64") if temperature else (),
            varies=start.name,
            longer=1 / (1 - share) if share else 10 / 9,
        )

    ways = [way("replay", "replay of general text", ("--replay.data", *general))] if general else []
    # Text that is learned as it stands is sampled from the model's own distribution.
    ways.append(way("self-replay", "self-replay", temperature=1.0))
    for weight in s.replay_weights:
        name, label = f"distill-{weight:g}", f"self-distillation, weight {weight:g}"
        weighted = (distill, "--replay.weight", f"{weight:g}")
        ways.append(way(name, label, weighted, s.replay_temperature))
    held = ("--replay.hold", HOLD)
    label = f"self-distillation, replay.hold {HOLD}"
    ways.append(way("hold", label, held, temperature=1.0, share=HELD_SHARE))
    label = "self-distillation on the domain's text"
    return [*ways, way("distill-domain", label, (distill, "--replay.data", *domain))]
