"""The variants of a study: the paper's variants (Table 5, Appendix H), controls, and the ways to
forget less. Each is a start for `train.py` with a few options, or a model of `models.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from options import StudySettings

from llamapro.errors import ConfigError
from llamapro.expansion import interleave


@dataclass(frozen=True)
class Variant:
    """One row of a study's table.

    Attributes:
        name: also the name of its directory.
        label: what the table calls it.
        group: "number" or "place" of new blocks, "compared" with them, or "retention".
        new_blocks: how many there are, if any.
        expand: options that make its start, of `convert.py expand` or, with --by, of
            `placement.py`; () starts from the base itself.
        options: options of train.py, beside those that all variants share.
        writing: options of train.py that say what the base writes for it, if it writes.
        built: arguments of `models.build`; None: the model that train.py loads.
        varies: the variant that it changes only by options; its learning rate is taken over.
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


def nearest_number(num_layers: int, wanted: int) -> int:
    """Returns the number of new blocks that interleaves in a base and is nearest to `wanted`."""
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def plain(blocks: int) -> Variant:
    """Returns the paper's method: interleaved new blocks that start as the identity."""
    label = f"+{blocks} block{'s' * (blocks > 1)}"
    return Variant(f"new-{blocks}", label, "number", blocks, ("--num-new-blocks", str(blocks)))


def comparisons(num_layers: int, numbers: Sequence[int], compared: int) -> list[Variant]:
    """Returns the variants of the paper's question: what trains, how many blocks, and where.

    Args:
        num_layers: layers of the base.
        numbers: numbers of new blocks; those that do not interleave in this base are left out.
        compared: the number at which places and other methods are compared.
    """
    variants = [plain(n) for n in sorted({n for n in numbers if num_layers % n == 0} | {compared})]
    number = ("--num-new-blocks", str(compared))
    for name, option, label in (
        ("prefix", "--placement", "prefix stacking"),
        ("suffix", "--placement", "suffix stacking"),
        ("similar", "--by", "where layers change least"),
        ("unimportant", "--by", "where layers matter least"),
    ):
        expand = (*number, option, name)
        variants.append(Variant(name, f"+{compared}, {label}", "place", compared, expand))
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


def retention(
    s: StudySettings, compared: int, general: Sequence[str], domain: Sequence[str]
) -> list[Variant]:
    """Returns the ways to forget less than plain expansion by `compared` new blocks.

    Args:
        s: how much is replayed.
        compared: the number of new blocks.
        general: general text to replay; without any, that variant is left out.
        domain: the training text.
    """

    def written(temperature: float) -> tuple[str, ...]:
        tokens, sampled = ("--replay.tokens", str(s.replay_tokens)), f"{temperature:g}"
        return (*tokens, "--replay.temperature", sampled, "--replay.batch-size", "64")

    kinds: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = []
    if general:
        kinds.append(("replay", "replay of general text", ("--replay.data", *general), ()))
    # Text that is learned as it stands is sampled from the model's own distribution.
    kinds.append(("self-replay", "self-replay", (), written(1.0)))
    for weight in s.replay_weights:
        name, label = f"distill-{weight:g}", f"self-distillation, weight {weight:g}"
        weighted = ("--replay.distill", "--replay.weight", f"{weight:g}")
        kinds.append((name, label, weighted, written(s.replay_temperature)))
    options = ("--replay.distill", "--replay.data", *domain)
    kinds.append(("distill-domain", "self-distillation on the domain's text", options, ()))
    start, share = plain(compared), ("--replay.share", f"{s.replay_share:g}")
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


def check_names(s: StudySettings) -> None:
    """Raises ConfigError for names in --variants that no base has."""
    layers = max(s.compared, *s.new_blocks, 1)
    known = [plain(n).name for n in sorted({s.compared, *s.new_blocks})]
    others = [*comparisons(layers, (), layers), *retention(s, 1, ["general"], ["domain"])]
    known += [v.name for v in others if v.group != "number"]
    wrong = [f"--variants {name}: unknown; known are {', '.join(known)}" for name in s.variants
             if name not in known]  # fmt: skip
    if wrong:
        raise ConfigError("; ".join(wrong))
