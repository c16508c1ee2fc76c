"""The model's configuration: Hugging Face's `config.json`, read strictly, and the expansion record.

What cannot be represented by `llamapro/model.py` (biases, other activations, scaled RoPE, ...) is
refused with the field's name: a model that would be computed wrongly is never loaded.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake of the user's: commands print its message without a traceback and exit 2."""


class ConfigError(UserError):
    """A setting or a `config.json` field is missing, unknown or impossible."""


class CheckpointError(UserError):
    """A checkpoint file is missing, damaged, or does not fit the model or its base."""


class DataError(UserError):
    """A corpus or tokenizer file is missing, empty, unreadable or of another vocabulary."""


def suggest(name: str, known: list[str], cutoff: float = 0.6) -> str:
    """Returns " (did you mean 'x'?)" for the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class ExpansionRecord:
    """Which layers of a checkpoint are new blocks: written by `expand`, never recomputed.

    Attributes:
        new_layers: indices of the latest generation's new blocks, in this checkpoint's numbering.
        source_layers: for each of them, the layer of the base it was copied from (base numbering).
        base_sha256: `Checkpoint.sha256()` of the base that was expanded.
        generations: the earlier expansions, oldest first; each a mapping with the same first three
            keys, its `new_layers` kept up to date with this checkpoint's numbering.
    """

    new_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    base_sha256: str
    generations: tuple[dict[str, Any], ...] = ()

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], num_hidden_layers: int, where: str
    ) -> "ExpansionRecord":
        """Reads the `llamapro` entry of a `config.json`; raises ConfigError naming `where`."""
        try:
            record = cls(
                tuple(int(i) for i in raw["new_layers"]),
                tuple(int(i) for i in raw["source_layers"]),
                str(raw["base_sha256"]),
                tuple(raw.get("generations", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: the 'llamapro' record is damaged ({error!r})") from None
        layers, sources = record.new_layers, record.source_layers
        if (
            not layers
            or len(layers) != len(sources)
            or list(layers) != sorted(set(layers))
            or not all(0 <= i < num_hidden_layers for i in layers)
            or not all(0 <= i < num_hidden_layers - len(layers) for i in sources)
            or not all(isinstance(generation, dict) for generation in record.generations)
        ):
            raise ConfigError(
                f"{where}: the 'llamapro' record lists new_layers {list(layers)} with "
                f"source_layers {list(sources)}, impossible for "
                f"{num_hidden_layers} layers"
            )
        return record

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, the value of `config.json`'s `llamapro` key."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


# Fields that must have exactly this value (or be absent), because the model computes nothing else.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA's hyper-parameters under Hugging Face's names.

    Attributes:
        raw: the whole `config.json` this was read from; keys unknown to this class survive a
            rewrite, so other tools find what they put there.
        expansion: the `llamapro` record, or None for a model that was never expanded.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    expansion: ExpansionRecord | None = None
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`; raises ConfigError naming the file and every wrong field."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; a checkpoint directory in Hugging Face layout has one "
                "(a Meta release is converted with 'convert.py from-meta')"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config") -> "ModelConfig":
        """Reads the fields of a `config.json`, as transformers 4 or 5 writes it.

        Raises:
            ConfigError: naming `where` and, in one message, every field that is missing, impossible
                or not supported, each with the value found.
        """
        wrong: list[str] = []

        known = [f.name for f in dataclasses.fields(cls)] + ["eos_token_id", *_ONLY_SUPPORTED]
        for key in raw:
            # Foreign keys are fine; a near miss of a key that is absent is a typo that would
            # otherwise be replaced by a default in silence.
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
            if key not in known and near and near[0] not in raw:
                wrong.append(f"unknown key {key!r} (did you mean {near[0]!r}?)")

        def number(key: str, default: Any = None, kind: type = int, value: Any = None) -> Any:
            value = raw.get(key) if value is None else value
            value = default if value is None else value
            if value is None:
                wrong.append(f"{key} is missing")
                return 1
            # Python's JSON reads NaN and Infinity; neither is a size.
            if type(value) not in (int, float) or not 0 < value < math.inf:
                wrong.append(f"{key} is {value!r}, expected a positive number")
                return 1
            if kind is int and value != int(value):
                wrong.append(f"{key} is {value!r}, expected a whole number")
            return kind(value)

        sizes = {key: number(key) for key in _SIZES}
        heads = sizes["num_attention_heads"]
        kv_heads = number("num_key_value_heads", heads)
        if raw.get("head_dim") is None and sizes["hidden_size"] % heads:
            wrong.append(
                f"hidden_size {sizes['hidden_size']} is not a multiple of "
                f"num_attention_heads {heads}"
            )
        head_dim = number("head_dim", max(1, sizes["hidden_size"] // heads))
        if heads % kv_heads:
            wrong.append(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            wrong.append(f"head_dim {head_dim} is odd; RoPE rotates pairs")
        for key, allowed in _ONLY_SUPPORTED.items():
            if key in raw and raw[key] not in allowed:
                wrong.append(f"{key} {raw[key]!r} is not supported (only {allowed[0]!r})")

        # transformers 5 writes rope_parameters; 4 writes rope_theta beside rope_scaling.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            wrong.append(f"rope_parameters or rope_scaling is {rope!r}, expected a JSON object")
            rope = {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            wrong.append(f"rope type {rope_type!r} is not supported (only 'default')")
        rope_theta = number("rope_theta", 10000.0, float, rope.get("rope_theta"))

        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            wrong.append(f"tie_word_embeddings is {tied!r}, expected true or false")
        eos = raw.get("eos_token_id", 2)
        floats = {
            "rms_norm_eps": number("rms_norm_eps", 1e-6, float),
            "initializer_range": number("initializer_range", 0.02, float),
        }
        max_positions = number("max_position_embeddings", 2048)
        if wrong:
            raise ConfigError(f"{where}: " + "; ".join(wrong))
        expansion = None
        if raw.get("llamapro") is not None:
            expansion = ExpansionRecord.from_dict(
                raw["llamapro"], sizes["num_hidden_layers"], where
            )
        return cls(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            max_position_embeddings=max_positions,
            tie_word_embeddings=tied,
            bos_token_id=raw.get("bos_token_id", 1),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            expansion=expansion,
            raw=raw,
            **floats,
        )

    def expanded(self, num_hidden_layers: int, record: ExpansionRecord) -> "ModelConfig":
        """Returns this configuration with another number of layers and a `llamapro` record."""
        raw = dict(self.raw, num_hidden_layers=num_hidden_layers, llamapro=record.to_dict())
        return dataclasses.replace(
            self, num_hidden_layers=num_hidden_layers, expansion=record, raw=raw
        )

    def to_json(self) -> str:
        """Returns the text of `config.json`."""
        return json.dumps(self.raw, indent=2) + "\n"
