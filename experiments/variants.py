"""What a study compares: the paper's variants (Table 5, Appendix H), controls, and the ways to
forget less. Each is a start for `train.py` with a few options, or a model of comparisons.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llamapro.expansion import interleave


@dataclass(frozen=True)
class Variant:
    """One row of a study's table.

    Attributes:
        name: of its directory.
        label: of its row.
        group: "number" or "place" of new blocks, "compared" with them, or "retention".
        new_blocks: how many there are, if any.
        expand: options that make its start, of `convert.py expand` or, with --by, of
            `placement.py`; () is the base itself.
        options: of train.py, beside those that all share.
        writing: options of train.py that say what the base writes for it, if it writes.
        built: a model of comparisons.py instead, and what it is built from; None: train.py's.
        varies: the variant that it is, but for its options: it takes the learning rate of that one.
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


def fitting(num_layers: int, wanted: int) -> int:
    """Returns the number of new blocks that interleaves and is nearest to the wanted one."""
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def plain(blocks: int) -> Variant:
    """The paper's method: interleaved, with the identity as its start."""
    label = f"+{blocks} block{'s' * (blocks > 1)}"
    expand = ("--num-new-blocks", str(blocks))
    return Variant(f"new-{blocks}", label, "number", blocks, expand)


def comparisons(num_layers: int, numbers: Sequence[int], compared: int) -> list[Variant]:
    """Returns the variants of the paper's question: what trains, how many blocks, and where.

    Args:
        num_layers: of the base.
        numbers: of new blocks; those that do not interleave in this base are left out.
        compared: the number at which places and other methods are compared.
    """
    wanted = sorted({n for n in numbers if num_layers % n == 0} | {compared})
    found = [plain(blocks) for blocks in wanted]
    some = ("--num-new-blocks", str(compared))
    for placement, option, label in (
        ("prefix", "--placement", "prefix stacking"),
        ("suffix", "--placement", "suffix stacking"),
        ("similar", "--by", "where layers change least"),
        ("unimportant", "--by", "where layers matter least"),
    ):
        expand = (*some, option, placement)
        found.append(Variant(placement, f"+{compared}, {label}", "place", compared, expand))
    layout = interleave(num_layers, compared)
    tops = [layout.sources[i] for i in layout.new_layers]
    found.append(Variant("full", "full fine-tuning", "compared"))
    for name, label, about in (
        ("lora", "LoRA, as many parameters", {"like": compared}),
        ("moe", "MoE, a second W_3 in every block", {}),
        ("originals", f"{compared} of the base's own blocks", {"layers": tops}),
        ("copies", f"+{compared}, copies without zeroing", {"layers": tops}),
        ("zero-norms", f"+{compared}, zero norms", {"layers": tops}),
    ):
        found.append(Variant(name, label, "compared", built={"model": name} | about))
    return found


def retention(
    compared: int, general: Sequence[str], domain: Sequence[str], replay: "Replay"
) -> list[Variant]:
    """Returns the ways to forget less than plain block expansion with so many blocks.

    Args:
        compared: the number of new blocks.
        general: general text to replay; none: no such variant.
        domain: the training text.
        replay: how much, and how much it counts.
    """
    start, share = plain(compared), ("--replay.share", f"{replay.share:g}")
    kinds: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = []
    if general:
        kinds.append(("replay", "replay of general text", ("--replay.data", *general), ()))
    kinds.append(("self-replay", "self-replay", (), replay.written(1.0)))
    for weight in replay.weights:
        name, label = f"distill-{weight:g}", f"self-distillation, weight {weight:g}"
        how = ("--replay.distill", "--replay.weight", f"{weight:g}")
        kinds.append((name, label, how, replay.written(replay.temperature)))
    own = ("--replay.distill", "--replay.data", *domain)
    kinds.append(("distill-domain", "self-distillation on the domain's text", own, ()))
    return [
        Variant(
            name,
            f"+{compared}, {label}",
            "retention",
            compared,
            start.expand,
            (*share, *options),
            writing,
            varies=start.name,
        )
        for name, label, options, writing in kinds
    ]


@dataclass(frozen=True)
class Replay:
    """How the retention variants replay: the settings of train.py's `replay`.

    Attributes:
        share: of the sequences.
        weights: of the replayed ones' loss, where the base is the teacher; each is a variant.
        tokens: how many the base writes.
        temperature: of what it teaches on. What is learnt as it stands is written at 1, as the
            base's probabilities are.
    """

    share: float
    weights: tuple[float, ...]
    tokens: int
    temperature: float

    def written(self, temperature: float) -> tuple[str, ...]:
        """Returns the options that say what the base writes."""
        tokens, hot = ("--replay.tokens", str(self.tokens)), f"{temperature:g}"
        return (*tokens, "--replay.temperature", hot, "--replay.batch-size", "64")
