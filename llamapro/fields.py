"""Fields of a `config.json`, read strictly: numbers, flags, the sliding window, RoPE's settings.

transformers 4 writes `rope_theta` beside `rope_scaling`, 5 writes both into `rope_parameters`. A
file that was edited, or written for both, may have all three; they must say the same.
"""

from dataclasses import asdict, dataclass
from typing import Any

from llamapro.errors import warn


@dataclass(frozen=True)
class RopeScaling:
    """Stretches RoPE's frequencies for longer contexts, as `ops.rope_frequencies` describes."""

    kind: str  # "linear" (Chen et al., 2023) or "llama3" (Llama 3.1), which has all fields
    factor: float  # divides all frequencies ("linear"), or the low ones ("llama3")
    # A frequency is low, or high, if its wave fits this often into the original context; the
    # frequencies between are blended.
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: float = 0.0  # the original context in tokens

    def to_dict(self) -> dict[str, Any]:
        """Returns the `rope_scaling` entry of a `config.json`."""
        found = asdict(self)
        return {"rope_type": found.pop("kind"), **{key: n for key, n in found.items() if n}}


LAYER_TYPES = ("full_attention", "sliding_attention")
_CONTEXT = "original_max_position_embeddings"
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
}


class Fields:
    """Reads numbers out of a JSON object and collects what is wrong with them."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw, self.wrong = raw, list[str]()

    def number(self, key: str, default: Any = None, kind: type = int, value: Any = None) -> Any:
        """Returns a positive number: `value`, else the key's, else `default`; 1 if it is wrong."""
        value = next((v for v in (value, self.raw.get(key), default) if v is not None), None)
        if value is None:
            self.wrong.append(f"{key} is missing")
            return 1
        # Python's JSON reads NaN and Infinity, and integers too long for a float.
        if type(value) not in (int, float) or not 0 < value < 1e300:
            self.wrong.append(f"{key} is {value!r:.80}, expected a positive number")
            return 1
        if kind is int and value != int(value):
            self.wrong.append(f"{key} is {value!r}, expected a whole number")
            return 1
        return kind(value)

    def flag(self, key: str) -> bool:
        """Returns a bool; False if the key is absent, null, or wrong."""
        value = self.raw.get(key)
        if not isinstance(value, bool | None):
            self.wrong.append(f"{key} is {value!r:.80}, expected true or false")
        return value is True


def read_window(model_type: str, layers: int, fields: Fields) -> int | None:
    """Reads the sliding window, which must be that of every layer or of none."""
    raw, is_qwen = fields.raw, model_type.startswith("qwen")
    is_on = model_type == "mistral" or (is_qwen and fields.flag("use_sliding_window"))
    window, kinds = None, [LAYER_TYPES[0]]
    if is_on and raw.get("sliding_window") is not None:
        # Mistral has it in every layer. Qwen can leave it out of the lowest, or of all.
        window = fields.number("sliding_window")
        kinds = [*LAYER_TYPES] if is_qwen else [LAYER_TYPES[1]]
    given, context = raw.get("sliding_window"), raw["max_position_embeddings"]
    if model_type == "llama" and type(given) is type(context) is int and 0 < given < context:
        warn(f"config.json: sliding_window {given} is not applied; transformers limits its cache")
    key, types = "layer_types", raw.get("layer_types")
    if not types:
        key, first = "max_window_layers", raw.get("max_window_layers") if is_qwen else 0
        first = first if type(first) is int else 1  # lowest layer that has the window
        types = [LAYER_TYPES[window is not None and i >= first] for i in range(layers)]
    types = types if isinstance(types, list) else [None]
    if types not in [[kind] * len(types) for kind in kinds]:
        allowed = " or ".join(map(repr, kinds))
        fields.wrong.append(
            f"{key} {raw[key]!r:.80} is not supported (only {allowed} for all {layers} layers)"
        )
    elif len(types) != layers:  # tools that add or remove layers leave the old list
        warn(
            f"config.json: layer_types has {len(types)} entries for {layers} layers, which "
            "transformers refuses; all are alike, so that of each layer is clear"
        )
    return window if LAYER_TYPES[1] in types else None


def read_rope(raw: dict[str, Any], fields: Fields) -> tuple[float, RopeScaling | None]:
    """Returns RoPE's theta and scaling; adds to `fields.wrong` what is impossible in them.

    Two places that answer the same question differently are refused, because versions of
    transformers and other tools do not agree on which of them counts.
    """
    thetas = {"rope_theta": raw.get("rope_theta")}
    context = raw.get(_CONTEXT)  # transformers 5 takes it, the one inside, or the longest
    scalings: dict[str, RopeScaling | None] = {}
    for place in ("rope_parameters", "rope_scaling"):
        rope = raw.get(place) or {}
        if not isinstance(rope, dict):
            fields.wrong.append(f"{place} is {rope!r:.80}, expected a JSON object")
        elif rope := {key: value for key, value in rope.items() if value is not None}:
            thetas[f"{place}.rope_theta"] = rope.get("rope_theta")
            if "llama3" in (rope.get("rope_type"), rope.get("type")):
                if context is not None and (other := rope.get(_CONTEXT, context)) != context:
                    fields.wrong.append(
                        f"{_CONTEXT} is {context!r}, and {other!r} in {place}; keep one"
                    )
                longest = fields.raw["max_position_embeddings"]
                rope = {_CONTEXT: longest if context is None else context} | rope
            scalings[place] = _read_scaling(rope, place, fields.wrong)
        elif place in raw and any(scalings.values()):
            warn(f"config.json: {place} is empty; rope_parameters count, as in transformers 5")
    given = {place: theta for place, theta in thetas.items() if theta is not None}
    for found, what in ((given, "theta"), (scalings, "scaling")):
        if any(v != next(iter(found.values())) for v in found.values()) and not fields.wrong:
            shown = " and ".join(f"{place} {raw.get(place, v)!r}" for place, v in found.items())
            fields.wrong.append(f"RoPE's {what} is given twice, differently: {shown}; keep one")
    numbers = [fields.number("rope_theta", 10000.0, float, theta) for theta in given.values()]
    return (numbers or [10000.0])[0], next(iter(scalings.values()), None)


def _read_scaling(rope: dict[str, Any], place: str, wrong: list[str]) -> RopeScaling | None:
    """Reads one of the two objects; adds to `wrong` what is impossible in it."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "type" in rope and kind != rope["type"]:
        wrong.append(f"{place}: rope_type is {kind!r}, type is {rope['type']!r}; keep one")
    if (part := rope.get("partial_rotary_factor", 1)) not in (1, None):
        wrong.append(f"partial_rotary_factor {part!r} is not supported (only 1)")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        wrong.append(f"{place}.{nested[0]}: settings for some layers only are not supported")
    if kind == "default" and rope.get("factor") not in (None, 1):
        wrong.append(f"{place}: has a factor {rope['factor']!r}, but no rope_type that uses it")
    if kind not in [*_ROPE_FIELDS]:  # a list has no hash
        wrong.append(f"rope type {kind!r} is not supported (only default, linear and llama3)")
        return None
    fields = Fields(rope)
    values = {key: fields.number(key, kind=float) for key in _ROPE_FIELDS[kind]}
    wrong += [f"rope {kind}: {problem}" for problem in fields.wrong]
    if kind == "default" or fields.wrong:
        return None
    scaling = RopeScaling(kind, **values)
    if scaling.low_freq_factor > 0 and scaling.low_freq_factor >= scaling.high_freq_factor:
        wrong.append(
            f"rope {kind}: low_freq_factor {scaling.low_freq_factor} is not below "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    return scaling
