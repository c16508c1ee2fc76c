"""Frozen blocks in 8 bits: what is rounded, how far, what it costs, and what stays as it was."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import training_checkpoints
from llamapro.config import ModelConfig
from llamapro.conversion.merge import merge_checkpoint
from llamapro.errors import ConfigError
from llamapro.model import Linear, LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.scripts import train
from llamapro.training import proposal, quantized
from llamapro.training.checks import check
from llamapro.training.distributed import Ranks, process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw
from llamapro.training.plan import estimate_memory
from llamapro.training.quantized import FrozenDtype, QuantizedLinear, to_float8, to_int8
from llamapro.training.settings import DataSettings, Settings, TrainSettings
from llamapro.training.weights import init_random

LAYERS, NEW = 5, (1, 3)  # frozen below the lowest new block: 0; frozen above: 2, 4
KINDS: tuple[FrozenDtype, ...] = ("int8", "float8")
# Qwen3 with biases, which has all that a block can have; wide initial weights, so that at this
# width every block matters.
CONFIG = ModelConfig.from_file(Path(__file__).with_name("every_part.json"))
CPU = torch.device("cpu")


def freeze(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.requires_grad_(False)
    for index in NEW:
        model.model.layers[index].requires_grad_(True)
    return model


def build() -> LlamaForCausalLM:
    """The model before it is spread: fp32, only the new blocks train, and they begin as nothing."""
    model = build_on_meta(CONFIG)
    load_tensors(model, init_random(CONFIG, seed=0))
    for index in NEW:
        block: Any = model.model.layers[index]
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
    return freeze(model)


def batch(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets (8, 12): each token is 7 times the one before, plus 1."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    ids = torch.randint(CONFIG.vocab_size, (8, 1), generator=generator)
    for _ in range(12):
        ids = torch.cat((ids, (7 * ids[:, -1:] + 1) % CONFIG.vocab_size), dim=1)
    return ids[:, :-1], ids[:, 1:]


def take_steps(
    ranks: Ranks,
    kind: FrozenDtype,
    steps: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    model: LlamaForCausalLM | None = None,
    **how: bool,
) -> tuple[list[float], dict[str, Tensor], LlamaForCausalLM]:
    """Trains; returns this rank's losses, the last gradients, whole, by name, and the model."""
    model = model or build()
    objective = NextToken(model)
    shard(objective, ranks, dtype, "replicate", frozen_dtype=kind, **how)
    parameters = dict(model.named_parameters())
    optimizer = build_adamw(parameters.values(), (0.9, 0.95), 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        ids, targets = (rows[ranks.rank :: ranks.world_size] for rows in batch(step, seed))
        loss, count = objective(ids, targets)
        (loss / count).backward()
        optimizer.step()
        losses.append((loss / count).item())
    gradients = {
        name: p.grad.full_tensor().clone()  # type: ignore[attr-defined]
        for name, p in parameters.items()
        if p.grad is not None
    }
    return losses, gradients, model


def worker(out: str) -> None:
    """Writes the losses of two steps of one rank, for both kinds."""
    with process_group("cpu") as ranks:
        losses = {kind: take_steps(ranks, kind, steps=2)[0] for kind in KINDS}
        (Path(out) / f"{ranks.rank}.json").write_text(json.dumps(losses))


# ---- One matrix ---------------------------------------------------------------------------------


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers whose rows differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.logspace(-6, 3, shape[0])[:, None]).to(dtype)


def test_float8_is_off_by_half_a_unit_of_three_bits() -> None:
    """2^-4 of each number, or half the smallest step, 2^-10, of its row's scale."""
    for x in (rows(40, 96), rows(40, 96, dtype=torch.bfloat16)):
        rounded, scale = to_float8(x)
        error = (rounded.double() * scale.double() - x.double()).abs()
        bound = torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10)
        assert (error <= bound * (1 + 2**-20)).all()  # x / scale is rounded to fp32 before
        assert (rounded.float().abs().amax(-1) == 448).all()  # the whole range is used


def test_a_row_of_zeros_is_zero_and_one_that_is_not_finite_is_nan() -> None:
    """The first has no scale to divide by; the second must reach the check of the gradient."""
    x = torch.tensor([[0.0, 0.0], [1.0, torch.inf], [1.0, torch.nan], [1.0, -2.0]])
    rounded, scale = to_float8(x)
    found = (rounded.float() * scale).tolist()
    assert found[0] == [0.0, 0.0] and found[3] == [1.0, -2.0]
    assert math.isnan(found[1][1]) and math.isnan(found[2][1])
    whole, scale = to_int8(x[[0, 3]], torch.float32)
    assert (whole * scale)[0].tolist() == [0.0, 0.0] and whole[1].tolist() == [64, -127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_off_by_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    """A step is a 127th of the row's largest number, also where the scale itself is rounded."""
    weight = rows(40, 96)
    rounded, scale = to_int8(weight, dtype)
    assert scale.dtype == dtype
    step = scale.double()
    error = (rounded.double() * step - weight.double()).abs()
    assert (error <= step / 2 * (1 + 2**-20)).all()
    largest = weight.double().abs().amax(-1, keepdim=True)
    assert (step <= largest / 127 * (1 + 2**-8)).all()


def linear_of(kind: str, dtype: torch.dtype) -> tuple[Linear, QuantizedLinear]:
    linear = Linear(96, 48).requires_grad_(False)
    linear.weight.data = rows(48, 96, seed=1)
    linear.bias.data = torch.linspace(-1, 1, 48).to(dtype)
    return linear, QuantizedLinear(linear, kind, dtype, has_backward=True)


def exact_product(x: Tensor, kind: str, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T of the rounded matrices in fp64, and the sum of its terms' sizes, (M, N) both."""
    wide = weight.double() * scale.double()
    if kind == "float8":
        rounded, row_scale = to_float8(x)
        x = rounded.double() * row_scale.double()
    else:
        wide = (weight * scale).double()  # rounded to the dtype that multiplies
    x = x.double()
    return x @ wide.t(), x.abs() @ wide.abs().t()


def assert_rounded_like(found: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    """Within sums of `count` terms in fp32, three products, and one rounding to the dtype."""
    bound = (count + 3) * 2.0**-24 * terms + torch.finfo(found.dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_rounded_matrices(kind: str, dtype: torch.dtype) -> None:
    """Forward x W^T + b and backward g W, written out in fp64; W has no gradient."""
    linear, found = linear_of(kind, dtype)
    x = rows(40, 96, dtype=dtype).requires_grad_()
    y = found(x.view(4, 10, 96))
    assert y.shape == (4, 10, 48) and y.dtype == dtype
    exact, terms = exact_product(x.detach(), kind, found.weight, found.scale)
    with torch.no_grad():
        found.bias, bias = None, found.bias
        assert_rounded_like(found(x), exact, terms, 96)
        assert torch.equal(found(x) + bias, y.view(40, 48))
    gradient = rows(40, 48, dtype=dtype, seed=2)
    y.backward(gradient.view(4, 10, 48))
    if kind == "float8":
        copies = (found.transposed, found.transposed_scale)
        assert torch.equal(copies[0].float(), to_float8(linear.weight.t())[0].float())
        exact, terms = exact_product(gradient, kind, *copies)
    else:
        wide = (found.weight * found.scale).double()
        exact, terms = gradient.double() @ wide, gradient.double().abs() @ wide.abs()
    assert x.grad is not None and x.grad.dtype == dtype
    assert_rounded_like(x.grad, exact, terms, 48)
    assert not list(found.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_rounded_matrix_is_kept_for_backward(kind: str) -> None:
    """So activations take what the plan counts for a frozen block of before: no input is kept."""
    _, linear = linear_of(kind, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear(rows(40, 96, dtype=torch.bfloat16).requires_grad_())
    stored = {buffer.data_ptr() for buffer in linear.buffers()}
    assert saved and {x.data_ptr() for x in saved} <= stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_emulated_product_is_that_of_scaled_mm(dtype: torch.dtype) -> None:
    """PyTorch has the operator for CPUs too: the same numbers but for the order of the sums."""
    (a, a_scale), (b, b_scale) = to_float8(rows(40, 96)), to_float8(rows(48, 96, seed=1))
    operator: Any = torch._scaled_mm
    found = operator(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype)
    wide = (a.double() * a_scale.double(), b.double() * b_scale.double())
    exact, terms = wide[0] @ wide[1].t(), wide[0].abs() @ wide[1].abs().t()
    emulated = quantized.scaled_product(a, a_scale, b, b_scale, dtype)
    assert_rounded_like(emulated, exact, terms, 96)
    assert_rounded_like(found, exact, terms, 96)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_gpu_would_take_both_products(tokens: int) -> None:
    """PyTorch's own checks of layouts, sizes and scales, on tensors that only say "cuda"."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        return FakeTensor(mode, x.to("meta"), torch.device("cuda", 0))

    _, found = linear_of("float8", torch.bfloat16)
    for weight, scale in (
        (found.weight, found.scale),
        (found.transposed, found.transposed_scale),
    ):
        a, a_scale = to_float8(rows(tokens, weight.shape[1]))
        with mode:
            copies = [fake(x) for x in (a, a_scale, weight, scale)]
            y = quantized.scaled_product(*copies, torch.bfloat16)
        assert y.shape == (tokens, weight.shape[0]) and y.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 1024, 2048), (1, 4096, 4096), (4096, 11008, 4096)])
def test_a_gpu_computes_what_is_emulated(shape: tuple[int, int, int]) -> None:
    """The GPU's own rounding, with fast accumulation, is small beside that of the numbers."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU with float8")
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to("cuda", torch.bfloat16)
    weight = torch.randn(N, K, generator=generator).cuda()
    (a, a_scale), (b, b_scale) = to_float8(x), to_float8(weight)
    found = quantized.scaled_product(a, a_scale, b, b_scale, torch.bfloat16).double()
    emulated = (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).t()
    unrounded = x.double() @ weight.double().t()
    assert (found - emulated).norm() <= (emulated - unrounded).norm() / 4
    on_cpu = to_float8(x.cpu())
    assert torch.equal(a.cpu().float(), on_cpu[0].float()) and torch.equal(a_scale.cpu(), on_cpu[1])


# ---- A model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_of_frozen_blocks_are_rounded(
    alone: Ranks, kind: FrozenDtype, dtype: torch.dtype
) -> None:
    """New blocks keep fp32 masters and have all gradients; the rest is in the compute dtype."""
    _, gradients, model = take_steps(alone, kind, dtype=dtype)
    layers: list[Any] = list(model.model.layers)
    for index, layer in enumerate(layers):
        modules = [m for m in layer.modules() if isinstance(m, Linear | QuantizedLinear)]
        assert len(modules) == 7
        assert {type(m) for m in modules} == {Linear if index in NEW else QuantizedLinear}
    new = tuple(f"model.layers.{index}." for index in NEW)
    assert list(gradients) == [n for n, _ in build().named_parameters() if n.startswith(new)]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in gradients else dtype)
    # Backward never reaches block 0, so it has no second copy.
    has_copy = [getattr(layer.mlp.up_proj, "transposed", None) is not None for layer in layers]
    assert has_copy == [kind == "float8" and index in (2, 4) for index in range(LAYERS)]


def test_int8_trains_as_on_a_base_that_was_rounded_before(alone: Ranks) -> None:
    """New blocks: the losses and gradients of the ordinary path, but for the order of the sums."""
    model = build()
    for index in {*range(LAYERS)} - {*NEW}:
        for linear in model.model.layers[index].modules():
            if isinstance(linear, Linear):
                rounded, scale = to_int8(linear.weight.detach(), torch.float32)
                linear.weight.data = rounded * scale
    expected, gradients, _ = take_steps(alone, "auto", 2, model=model)
    losses, found, _ = take_steps(alone, "int8", 2)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm()
    assert losses[0] != take_steps(alone, "auto")[0][0]


def test_float8_changes_gradients_by_its_rounding(alone: Ranks) -> None:
    """Each of 7 products, forward and backward, of 3 blocks adds an error of at most 2^-4."""
    (loss, *_), expected, _ = take_steps(alone, "auto")
    (rounded_loss, *_), found, _ = take_steps(alone, "float8")
    assert 0 < abs(rounded_loss - loss) < 2**-4 * loss
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # errors that are independent of one another
        bound = 2**-4 * math.sqrt(7 * 2 * 3) * gradient.norm()
        assert (found[name] - gradient).norm() <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["compile", "recompute"])
def test_compiled_and_recomputed_blocks_compute_the_same(
    alone: Ranks, kind: FrozenDtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and a compiled block is one graph."""
    expected, gradients, _ = take_steps(alone, kind)
    # What the compiler makes of a graph is not in question here, and it is slow.
    compiler = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    torch.compiler.reset()
    losses, found, _ = take_steps(alone, kind, **{how: True})
    assert losses == expected
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_two_processes_give_the_losses_of_one(
    alone: Ranks, fork_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows have their own scales, so it does not matter which others are in a batch."""
    done = fork_ranks(2, __file__, "worker", str(tmp_path))
    assert done.statuses == [0, 0], done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for kind in KINDS:
        found = torch.tensor([rank[kind] for rank in ranks]).mean(0)
        expected = torch.tensor(take_steps(alone, kind, 2)[0])
        # fp32 sums in another order: a few units in the last place; updates hand it on.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_rounded_base_is_learned_on_as_well(alone: Ranks) -> None:
    """20 steps end where they end in fp32, within what another order of the data changes."""

    def end(kind: FrozenDtype, seed: int = 0) -> float:
        losses, _, _ = take_steps(alone, kind, 20, seed)
        return sum(losses[-5:]) / 5

    exact = [end("auto", seed) for seed in range(3)]
    noise = max(exact) - min(exact)
    first = take_steps(alone, "auto")[0][0]
    assert noise < (first - exact[0]) / 4
    for kind in KINDS:
        assert abs(end(kind) - exact[0]) < noise


# ---- The plan -----------------------------------------------------------------------------------


def plan_settings(device: str = "", **options: Any) -> Settings:
    data, place = DataSettings(seq_len=64), TrainSettings(batch_size=8, **options)
    return Settings(data=data, train=place, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ("auto", *KINDS))
def test_the_plan_counts_what_lies_there(
    alone: Ranks, kind: FrozenDtype, dtype: torch.dtype
) -> None:
    """Frozen weights to the byte: rounded matrices, both copies, scales, and all the rest."""
    settings = plan_settings(frozen_dtype=kind)
    planned = estimate_memory(settings, freeze(build_on_meta(CONFIG)), dtype, CPU, 4)
    _, _, model = take_steps(alone, kind, dtype=dtype)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    buffers = list(model.buffers())
    found = sum(x.nbytes for x in (*frozen, *buffers))
    if kind == "auto":
        found //= 4  # sharded
    assert planned["frozen weights"] == found
    assert ("rounding" in planned) == bool(buffers) == (kind != "auto")


def test_int8_takes_half_of_bfloat16_and_float8_as_much(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    """Of a block at the width of LLaMA-2-7B, but for scales and norms; one copy is half."""
    config = tiny_config(num_hidden_layers=1, hidden_size=4096, intermediate_size=11008)
    layer = build_on_meta(config).model.layers[0]
    size = partial(quantized.stored_bytes, layer, dtype=torch.bfloat16)
    plain = size(kind="auto", has_backward=True)
    for kind, has_backward, share in (
        ("int8", True, 0.5),
        ("float8", True, 1.0),
        ("float8", False, 0.5),
    ):
        found = size(kind=kind, has_backward=has_backward)
        assert share * plain < found < share * plain * 1.003


def test_rounded_weights_are_whole_on_every_process() -> None:
    """`auto` takes replicate; a proposal tries nothing else, and only rounds where it was asked."""
    for kind in KINDS:
        t = TrainSettings(frozen_dtype=kind)
        assert (t.placement(1), t.placement(8)) == ("replicate", "replicate")
        tried = list(proposal._fastest_first(plan_settings(frozen_dtype=kind), 2))
        assert {each.frozen for each in tried} == {"replicate"}
        assert {each.frozen_dtype for each in tried} == {kind}
    tried = list(proposal._fastest_first(plan_settings(), 2))
    assert {each.frozen_dtype for each in tried} == {"auto"}


# ---- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frozen": "shard"}, "train.frozen is shard.*set train.frozen to 'replicate' or 'auto'"),
        ({"frozen": "gather"}, "train.frozen is gather.*set train.frozen to 'replicate'"),
        ({"trainable": "all"}, "train.trainable 'all' freezes nothing: set it to 'auto'"),
    ],
)
def test_settings_that_contradict_it_are_refused(options: dict[str, Any], said: str) -> None:
    """One message with both settings and the fix; "auto" goes with all of them."""
    for kind in KINDS:
        with pytest.raises(ConfigError, match=f"train.frozen_dtype is {kind} and {said}"):
            check(plan_settings(frozen_dtype=kind, **options), 2)
    with pytest.raises(ConfigError) as error:
        check(plan_settings(**options), 2)  # of other things
    assert "frozen_dtype" not in str(error.value)


def check_gpu(
    config: ModelConfig, kind: FrozenDtype, dtype: torch.dtype = torch.bfloat16, device: str = ""
) -> None:
    proposal.check_float8(plan_settings(device, frozen_dtype=kind), config, dtype)


@pytest.mark.parametrize(
    ("name", "capability"),
    {"A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0)}.items(),
)
def test_float8_needs_a_gpu_that_has_it(
    name: str,
    capability: tuple[int, int],
    tiny_config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From compute capability 8.9 on; int8 needs nothing."""
    gpu = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    check_gpu(tiny_config(), "auto", torch.float32)
    check_gpu(tiny_config(), "int8", torch.float32)
    if capability >= (8, 9):
        return check_gpu(tiny_config(), "float8")
    said = r"'float8': A100 has compute capability 8\.0, below 8\.9; take 'int8' or 'auto'"
    with pytest.raises(ConfigError, match=said):
        check_gpu(tiny_config(), "float8")


def test_float8_on_a_gpu_needs_bfloat16_and_even_sizes(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    """What the product on a GPU asks for."""
    with pytest.raises(ConfigError, match="has the size 100, which is not a multiple of 16"):
        check_gpu(tiny_config(intermediate_size=100), "float8", device="h100")
    with pytest.raises(ConfigError, match=r"on a GPU it needs train\.dtype bfloat16"):
        check_gpu(tiny_config(), "float8", torch.float32, device="h100")


def test_a_plan_for_a_gpu_without_float8_is_refused(
    pro: Path, root: Path, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    """By its name, as there is no GPU to ask; a size of memory may belong to one that has it."""
    options = {"model.path": pro, "data.train": root / "README.md", "data.seq_len": 32}
    options |= {"run_dir": tmp_path, "train.batch_size": 4, "train.frozen_dtype": "float8"}
    for device in ("A100", "rtx 3090"):
        with pytest.raises(ConfigError, match="is a GPU without float8; take 'int8' or 'auto'"):
            train.main([*words(options, dry_run=""), "--device", device])
    for device in ("h100", "48GB"):
        train.main([*words(options, dry_run=""), "--device", device])


def test_every_gpu_without_float8_is_a_gpu_of_the_table() -> None:
    """A name that nobody can give would refuse nothing."""
    assert {*proposal.WITHOUT_FLOAT8} < {*proposal.GPUS}


# ---- A run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_is_rounded_and_merged_files_are_not(
    kind: FrozenDtype,
    pro: Path,
    root: Path,
    tmp_path: Path,
    words: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Evaluation at step 0 differs from the base's; outside new blocks merged bytes are its own."""
    options = {"model.path": pro, "data.train": root / "CONTRIBUTING.md", "data.seq_len": 32}
    options |= {"data.val": f"text={root / 'README.md'}", "data.cache_dir": tmp_path / "cache"}
    options |= {"train.steps": 2, "train.batch_size": 4, "eval.sequences": 4, "log_every": 1}
    exact = words(options, run_dir=tmp_path / "exact")
    train.main(exact)
    assert "frozen blocks" not in capsys.readouterr().err
    run_dir = tmp_path / "run"
    rounded = words(options, run_dir=run_dir, train__frozen_dtype=kind)
    train.main([*rounded, "--dry-run"])
    said = capsys.readouterr().out
    slow = " (emulated, slowly)" if kind == "float8" else ""
    assert f"{kind}{slow}: training and evaluation, from step 0, use the base rounded; " in said
    assert "as the teacher" not in said
    train.main([*rounded, "--dry-run", *words({"replay.hold": "3%"})])
    assert "use the base rounded, also as the teacher of replay" in capsys.readouterr().out
    train.main(rounded)

    def losses(run: Path) -> list[float]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "eval"]

    found, expected = losses(run_dir), losses(tmp_path / "exact")
    assert all(0 < abs(a - b) < 0.05 * b for a, b in zip(found, expected, strict=True))

    merge_checkpoint(Checkpoint.open(pro), run_dir, tmp_path / "merged")
    before, after = (Checkpoint.open(path).state_dict() for path in (pro, tmp_path / "merged"))
    new = load_file(training_checkpoints(run_dir)[-1] / "trainable.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[name], new.get(name, tensor))
        assert (name in new) == name.startswith("model.layers.2.")

    for changed in (None, "int8" if kind == "float8" else "float8"):
        with pytest.raises(ConfigError, match=f'train.frozen_dtype "{kind}" -> '):
            train.main(words(options, run_dir=run_dir, train__frozen_dtype=changed))
