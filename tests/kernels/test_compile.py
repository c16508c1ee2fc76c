"""The kernels compiled for sm_80 and sm_90, on a machine that needs no GPU.

`benchmarks/compile_kernels.py` runs in processes of its own, without TRITON_INTERPRET. Triton keeps
what it has compiled in its cache, so later runs are faster.
"""

import functools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from llamapro.kernels import tiles

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "benchmarks")
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def compiled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`compiled(*options)`: all that the script found, with its exit status."""

    @functools.cache
    def run_script(*options: str) -> dict[str, Any]:
        file = tmp_path_factory.mktemp("compiled") / "kernels.json"
        script = str(root / "benchmarks" / "compile_kernels.py")
        done = run(root, script, *options, "--out", str(file))
        assert file.exists(), done.stderr[-2000:]
        return json.loads(file.read_text()) | {"status": done.returncode}

    return run_script


@pytest.fixture
def full(compiled: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The report on all dtypes and sizes, which takes minutes without Triton's cache."""
    return compiled()


@pytest.fixture(params=["quick", pytest.param("full", marks=pytest.mark.slow)])
def report(
    request: pytest.FixtureRequest, compiled: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """The report on every kernel, in one size and dtype and in all."""
    return compiled("--quick") if request.param == "quick" else compiled()


def of(report: dict[str, Any], op: str, *words: str) -> list[dict[str, Any]]:
    """The rows that some case of an op takes part in, if its name has all the words."""
    return [
        row
        for row in report["rows"]
        if any({op, *words} <= set(case.split()) for case in row["cases"])
    ]


def test_script_finds_no_problem(report: dict[str, Any]) -> None:
    """Its exit status says so too."""
    assert report["problems"] == [] and report["status"] == 0


def test_every_kernel_compiles_without_spilling(report: dict[str, Any]) -> None:
    """No register goes to memory on either architecture."""
    assert {row["architecture"] for row in report["rows"]} == {80, 90}
    for row in report["rows"]:
        assert row["registers"] <= 255 and row["spilled_bytes"] == 0, row


def test_shared_memory_fits_the_smallest_chip(report: dict[str, Any]) -> None:
    """99 KiB on Ampere and Ada, 227 KiB on Hopper."""
    for row in report["rows"]:
        assert row["shared_bytes"] <= SHARED_LIMIT[row["architecture"]], row


@pytest.mark.parametrize("architecture, used", [(80, "mma_sync"), (90, "wgmma")])
def test_attention_multiplies_on_the_tensor_cores(
    report: dict[str, Any], architecture: int, used: str
) -> None:
    """All products of 16-bit numbers do, in every kernel that has one."""
    rows = [
        row
        for dtype in ("bf16", "fp16")
        for row in of(report, "attention", dtype)
        if row["architecture"] == architecture and row["has_16_bit_dot"]
    ]
    assert all(row[used] > 0 for row in rows)
    assert len({row["kernel"] for row in rows}) == 3  # forward, dq, dk and dv


@pytest.mark.slow
def test_kernels_compile_for_blackwell(compiled: Callable[..., dict[str, Any]]) -> None:
    """With the tiles of sm_80, in its shared memory, on tensor cores; tcgen05 on sm_100."""
    report = compiled("--quick", "--architectures", "100", "120")
    assert report["problems"] == [] and report["status"] == 0
    assert {row["architecture"] for row in report["rows"]} == {100, 120}
    products = [row for row in of(report, "attention") if row["has_16_bit_dot"]]
    assert {row["kernel"] for row in products if row["tcgen05"]} == {
        row["kernel"] for row in products if row["architecture"] == 100
    }
    assert all(row["mma_sync"] for row in products if row["architecture"] == 120)


def test_hopper_reads_attention_tiles_by_tma(report: dict[str, Any]) -> None:
    """Tiles in 16 bits are; nothing compiled for the other architecture is."""
    for row in of(report, "attention"):
        if row["has_16_bit_dot"]:
            assert (row["tma_loads"] > 0) == (row["architecture"] == 90), row


@pytest.mark.slow
def test_every_tile_of_the_table_was_compiled(full: dict[str, Any]) -> None:
    """Every entry is taken by some case."""
    assert len(full["rows"]) > 100
    assert {tuple(key) for key in full["tiles"]} == tiles.TILES.keys()
    assert {key[1] for key in tiles.TILES} == {80, 90}


@pytest.mark.slow
def test_every_op_was_compiled_for_large_tensors(full: dict[str, Any]) -> None:
    """The script checks that no 32-bit offset overflows beyond 2^31 elements.

    Of the logits no more than a chunk exists.
    """
    for op in ("attention", "rms_norm", "rope", "swiglu"):
        assert {row["architecture"] for row in of(full, op, "large")} == {80, 90}, op


@pytest.mark.parametrize("op", ["rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_memory_bound_kernels_load_16_bytes_at_a_time(report: dict[str, Any], op: str) -> None:
    """The others load single numbers, such as a row's statistics."""
    for row in of(report, op):
        assert row["loads_of_16_bytes"] >= row["loads"] / 2 > 0, row


TOYS = """
    import json
    from unittest import mock
    import torch, triton
    import triton.language as tl
    from compile_kernels import compile_all
    from launches import attention_case, record, recording, tiles

    @triton.jit
    def copy_kernel(x, y, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        if WIDE:
            row = row.to(tl.int64)
        at = row * stride + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at))

    @triton.jit
    def carried_kernel(x, rows, C, BLOCK: tl.constexpr):
        row = 0
        for _ in range(rows):
            tl.store(x + row * C + tl.arange(0, BLOCK), 0.0)
            row += 1

    @triton.jit
    def broken_kernel(x, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), no_such_name)

    def problems(launches):
        rows = compile_all(launches, 2)
        return [problem for row in rows for problem in row["problems"]]

    def of_attention(kernel, architecture, *tile):
        with mock.patch.object(tiles, "tile", lambda *_: tiles.Tile(*tile)):
            launches, _ = record([attention_case("bf16", 128)])
        return problems([
            x for x in launches if kernel in x.kernel.__name__ and x.architecture == architecture
        ])

    def of_copy(rows, wide):
        with recording(80, "copy") as launches:
            x = torch.empty(rows, 4096, dtype=torch.bfloat16)
            copy_kernel[(rows,)](x, x, x.stride(0), WIDE=wide, BLOCK=4096)
        return problems(launches)

    def of_carried(rows):
        with recording(80, "carried") as launches:
            carried_kernel[(1,)](torch.empty(4096), rows, 1024, BLOCK=1024)
        return problems(launches)

    with recording(90, "broken") as broken:
        broken_kernel[(1,)](torch.empty(1024), BLOCK=1024)
        copy_kernel[(1,)](torch.empty(1024), torch.empty(1024), 1024, WIDE=True, BLOCK=1024)
    print(json.dumps({
        "too many registers": of_attention("query", 90, 128, 128, 4, 1),
        "too small for wgmma": of_attention("query", 90, 16, 16, 4, 1),
        "too much shared memory": of_attention("forward", 80, 128, 128, 8, 3),
        "small": of_copy((1 << 19) - 1, False),
        "large": of_copy((1 << 19) + 1, False),
        "large, in 64 bits": of_copy((1 << 19) + 1, True),
        "short loop": of_carried(1000),
        "long loop": of_carried(3000000),
        "broken": problems(broken),
    }))
"""


@pytest.fixture(scope="module")
def toys(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The problems found in kernels and tiles that are wrong on purpose."""
    file = tmp_path_factory.mktemp("toys") / "toys.py"  # the source of a kernel must be in a file
    file.write_text(textwrap.dedent(TOYS))
    done = run(root, str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "toy, problem",
    [
        ("too many registers", "spills "),
        ("too small for wgmma", "16-bit product without wgmma"),
        ("too much shared memory", f"above {SHARED_LIMIT[80]} B"),
        ("large", "32-bit overflow"),  # more than 2^31 elements
        ("long loop", "32-bit overflow"),  # of a row number that a loop counts up
        ("broken", "does not compile: "),
    ],
)
def test_a_bad_kernel_or_tile_is_reported(
    toy: str, problem: str, toys: dict[str, list[str]]
) -> None:
    """The report names the mistake."""
    assert any(problem in found for found in toys[toy])


@pytest.mark.parametrize("toy", ["small", "large, in 64 bits", "short loop"])
def test_no_overflow_is_reported_where_there_is_none(toy: str, toys: dict[str, list[str]]) -> None:
    """Tensors below 2^31 elements, row numbers that are widened first and short loops are fine."""
    assert toys[toy] == []


def test_a_kernel_that_does_not_compile_does_not_stop_the_others(
    toys: dict[str, list[str]],
) -> None:
    """Its own problem is the only one, and gives the reason."""
    (problem,) = toys["broken"]
    assert "no_such_name" in problem
