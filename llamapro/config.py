"""The model's configuration: Hugging Face's `config.json`, read strictly, and the expansion record.

LLaMA 1 to 3.2, Code Llama, TinyLlama, Mistral, Qwen2 and Qwen3 differ in these values only.
Whatever `llamapro/model.py` cannot compute (other activations, experts, ...) is refused by the
field's name, so no model is ever computed wrongly.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamapro.errors import ConfigError, warn
from llamapro.fields import LAYER_TYPES, Fields, RopeScaling, read_rope, read_window
from llamapro.files import read_json


@dataclass(frozen=True)
class ExpansionRecord:
    """Which layers of a checkpoint are new blocks. `expand` writes it; nothing recomputes it."""

    new_layers: tuple[int, ...]  # the latest expansion's new blocks, indices in this checkpoint
    source_layers: tuple[int, ...]  # for each of them, the base layer that it was copied from
    base_sha256: str  # `Checkpoint.sha256()` of the base that was expanded
    # The earlier expansions, oldest first. Each is a mapping with the same keys, and its
    # `new_layers` are indices in this checkpoint too.
    generations: tuple[dict[str, Any], ...] = ()
    # The number of rows of embedding and head that are the base's; the rows of added tokens follow.
    # None, and absent from the file, if no token was added.
    base_vocab_size: int | None = None
    computation: dict[str, Any] | None = None  # the base's; None in records of earlier versions
    new_sha256: str | None = None  # of what `merge` put in, `checkpoints.base.new_sha256`

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], num_hidden_layers: int, where: str
    ) -> "ExpansionRecord":
        """Reads the `llamapro` entry of a `config.json`; raises ConfigError naming `where`."""
        try:
            rows, generations = raw.get("base_vocab_size"), tuple(raw.get("generations", ()))
            record = cls(
                tuple(int(i) for i in raw["new_layers"]),
                tuple(int(i) for i in raw["source_layers"]),
                str(raw["base_sha256"]),
                generations,
                None if rows is None else int(rows),
                *map(raw.get, ("computation", "new_sha256")),
            )
            earlier = {
                layer
                for generation in generations
                for layer, _ in zip(
                    generation["new_layers"], generation["source_layers"], strict=True
                )
            }
        except KeyError as error:
            raise ConfigError(
                f"{where}: the 'llamapro' record has no {error}: written by another version, or "
                "damaged; expand the base again"
            ) from None
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{where}: the 'llamapro' record is damaged ({error!r})") from None
        layers, sources = record.new_layers, record.source_layers
        if (
            not layers
            or len(layers) != len(sources)
            or list(layers) != sorted(set(layers))
            or not all(0 <= i < num_hidden_layers for i in layers)
            or not all(0 <= i < num_hidden_layers - len(layers) for i in sources)
            or not earlier <= {*range(num_hidden_layers)} - {*layers}
            or not isinstance(record.computation, dict | None)
            or not isinstance(record.new_sha256, str | None)
        ):
            raise ConfigError(
                f"{where}: the 'llamapro' record lists new_layers {list(layers)} with "
                f"source_layers {list(sources)} after {generations!r:.80}, impossible for "
                f"{num_hidden_layers} layers"
            )
        return record

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, the value of `config.json`'s `llamapro` key."""
        raw = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in raw.items() if value is not None}


# The values that transformers assumes for absent fields, where the kinds differ.
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _IDS | {"max_position_embeddings": 2048},
    "mistral": _IDS
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
# The fields that say which biases there are. Qwen2 has those of q, k and v whatever it says.
_BIASES: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen2": ("attention_bias",),
    "qwen3": ("attention_bias",),
}
# A field that is present must have one of these values: the model computes nothing else.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "partial_rotary_factor": (1, None),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "is_causal": (True, None),  # false: transformers lets a token see those after it
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "transformers_weights": (None, "model.safetensors"),  # a file that it reads instead
}
_SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# The fields that decide what the model computes, beside weights, shapes and `rope_scaling`.
_COMPUTED = ["num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"]
_COMPUTED += ["rope_theta", "sliding_window"]
MAX_LAYERS = 4096  # building more would take gigabytes, even without weights


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA's hyper-parameters under Hugging Face's names."""

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
    expansion: ExpansionRecord | None = None  # None for a model that was never expanded
    model_type: str = "llama"  # or "mistral", "qwen2" or "qwen3"
    rope_scaling: RopeScaling | None = None
    # The number of positions that a token sees, itself included (Mistral 7B v0.1); None means all.
    sliding_window: int | None = None
    attention_bias: bool = False  # of q_proj, k_proj and v_proj
    o_proj_bias: bool = False
    mlp_bias: bool = False  # of all three matrices
    qk_norm: bool = False  # queries and keys are normed, head by head, before they are rotated
    # The whole `config.json`: keys unknown to this class survive a rewrite.
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    # Where this, or the base that was expanded, was read from; None if made in memory.
    directory: Path | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`; raises ConfigError that names the file and every wrong field."""
        path = Path(path)
        if not (path.exists() or path.is_symlink()):
            raise ConfigError(
                f"{path}: no such file; a checkpoint directory in Hugging Face layout has one "
                "(a Meta release is converted with 'llamapro from-meta')"
            )
        raw = read_json(path, error=ConfigError)
        return dataclasses.replace(cls.from_dict(raw, str(path)), directory=path.parent)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config") -> "ModelConfig":
        """Reads the fields of a `config.json`, as transformers 4 or 5 writes it.

        Raises ConfigError if fields are missing, impossible or not supported. One message names
        `where` and all of them, each with its value.
        """
        model_type = raw.get("model_type", "llama")
        if model_type not in [*_DEFAULTS]:  # a list has no hash
            supported = ", ".join(map(repr, _DEFAULTS))
            raise ConfigError(
                f"{where}: model_type {model_type!r} is not supported (only {supported})"
            )
        fields = Fields(_DEFAULTS[model_type] | raw)
        wrong = fields.wrong
        wrong += _typos(raw, [f.name for f in dataclasses.fields(cls)])
        sizes = {key: fields.number(key) for key in _SIZES}
        sizes |= _heads(sizes, fields)
        for key, allowed in _ONLY_SUPPORTED.items():
            if key in raw and raw[key] not in allowed:
                wrong.append(f"{key} {raw[key]!r} is not supported (only {allowed[0]!r})")

        if (layers := sizes["num_hidden_layers"]) > MAX_LAYERS:
            wrong.append(f"num_hidden_layers is {layers:,}, over {MAX_LAYERS:,}")
        theta, scaling = read_rope(raw, fields)
        window = read_window(model_type, min(layers, MAX_LAYERS), fields)
        biases = {key: fields.flag(key) for key in ("attention_bias", "mlp_bias")}
        for key, given in biases.items():
            if given and key not in _BIASES[model_type]:
                wrong.append(f"{key} True is not supported for {model_type!r} (only False)")
        bos, eos = fields.raw["bos_token_id"], fields.raw["eos_token_id"]
        ends = eos if isinstance(eos, list) else [eos]
        if any(type(i) not in (int, type(None)) for i in (bos, *ends)):
            wrong.append(f"bos_token_id {bos!r:.80} or eos_token_id {eos!r:.80} is no token id")
        config = cls(
            **sizes,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6, float),
            rope_theta=theta,
            max_position_embeddings=fields.number("max_position_embeddings"),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            initializer_range=fields.number("initializer_range", 0.02, float),
            bos_token_id=bos,
            eos_token_ids=tuple(i for i in ends if i is not None),
            model_type=model_type,
            rope_scaling=scaling,
            sliding_window=window,
            attention_bias=biases["attention_bias"] or model_type == "qwen2",
            o_proj_bias=biases["attention_bias"] and model_type != "qwen2",
            mlp_bias=biases["mlp_bias"],
            qk_norm=model_type == "qwen3",
            raw=raw,
        )
        if wrong:
            raise ConfigError(f"{where}: " + "; ".join(wrong))
        _compare_class(raw, model_type, where)
        if dropout := raw.get("attention_dropout"):
            warn(f"config.json: attention_dropout {dropout!r:.80} is not applied, in training too")
        if raw.get("llamapro") is None:
            return config
        return dataclasses.replace(config, expansion=_read_record(config, where))

    @property
    def computation(self) -> dict[str, Any]:
        """The fields that decide what the model computes, beside weights and shapes; JSON-able."""
        found = {key: getattr(self, key) for key in _COMPUTED}
        scaling = self.rope_scaling
        return found | {"rope_scaling": None if scaling is None else dataclasses.asdict(scaling)}

    def resized(
        self, num_hidden_layers: int, vocab_size: int, record: ExpansionRecord | None
    ) -> "ModelConfig":
        """Returns this configuration with other sizes and another `llamapro` record, or none."""
        sizes: dict[str, Any] = {"num_hidden_layers": num_hidden_layers, "vocab_size": vocab_size}
        raw = {key: value for key, value in self.raw.items() if key != "llamapro"} | sizes
        if raw.get("layer_types") or raw.get("use_sliding_window"):  # the same for every layer
            kind = LAYER_TYPES[self.sliding_window is not None]
            raw["layer_types"] = [kind] * num_hidden_layers
        if record is not None:
            raw["llamapro"] = record.to_dict()
        return dataclasses.replace(self, **sizes, expansion=record, raw=raw)

    def to_json(self) -> str:
        """Returns the text of `config.json`, for transformers 4 and 5 alike."""
        raw, rope = dict(self.raw), self.raw.get("rope_parameters")
        if rope:
            # Version 4 does not see `rope_parameters`; it would compute with its defaults.
            raw.setdefault("rope_theta", self.rope_theta)
            raw.setdefault("rope_scaling", rope if self.rope_scaling else None)
        return json.dumps(raw, indent=2) + "\n"


def _compare_class(raw: dict[str, Any], model_type: str, where: str) -> None:
    """Says so if the class is of another family; refuses that if the family is only assumed."""
    classes = raw.get("architectures") or [model_type.capitalize()]
    classes = classes if isinstance(classes, list) else [classes]
    if not any(str(name).startswith(model_type.capitalize()) for name in classes):
        if "model_type" not in raw:
            raise ConfigError(f"{where}: architectures are {classes!r:.80}, model_type is missing")
        warn(f"config.json: model_type {model_type!r} counts, not architectures {classes!r:.80}")


def _read_record(config: ModelConfig, where: str) -> ExpansionRecord:
    """Reads the `llamapro` record; raises ConfigError unless it fits the rest of the file."""
    record = ExpansionRecord.from_dict(config.raw["llamapro"], config.num_hidden_layers, where)
    rows = record.base_vocab_size
    if rows is not None and not 0 < rows < config.vocab_size:
        raise ConfigError(
            f"{where}: the 'llamapro' record has base_vocab_size {rows}, impossible for "
            f"vocab_size {config.vocab_size}"
        )
    if record.computation is not None and record.computation != config.computation:
        raise ConfigError(
            f"{where}: edited since the base was expanded: "
            f"{'; '.join(differences(record.computation, config.computation))}; put it back, "
            "or edit the base's config.json and expand that again"
        )
    return record


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns in words how two `ModelConfig.computation` differ."""
    return [
        f"{key} was {before.get(key)!r:.200}, is {now.get(key)!r:.200}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]


def _typos(raw: dict[str, Any], known: list[str]) -> Iterator[str]:
    """Yields the near misses of absent keys, which would become silent defaults."""
    known = [*known, "eos_token_id", "attention_dropout", *_ONLY_SUPPORTED]
    for key in raw:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
        is_other = key in known or key.endswith("_token_id")  # <eot> and <eos> are two tokens
        if near and near[0] not in raw and not is_other:
            yield f"unknown key {key!r} (did you mean {near[0]!r}?)"


def _heads(sizes: dict[str, int], fields: Fields) -> dict[str, int]:
    """Reads num_key_value_heads and head_dim, and checks that the heads fit together."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = fields.number("num_key_value_heads", heads)
    head_dim = fields.number("head_dim", max(1, hidden // heads))
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    if not any(problem.startswith(keys) for problem in fields.wrong):  # else nothing follows
        pairs = [(keys[0], hidden, keys[1], heads)] * (fields.raw.get("head_dim") is None)
        pairs += [(keys[1], heads, keys[2], kv_heads)]
        for whole, size, part, number in pairs:
            if size % number:
                fields.wrong.append(f"{whole} {size} is not a multiple of {part} {number}")
        if head_dim % 2:
            fields.wrong.append(f"head_dim {head_dim} is odd; RoPE rotates pairs")
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}
