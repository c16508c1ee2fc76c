"""Numbers as people read them, and nested values as tables and JSON take them."""

import math
from typing import Any


def perplexity(loss: float) -> float:
    """Returns exp(loss in nats per token), infinity where that overflows."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def format_count(n: float) -> str:
    """Returns a count in three digits: `512`, `41.2k`, `1.26B`."""
    return _three_digits(n, 1000, ("", "k", "M", "B", "T"))


def format_bytes(n: float) -> str:
    """Returns a size in three digits and binary units: `512 B`, `61.2 GiB`."""
    return _three_digits(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _three_digits(value: float, base: int, units: tuple[str, ...]) -> str:
    unit = 0
    # 999.5 would be rounded to four digits.
    while abs(value) >= 999.5 and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    if unit == 0 and float(value).is_integer():
        return f"{value:.0f}{units[0]}"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}{units[unit]}"


def format_duration(seconds: float) -> str:
    """Returns a duration by its two largest units: `4.2s`, `42s`, `3m07s`, `5h12m`, `2d03h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(minutes / 60)
    return f"{hours // 24}d{hours % 24:02d}h"


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one with dotted keys: {"train.steps": 100, ...}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def finite(value: Any) -> Any:
    """Replaces numbers that are not finite by None: JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
