"""The switch between plain PyTorch and the Triton kernels, op by op and for the whole model."""

import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.nn.attention import _cur_sdpa_kernel_backends

from llamapro import backends, expansion, ops
from llamapro.config import ModelConfig
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.training.objective import NextToken

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import device as kernel_device


def gpu(major: int, minor: int) -> SimpleNamespace:
    return SimpleNamespace(major=major, minor=minor)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def has_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device can run kernels of the three dtypes."""
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu(9, 0))


def test_a_choice_names_one_backend_and_exceptions() -> None:
    """`triton,attention=torch`; the later word wins; blanks do not matter; the default is auto."""
    assert backends.parse("auto") == dict.fromkeys(backends.OPS, "auto")
    expected = dict.fromkeys(backends.OPS, "triton") | {"attention": "torch"}
    assert backends.parse("triton, attention=torch") == expected
    assert backends.parse("rope=torch") == dict.fromkeys(backends.OPS, "auto") | {"rope": "torch"}
    for wrong in (
        "",
        "cuda",
        "rope",
        "rope=",
        "atention=torch",
        "triton;rope=torch",
        "linear=triton",
    ):
        with pytest.raises(ValueError, match="known: "):
            backends.parse(wrong)


def test_a_choice_ends_with_its_block() -> None:
    """The choice before comes back, also when an error ends the block."""
    with backends.use("torch,rope=auto"):
        with pytest.raises(KeyError), backends.use("triton"):
            raise KeyError
        assert backends.choose("rope", CPU, torch.float32, 8) == ("cpu", "device is cpu")
        assert backends.choose("swiglu", CPU, torch.float32, 8) == ("torch", "asked for")


@pytest.mark.parametrize(
    "op, dtype, size, reason",
    [
        ("attention", torch.bfloat16, 264, "264"),
        ("attention", torch.float64, 64, "float64"),
        ("rms_norm", torch.float64, 64, "float64"),
        ("rope", torch.int32, 64, "int32"),
        ("swiglu", torch.float64, 64, "float64"),
        ("linear_cross_entropy", torch.float64, 64, "float64"),
    ],
)
def test_what_a_kernel_cannot_do_falls_back_under_auto_only(
    op: str, dtype: torch.dtype, size: int, reason: str, has_gpu: None
) -> None:
    """`auto` gives the reason; `triton` raises an error with the op and the reason."""
    with backends.use("auto"):
        assert backends.choose(op, CUDA, torch.bfloat16, 64) == ("triton", "device is cuda")
        backend, why = backends.choose(op, CUDA, dtype, size)
        assert backend == "cpu" and reason in why
    with (
        backends.use(f"torch,{op}=triton"),
        pytest.raises(backends.BackendError, match=rf"{op}: .*{reason}"),
    ):
        backends.choose(op, CUDA, dtype, size)


def test_old_gpus_and_the_cpu_are_not_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes PyTorch there, `triton` says what is missing."""
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu(7, 5))
    for where, reason in ((CPU, "device is cpu"), (CUDA, "compute capability 7.5")):
        for op in backends.TRITON_OPS:
            with backends.use("auto"):
                backend, why = backends.choose(op, where, torch.float16, 64)
                assert backend == "cpu" and reason in why
            with backends.use("triton"), pytest.raises(backends.BackendError, match=reason):
                backends.choose(op, where, torch.float16, 64)


@pytest.mark.parametrize("major, minor", [(9, 0), (9, 4), (11, 0), (6, 0)])  # MI200: 9.0, as Hopper
def test_amd_gpus_take_kernels_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, major: int, minor: int
) -> None:
    """ROCm calls its devices cuda. `auto` takes PyTorch; `triton` runs, with no tile of Hopper."""
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu(major, minor))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernel_device.architecture(CUDA) == 80
    for op in backends.TRITON_OPS:
        with backends.use("auto"):
            found = backends.choose(op, CUDA, torch.bfloat16, 64)
            assert found == ("cpu", "not measured on AMD GPUs")
        with backends.use("triton"):
            assert backends.choose(op, CUDA, torch.bfloat16, 64) == ("triton", "asked for")


def test_tiles_of_hopper_are_for_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GH200 is one; Ada, Blackwell, a device that is no GPU of NVIDIA and a CPU are not."""
    for major, minor in ((9, 0), (8, 0), (8, 9), (10, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, m=major, n=minor: gpu(m, n)
        )
        expected = 90 if major == 9 else 80
        assert kernel_device.architecture(CUDA) == expected
        assert kernel_device.architecture(torch.device("xpu")) == 80
        assert kernel_device.architecture(CPU) == 80


def test_a_gpu_of_another_machine_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU get the choice of the GPU; after the block their own."""
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    for op in backends.TRITON_OPS:
        with backends.planning_for(CUDA):
            assert backends.choose(op, CPU, torch.bfloat16, 64) == ("triton", "device is cuda")
        assert backends.choose(op, CPU, torch.bfloat16, 64) == ("cpu", "device is cpu")


def test_without_triton_everything_is_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton exists for Linux only. `auto` does without it, `triton` says what is missing."""
    for name in [name for name in sys.modules if name.startswith("llamapro.kernels.")]:
        if name != "llamapro.kernels.cpu":
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(f"llamapro.kernels.{name.rpartition('.')[2]}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with backends.use("auto"):
        assert backends.choose("rope", CUDA, torch.bfloat16, 64)[0] == "cpu"
    said = "the package triton is not installed"
    with backends.use("triton"), pytest.raises(backends.BackendError, match=said):
        ops.rms_norm(torch.ones(2, 16), torch.ones(16), 1e-5)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_pytorchs_attention_on_a_gpu_tries_cudnn_first(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then FlashAttention, the memory-efficient one and the formula; afterwards as it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with backends.use():
        found = _cur_sdpa_kernel_backends(with_priority=True)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    names = [backend.name.split("_")[0] for backend in found]
    assert (names == ["CUDNN", "FLASH", "EFFICIENT", "MATH"]) == has_gpu
    assert (found == before) != has_gpu


def test_deterministic_attention_on_a_gpu_is_the_kernel_or_the_formula(has_gpu: None) -> None:
    """`auto` leaves PyTorch's fused attention out, `cpu` is refused there; a CPU has both."""

    def chosen(choice: str, size: int, device: torch.device = CUDA) -> str:
        with backends.use(choice, deterministic_attention=True):
            return backends.choose("attention", device, torch.bfloat16, size)[0]

    assert [chosen("auto", 64), chosen("auto", 264)] == ["triton", "torch"]
    assert [chosen("triton", 64), chosen("torch", 64)] == ["triton", "torch"]
    with pytest.raises(backends.BackendError, match=r"attention: .*deterministic_attention"):
        chosen("auto,attention=cpu", 64)
    assert [chosen("auto", 64, CPU), chosen("cpu", 64, CPU)] == ["cpu", "cpu"]


def test_the_summary_groups_ops_by_backend_and_reason(
    tiny_config: Callable[..., ModelConfig], has_gpu: None
) -> None:
    """One line for a start-up block; a single group is called `all`."""
    config = tiny_config(head_dim=264)
    with backends.use("auto,swiglu=torch"):
        line = backends.summary(config, CUDA, torch.bfloat16)
    assert line.startswith("rms_norm, rope, linear_cross_entropy: triton (device is cuda); ")
    assert "attention: cpu (" in line and "264" in line
    assert line.endswith("; swiglu: torch (asked for)")
    assert backends.summary(config, CPU, torch.bfloat16) == "all: cpu (device is cpu)"


def expanded_model(
    config: ModelConfig, tensors: dict[str, Tensor], device: str
) -> LlamaForCausalLM:
    """2 blocks, of which the last is new, trains, and is no longer the identity."""
    layout = expansion.interleave(1, 1)
    tensors = expansion.expand_state_dict(tensors, layout)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if not tensor.count_nonzero():
            tensors[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    model = build_on_meta(expansion.expand_config(config, layout, "0" * 64))
    load_tensors(model, {name: tensor.to(device) for name, tensor in tensors.items()})
    expansion.select_trainable(model, "new_blocks")
    return model


@pytest.fixture(scope="module")
def model(
    tiny_config: Callable[..., ModelConfig], random_tensors: Any, device: str
) -> LlamaForCausalLM:
    # Small, because the interpreter needs about 50 ms for each launch.
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "head_dim": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    kind = {"model_type": "qwen3", "attention_bias": True}  # has all that a block can have
    config = tiny_config(num_hidden_layers=1, **sizes, **heads, **kind)
    return expanded_model(config, random_tensors(config), device)


@pytest.fixture(scope="module")
def ids(model: LlamaForCausalLM, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (2, 10), generator=generator).to(device)


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    loss_sum, count = NextToken(model)(ids[:, :-1], ids[:, 1:])
    return loss_sum / count


def trained(
    model: LlamaForCausalLM, ids: Tensor, loss_of: Callable[..., Tensor] = loss_of
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of all that trains."""
    model.zero_grad()
    loss = loss_of(model, ids)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def eager(model: LlamaForCausalLM, ids: Tensor) -> Callable[[str], Any]:
    """`eager(backend) -> (loss, gradients)`, computed once for each backend."""

    @functools.cache
    def compute(choice: str) -> tuple[Tensor, dict[str, Tensor]]:
        with backends.use(choice):
            return trained(model, ids)

    return compute


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the ops that were answered by a kernel."""
    counted: Counter[str] = Counter()
    kernel = backends._triton_module

    def counting(op: str) -> Any:
        counted[op] += 1
        return kernel(op)

    monkeypatch.setattr(backends, "_triton_module", counting)
    return counted


def test_the_whole_model_computes_and_trains_on_kernels(eager: Callable[[str], Any]) -> None:
    """Loss and gradients of `triton` are those of PyTorch, to rounding."""
    (torch_loss, torch_gradients), (loss, gradients) = eager("torch"), eager("triton")
    # fp32 sums in another order, through 2 blocks.
    torch.testing.assert_close(loss, torch_loss, rtol=2e-6, atol=0)
    assert set(gradients) == set(torch_gradients) and len(gradients) == 9 + 4 + 2
    for name, gradient in gradients.items():
        expected = torch_gradients[name]
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), name


def test_recomputing_on_kernels_changes_no_bit_of_a_gradient(
    model: LlamaForCausalLM, ids: Tensor, eager: Callable[[str], Any]
) -> None:
    """Activation checkpointing runs each kernel's forward twice, and gets the same."""
    recomputing = copy.deepcopy(model)
    for layer in recomputing.model.layers:
        checkpoint(layer)
    with backends.use("triton"):
        _, found = trained(recomputing, ids)
    _, expected = eager("triton")
    assert found and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_each_op_is_switched_on_its_own(
    model: LlamaForCausalLM, ids: Tensor, calls: Counter[str]
) -> None:
    """Naming one op runs that kernel and no other; `torch` runs none, `triton` runs all."""
    named = {f"torch,{op}=triton": {op} for op in backends.TRITON_OPS}
    for choice, expected in (named | {"torch": set(), "triton": {*backends.TRITON_OPS}}).items():
        calls.clear()
        with backends.use(choice), torch.no_grad():
            loss_of(model, ids)
        assert set(calls) == expected


def test_decoding_leaves_attention_to_torch_unless_asked(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query against a cache: `auto` does not start a tile for it, `triton` does."""
    monkeypatch.setattr(backends, "choose", lambda *_: ("triton", "to see what is left to torch"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 2, 16, generator=generator)
    with backends.use("auto"):
        one = ops.attention(q, k, v)
        assert not calls
    with backends.use("triton"):
        torch.testing.assert_close(ops.attention(q, k, v), one)
        assert calls == {"attention": 1}


@pytest.mark.parametrize("choice", ["torch", "cpu", "triton"])
def test_the_model_compiles_without_a_graph_break(
    model: LlamaForCausalLM, ids: Tensor, eager: Callable[[str], Any], choice: str
) -> None:
    """One graph for forward and one for backward, with the eager loss and gradients."""
    expected_loss, expected = eager(choice)
    torch._dynamo.reset()
    with backends.use(choice):
        compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
        loss, found = trained(model, ids, compiled)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
