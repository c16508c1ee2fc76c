"""Training settings: a TOML preset, overridden by typed options of the command line.

All mistakes are found before anything starts, and one message names them.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llamapro.formatting import flatten

Frozen = Literal["shard", "gather", "replicate"]  # where frozen weights lie: `train.frozen`
FrozenDtype = Literal["auto", "float8", "int8"]


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
    """Files, globs and folders of text, code, JSON, CSV or parquet, also .gz, .bz2 and .xz."""

    train: tuple[str, ...] = ()
    """Training sources, for example corpus/math corpus/code."""
    weights: tuple[float, ...] = ()
    """Passes over each source, relative to the others (paper: math 1.0, code 1.5); default: 1."""
    val: tuple[str, ...] = ()
    """Validation sets as NAME=PATH, for example code=held-out.jsonl; a name may repeat."""
    format: Literal["text", "chat"] = "text"
    """text: every token trains. chat: the tokens of the assistant, in rows of conversations."""
    text_key: str = "text"
    """Key of a JSON row, or column of a table, that holds the text."""
    split_at: str = ""
    """Marker that begins a document within a file, such as "<|endoftext|>". Default: none."""
    chat_template: str = ""
    """Chat template: llama2, llama3, mistral, chatml, a .jinja file or a name of the model's."""
    date: str = ""
    """Today's date in chat templates, YYYY-MM-DD. Default: the day on which the run began."""
    too_long: Literal["drop", "truncate", "split"] = "drop"
    """What happens to a conversation that is longer than a sequence."""
    seq_len: int = 0
    """Tokens per sequence, filled with documents. 0: the model's most, up to 4096."""
    cache_dir: str = "~/.cache/llamapro"
    """Directory that keeps tokenised corpora."""
    workers: int = 0
    """Threads that tokenise; 0: one per core."""

    def length(self, positions: int) -> int:
        """Returns the tokens per sequence for a model with this number of positions."""
        return self.seq_len or min(4096, positions)


@dataclass(frozen=True)
class ReplaySettings:
    """General text among the training data, against forgetting; the base writes it once."""

    hold: str = ""
    """Bound on forgetting: KL(base || model) on replayed text. Default: no bound.
    0.02 is in nats per token. 3% is a share of the fall of the training loss.
    Replay is then distilled, and its weight adapts."""
    share: float = 0.0
    """Share of sequences that are replayed, 0 to below 1. With replay.hold, 0 means 0.125."""
    data: tuple[str, ...] = ()
    """General text of yours, in place of the base's: files, globs, folders."""
    prompts: str = ""
    """File of short texts, one per line, for the base to continue or answer. Default: none."""
    tokens: int = 0
    """Tokens that the base writes; training repeats them. 0: half of replay, up to 1,000,000."""
    temperature: float = 1.0
    """Sampling temperature; 1.0 samples from the base's own distribution."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 0
    """Documents that the base writes at a time. 0: as many as memory allows, up to 64."""
    distill: bool = False
    """Learn the base's predictions on replayed text, by KL(base || model), not the text itself."""
    weight: float = 1.0
    """Factor of the loss of replayed sequences; all others have 1."""

    def __post_init__(self) -> None:
        if self.hold:  # the class is frozen
            object.__setattr__(self, "share", self.share or 0.125)
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
    """Steps, batch size, which weights train, and where weights lie."""

    trainable: Literal["new_blocks", "all"] = "new_blocks"
    """Which weights train: the new blocks of the latest expansion, or all."""
    new_tokens: bool = False
    """Also train the embedding and head rows of added tokens (with new_blocks)."""
    steps: int = 0
    """Optimizer steps; 0: as many as train.epochs need."""
    epochs: float = 1.0
    """Passes over the data, if train.steps is 0."""
    batch_size: int = 1024
    """Sequences per optimizer step, summed over all processes."""
    micro_batch_size: int = 1
    """Sequences per forward pass of one process; gradients accumulate over the batch."""
    seed: int = 0
    """Seed of the data order and of random weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation and frozen weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    frozen_dtype: FrozenDtype = "auto"
    """Dtype in which frozen matrices lie in memory; auto: train.dtype.
    int8 halves their memory. float8 is for speed, on GPUs since Ada and Hopper."""
    ops: str = "auto"
    """Backend: cpu, torch, triton, or auto (Triton on a GPU). Also auto,attention=torch."""
    deterministic_attention: bool = False
    """On a GPU, take only attention whose gradients have the same bits every time."""
    recompute: bool = False
    """Activation checkpointing: recompute blocks in the backward pass, to save memory."""
    frozen: Literal["auto", Frozen] = "auto"
    """Where frozen weights lie; auto: replicate with one process or train.frozen_dtype, else shard.
    shard: a part on each process. gather: the same, but whole from forward to backward.
    replicate: whole on each process."""
    shard_size: int = 0
    """Processes that share one sharded copy (HSDP), such as those of a machine; 0: all."""
    offload: bool = False
    """Keep shards and optimizer state in CPU memory (only with GPUs)."""
    compile: bool = False
    """Compile every block with torch.compile."""

    def placement(self, world_size: int) -> Frozen:
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
    """Learning rate at the end of the decay, one step after the last, as a share of optim.lr."""
    warmup_ratio: float = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moving averages."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms and biases have none."""
    clip: float = 1.0
    """Largest gradient norm; a larger gradient is scaled down."""
    skip_bad_steps: int = 0
    """Steps in a row that may be skipped for a non-finite gradient; one more ends the run."""


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
    """Save while training goes on, from a copy in memory; auto: with GPUs."""

    def in_background(self, device_type: str) -> bool:
        """Returns whether a run on this type of device saves in the background."""
        return self.background == "yes" or (self.background == "auto" and device_type == "cuda")


@dataclass(frozen=True)
class ResumeSettings:
    """Changes that a resumed run may make."""

    allow: tuple[str, ...] = ()
    """Settings that may differ from the run's although they decide the result, such as optim.lr."""


@dataclass(frozen=True)
class Settings:
    """Settings of one run."""

    config: str = ""
    """Preset: a name that 'llamapro presets' lists, or a TOML file; other options override it."""
    run_dir: str = ""
    """Directory of the run's metrics and checkpoints. Default: runs/PRESET."""
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
    """Seconds between progress lines; steps 1, 2, 5, 10 and the last have one in any case."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers beside metrics.jsonl. WANDB_PROJECT or TRACKIO_PROJECT names the project."""
    log_spikes: float = 6.0
    """Standard deviations over the median from which a loss is logged as a spike; 0: never."""
    processes: int = 0
    """Processes to start on this machine, one per GPU; 0: none but this one, or torchrun's."""
    dry_run: bool = False
    """Read and check all input, print the plan and the fastest settings that fit, and stop."""
    device: str = ""
    """GPU that --dry-run plans for, such as h100, or its memory, 48GB. Default: this one."""
    json: bool = False
    """Print the result as one JSON object."""

    def flat(self) -> dict[str, Any]:
        """Returns every setting by its dotted name, such as train.steps."""
        return flatten(asdict(self))

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
