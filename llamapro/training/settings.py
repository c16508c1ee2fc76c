"""Training settings: a TOML preset, overridden by typed options of the command line.

All mistakes are found before anything starts, and one message names them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSettings:
    """The model to train."""

    path: str = ""
    """Checkpoint directory to start from, usually made by 'llamapro expand', or hf://owner/name."""
    config: str = ""
    """A config.json, or demo-base, to train from random weights, instead of path."""
    tokenizer: str = ""
    """tokenizer.model, tokenizer.json or their directory; empty takes the one in model.path."""


@dataclass(frozen=True)
class DataSettings:
    """The data to read: files, globs and folders of text, source code, .jsonl, .json, .csv and
    .parquet; text and rows may be compressed (.gz, .bz2, .xz)."""

    train: tuple[str, ...] = ()
    """Training sources, for example corpus/math corpus/code."""
    weights: tuple[float, ...] = ()
    """Passes over each source relative to the others (paper: 1.0 math, 1.5 code); empty means 1."""
    val: tuple[str, ...] = ()
    """Validation sets as NAME=PATH, for example code=held-out.jsonl; a name may repeat."""
    format: Literal["text", "chat"] = "text"
    """text trains every token. chat reads conversations and trains the assistant's tokens: .jsonl,
    .json or .parquet with messages, ShareGPT's conversations, or instruction, input and output."""
    text_key: str = "text"
    """Field of a row of JSON, or column of a table, that holds the text."""
    split_at: str = ""
    """Text between the documents of a file, such as "<|endoftext|>": a new one begins there. Empty
    takes each file, or row, as one document."""
    chat_template: str = ""
    """Template of conversations: llama2, llama3, mistral, chatml or a .jinja file; empty takes the
    model's own."""
    date: str = ""
    """Day that chat templates print as today's, YYYY-MM-DD; empty takes the day the run began."""
    too_long: Literal["drop", "truncate", "split"] = "drop"
    """Treatment of a conversation that is longer than a sequence."""
    seq_len: int = 0
    """Tokens per sequence. Documents, or whole conversations, are packed to fill it. 0 takes 4096,
    or what the model allows if that is less."""
    cache_dir: str = "~/.cache/llamapro"
    """Directory that keeps tokenised corpora."""
    workers: int = 0
    """Threads that tokenise; 0 means one per core."""

    def length(self, positions: int) -> int:
        """Returns the tokens per sequence for a model of so many positions."""
        return self.seq_len or min(4096, positions)


@dataclass(frozen=True)
class ReplaySettings:
    """General text among the training data, against forgetting. The base inside the expanded model
    writes it once, or files hold it. Needs train.trainable new_blocks."""

    hold: str = ""
    """Most that the model may forget: KL(base || model) in nats per token of replayed text, such as
    "0.02"; or, such as "3%", a share of what it learns, the fall of the training loss. Replay is
    distilled, and its weight adapts. Empty leaves the weight to replay.weight."""
    share: float = 0.0
    """Share of all sequences that is replayed, 0 to below 1; 0 means 0.25 with replay.hold, and
    no replay without it."""
    data: tuple[str, ...] = ()
    """Your own general text instead of the base's: files, globs, folders."""
    prompts: str = ""
    """File with one short text per line for the base to continue, or, if it has a chat template, to
    answer; empty starts new documents and chats."""
    tokens: int = 0
    """Tokens that the base writes. Training repeats them if it needs more; 0 writes half of what
    is replayed, at most 1,000,000."""
    temperature: float = 1.0
    """Sampling temperature; 1.0 samples from the base's own distribution."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 0
    """Number of documents of up to data.seq_len tokens that are written at the same time; 0 takes
    up to 64, as memory and replay.tokens allow."""
    distill: bool = False
    """Learn the base's predictions on replayed sequences instead of their text. The loss is KL(base
    || model) per token, and the base is the model without its new blocks. With the files of
    data.train as replay.data this is self-distillation on the domain."""
    weight: float = 1.0
    """Factor of the loss of replayed sequences; all other sequences have 1."""

    def __post_init__(self) -> None:
        if self.hold:  # the class is frozen
            object.__setattr__(self, "share", self.share or 0.25)
            object.__setattr__(self, "distill", True)

    @property
    def held(self) -> tuple[float, bool]:
        """`hold` as a number, and whether it is a share; raises ValueError if it is neither."""
        is_share = self.hold.endswith("%")
        value = float(self.hold.removesuffix("%")) / (100 if is_share else 1)
        if not 0 < value < math.inf:
            raise ValueError(self.hold)
        return value, is_share

    @property
    def is_apart(self) -> bool:
        """Whether replayed sequences have a loss or weight of their own."""
        return self.share > 0 and (self.distill or self.weight != 1)


@dataclass(frozen=True)
class TrainSettings:
    """Length, batch size, trained weights, and the place of everything in memory."""

    trainable: Literal["new_blocks", "all"] = "new_blocks"
    """Weights to train: the new blocks of the latest expansion, or all."""
    new_tokens: bool = False
    """Also train the embedding and head rows of added tokens (with new_blocks)."""
    steps: int = 0
    """Optimizer steps; 0 takes as many as train.epochs need."""
    epochs: float = 1.0
    """Passes over the data if train.steps is 0."""
    batch_size: int = 1024
    """Sequences per optimizer step, summed over all processes."""
    micro_batch_size: int = 1
    """Sequences per forward pass of one process; gradients of the rest are accumulated."""
    seed: int = 0
    """Seed of the data order and of random weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation and frozen weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    frozen_dtype: Literal["auto", "float8", "int8"] = "auto"
    """Dtype of the frozen blocks' matrices; auto is that of train.dtype. float8: for speed, on GPUs
    from Hopper and Ada on; a CPU emulates it. int8: half the memory, on any device. Both keep
    frozen weights whole on every process, and round the base for training only."""
    ops: str = "auto"
    """Backend: auto (Triton on a GPU wherever its kernel can run), cpu, torch or triton. Single ops
    follow, for example auto,attention=torch."""
    deterministic_attention: bool = False
    """Give attention's gradients the same bits every time on a GPU, as on a CPU: auto takes the
    Triton kernel or, where it cannot run, the formula, which needs more memory; attention=cpu is
    refused."""
    recompute: bool = False
    """Activation checkpointing: compute blocks again in backward to save memory."""
    frozen: Literal["auto", "shard", "gather", "replicate"] = "auto"
    """Place of frozen weights. shard: in parts on all processes. gather: in parts, but whole from
    forward to backward. replicate: whole on every process, without communication. auto: replicate
    where each process holds all of them anyway or train.frozen_dtype is set, else shard."""
    shard_size: int = 0
    """Processes that share one copy of sharded weights (HSDP), such as those of a machine; 0 means
    all."""
    offload: bool = False
    """Keep shards and optimizer state in CPU memory (only with GPUs)."""
    compile: bool = False
    """Compile every block with torch.compile."""

    def placement(self, world_size: int) -> Literal["shard", "gather", "replicate"]:
        """Returns where frozen weights lie: `frozen`, or what auto stands for."""
        if self.frozen != "auto":
            return self.frozen
        if self.frozen_dtype != "auto":
            return "replicate"
        # In one part, FSDP would copy every weight before each use.
        is_whole = (self.shard_size or world_size) == 1 and not self.offload
        return "replicate" if is_whole else "shard"


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with warm-up, cosine decay and clipping."""

    lr: float = 2e-4
    """Peak learning rate. The paper's 2e-4 suits LLaMA-2; other bases may need a tenth."""
    final_lr_ratio: float = 0.0
    """Where the decay of the learning rate ends, one step after the last, as a fraction of
    optim.lr."""
    warmup_ratio: float = 0.06
    """Fraction of the steps in which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moving averages."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms and biases have none."""
    clip: float = 1.0
    """Largest gradient norm; a larger gradient is scaled down."""
    skip_bad_steps: int = 0
    """Steps in a row that may be skipped because their gradient is not finite; one more ends the
    run."""


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation during training."""

    every: int = 500
    """Steps between evaluations. One always comes before the first step and after the last."""
    sequences: int = 0
    """Evenly spaced sequences to take from each validation set; 0 means all."""


@dataclass(frozen=True)
class SaveSettings:
    """Training checkpoints: trained tensors and optimizer state."""

    every: int = 500
    """Steps between training checkpoints. One always comes after the last step."""
    keep: int = 2
    """Number of the latest training checkpoints to keep."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this; 0 keeps none."""
    background: Literal["auto", "yes", "no"] = "auto"
    """Write while training goes on, from a copy in the main process's memory (12 bytes for each
    parameter that trains); auto does so with GPUs."""

    def in_background(self, device_type: str) -> bool:
        """Returns whether a run on this type of device saves in the background."""
        return self.background == "yes" or (self.background == "auto" and device_type == "cuda")


@dataclass(frozen=True)
class ResumeSettings:
    """Changes that a resumed run may make."""

    allow: tuple[str, ...] = ()
    """Settings that may differ although they decide the result, for example optim.lr."""


@dataclass(frozen=True)
class Settings:
    """Settings of one run."""

    config: str = ""
    """Preset: a TOML file, or a name that 'llamapro presets' lists; options beside it win."""
    run_dir: str = ""
    """Directory of metrics and training checkpoints; empty means runs/NAME_OF_THE_PRESET. The same
    command run again resumes from it."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    log_seconds: float = 10.0
    """Seconds between progress lines; the steps 1, 2, 5, 10 and the last one always have a line."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers to log to besides metrics.jsonl. WANDB_PROJECT and TRACKIO_PROJECT name a project;
    llamapro without them."""
    log_spikes: float = 6.0
    """Log a step with its documents if its loss exceeds the median of the latest by this many
    standard deviations (estimated from quartiles); 0 logs none."""
    processes: int = 0
    """Processes to start on this machine, usually one per GPU; 0 means this process alone, or those
    that torchrun started."""
    dry_run: bool = False
    """Check all input, print the plan, with a GPU the fastest settings that fit it, and stop."""
    device: str = ""
    """GPU that --dry-run plans for, where this machine has another one or none: a100, h100, h200,
    rtx-4090 and others, or its memory, such as 48GB."""
    json: bool = False
    """Print the result as one JSON object."""

    def steps(self, samples_per_epoch: int, done: int = 0, samples: int = 0) -> int:
        """Returns the number of optimizer steps of the whole run.

        Args:
            samples_per_epoch: sequences of one pass over the data.
            done, samples: steps made and sequences read; with another batch size than now, what is
                left of the epochs counts, and not the steps.
        """
        if self.train.steps:
            return self.train.steps
        wanted, size = self.train.epochs * samples_per_epoch, self.train.batch_size
        if samples == done * size:
            return max(1, round(wanted / size))
        return done + max(0, math.floor((wanted - samples) / size + 0.5))


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested settings under their dotted names: {"train.steps": 100, ...}."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat
