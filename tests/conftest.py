"""What the tests share: paths, a tiny model and its checkpoint, a tokenizer made on the spot.

pytest's importlib mode keeps tests/ off `sys.path`, so the functions below are handed out as
fixtures instead of being imported.
"""

import argparse
import inspect
import io
import json
import os
import runpy
import shutil
import signal
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

if not torch.cuda.is_available():
    # Before anything imports Triton: all kernels of this process run in its interpreter. Compiling
    # them for a GPU is therefore tested in processes of their own (tests/kernels/test_compile.py).
    os.environ["TRITON_INTERPRET"] = "1"

# A shell ignores Ctrl-C in what it starts in the background, and children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.writing import MAX_SHARD_BYTES, in_memory, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import warn
from llamapro.expansion import interleave
from llamapro.training.weights import init_random

ROOT = Path(__file__).resolve().parents[1]
# Without the variable this path does not exist, and the tests that need it say in its words why
# they skip.
SHARED = Path(os.environ.get("LLAMAPRO_SHARED") or "$LLAMAPRO_SHARED")
VOCAB_SIZE = 400


@pytest.fixture(autouse=True)
def _as_a_new_process() -> None:
    """Forgets the warnings that a test before this one was given, for they are said once."""
    warn.cache_clear()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and tokenizers that LLAMAPRO_SHARED names; it may not exist."""
    return SHARED


def _tiny_config(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,  # at this width, logits of a real model's size
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | overrides
    )


def _random_tensors(
    config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    tensors = init_random(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for tensor in tensors.values():
        if tensor.ndim == 1:  # norms of all ones would hide a norm that is not applied
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """`tiny_config(**overrides) -> ModelConfig`: 4 layers, C 64; overrides are config.json keys."""
    return _tiny_config


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., dict[str, Tensor]]:
    """`random_tensors(config, dtype=torch.float32, seed=0)`: every parameter, norms not 1."""
    return _random_tensors


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., dict[str, Any]]:
    """`byte_level(*names)`: a tokenizer.json of the 256 bytes and these control tokens."""

    def byte_level(*names: str) -> dict[str, Any]:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(list(names))
        return json.loads(made.to_str())

    return byte_level


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer.model of 400 tokens: BPE with byte fallback, as LLaMA's."""
    model = io.BytesIO()
    text = "\n".join(inspect.getsource(module) for module in (argparse, textwrap))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[[Iterable[str], int], bytes]:
    """`train_tokenizer(texts, vocab_size)`: a tokenizer.model's bytes, as the demo trains it."""
    return runpy.run_path(str(ROOT / "demo" / "train_tokenizer.py"))["train"]


@pytest.fixture(scope="session")
def write_random_checkpoint(tokenizer_file: Path) -> Callable[..., Path]:
    """`write_random_checkpoint(path, config, dtype, seed, max_shard_bytes=...) -> path`."""

    def write(
        path: Path,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> Path:
        tensors = _random_tensors(config, dtype, seed)
        path.mkdir(parents=True)
        write_checkpoint(path, in_memory(tensors), max_shard_bytes=max_shard_bytes)
        write_companions(path, config, [])
        shutil.copyfile(tokenizer_file, path / "tokenizer.model")
        return path

    return write


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """`run_command(main, *arguments) -> (exit status, stdout, stderr)`, in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(main: Callable[[list[str]], None], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda: main(list(map(str, arguments))))
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


# ---- Kernels: where they run, and the error rule -------------------------------------------------


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel is tested: in the interpreter on the CPU, or (`pytest -m gpu`) compiled."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip(f"kernels do not run on {request.param} here")
    return request.param


def _assert_as_exact_as_torch(kernel: Tensor, reference: Tensor, exact: Tensor) -> None:
    assert kernel.dtype == reference.dtype and kernel.shape == reference.shape
    assert exact.dtype == torch.float64 and exact.shape == reference.shape
    if not exact.numel():
        return
    error = (kernel.double() - exact).abs().max().item()
    allowed = (reference.double() - exact).abs().max().item()
    rounding = torch.finfo(kernel.dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowed + rounding, f"error {error:.3g}, PyTorch's {allowed:.3g}"


@pytest.fixture(scope="session")
def assert_as_exact_as_torch() -> Callable[[Tensor, Tensor, Tensor], None]:
    """`f(kernel, reference, exact)`: the kernel's error against fp64 is at most twice PyTorch's.

    `reference` is plain PyTorch in the kernel's dtype, `exact` the same in fp64 from the same
    (rounded) inputs. One rounding of the largest value is allowed on top, as PyTorch's own error
    can be 0.
    """
    return _assert_as_exact_as_torch


@pytest.fixture
def expand(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Callable[..., tuple[Path, Path]]:
    """`expand(dtype=..., **config) -> (base, grown)`: 2 layers, then 3 and two added tokens."""

    def make(
        dtype: torch.dtype = torch.float32,
        tokens: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
        **overrides: Any,
    ) -> tuple[Path, Path]:
        config = tiny_config(num_hidden_layers=2, **overrides)
        base = write_random_checkpoint(tmp_path / "base", config, dtype)
        grown, layout = tmp_path / "grown", interleave(2, 1)
        expand_checkpoint(Checkpoint.open(base), grown, layout, new_tokens=tokens)
        return base, grown

    return make


@pytest.fixture(scope="session")
def write_header() -> Callable[[Path, bytes | dict[str, Any], int], Path]:
    """`write_header(file, header, data)`: a safetensors file with `data` zero bytes."""

    def write(file: Path, header: bytes | dict[str, Any], data: int) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
        return file

    return write


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path, int], None]:
    """`flip_bit(file, at)` changes the lowest bit of the byte at this place."""

    def flip(file: Path, at: int) -> None:
        with open(file, "r+b") as content:
            content.seek(at)
            byte = content.read(1)[0]
            content.seek(at)
            content.write(bytes([byte ^ 1]))

    return flip
