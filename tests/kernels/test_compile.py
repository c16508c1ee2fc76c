"""What the compiler makes of the kernels for sm_80 and sm_90, on a machine that needs no GPU.

`benchmarks/compile_kernels.py` runs in processes of its own, without TRITON_INTERPRET. Triton keeps
what it has compiled in its cache: minutes the first time, seconds after that.
"""

import json
import os
import subprocess
import sys
import textwrap
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
def report(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that the script found, with its exit status."""
    file = tmp_path_factory.mktemp("compiled") / "kernels.json"
    done = run(root, str(root / "benchmarks" / "compile_kernels.py"), "--json", str(file))
    assert file.exists(), done.stderr[-2000:]
    return json.loads(file.read_text()) | {"status": done.returncode}


def of(report: dict[str, Any], op: str, *words: str) -> list[dict[str, Any]]:
    """The rows that some case of an op takes part in, if its name has all the words."""
    return [
        row
        for row in report["rows"]
        if any({op, *words} <= set(case.split()) for case in row["cases"])
    ]


def test_script_finds_no_problem(report: dict[str, Any]) -> None:
    """It says so by its status, too."""
    assert report["problems"] == [] and report["status"] == 0


def test_every_kernel_compiles_without_spilling(report: dict[str, Any]) -> None:
    """Both architectures, all dtypes and sizes; no register goes to memory."""
    assert len(report["rows"]) > 100
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
    """All its products of 16-bit numbers, in every kernel but the sum that has none."""
    kernels = set()
    for dtype in ("bf16", "fp16"):
        for row in of(report, "attention", dtype):
            if row["architecture"] == architecture and row["has_16_bit_dot"]:
                assert row[used] > 0, row
                kernels.add(row["kernel"])
    assert len(kernels) >= 3  # forward, dq, dk and dv


def test_hopper_reads_attention_tiles_by_tma(report: dict[str, Any]) -> None:
    """In 16 bits; what the other architecture is compiled for has none of it."""
    for row in of(report, "attention"):
        if row["has_16_bit_dot"]:
            assert (row["tma_loads"] > 0) == (row["architecture"] == 90), row
    rows = of(report, "attention", "bf16", "single_pass")
    assert sum(row["tma_reductions"] > 0 for row in rows if row["architecture"] == 90) > 2


def test_every_tile_of_the_table_was_compiled(report: dict[str, Any]) -> None:
    """No entry is there that no case takes."""
    assert {tuple(key) for key in report["tiles"]} == tiles.TILES.keys()
    assert {key[1] for key in tiles.TILES} == {80, 90}


def test_every_op_was_compiled_for_large_tensors(report: dict[str, Any]) -> None:
    """More than 2^31 elements, in which no 32-bit offset may overflow (the script's check)."""
    for op in ("attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy"):
        assert {row["architecture"] for row in of(report, op, "large")} == {80, 90}, op


@pytest.mark.parametrize("op", ["rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_memory_bound_kernels_load_16_bytes_at_a_time(report: dict[str, Any], op: str) -> None:
    """But for a few single numbers, such as a row's statistics."""
    for row in of(report, op):
        assert row["loads_of_16_bytes"] >= row["loads"] / 2 > 0, row


TOY = """
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
        rows = compile_all(launches, 2, lambda text: None)
        return [problem for row in rows for problem in row["problems"]]
"""


def toy(root: Path, tmp_path: Path, body: str) -> str:
    """What a script prints, of kernels and tiles that are not good."""
    file = tmp_path / "toy.py"  # the source of a kernel must be in a file
    file.write_text(textwrap.dedent(TOY) + textwrap.dedent(body))
    done = run(root, str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "rows, num_warps, found", [(128, 4, "spills "), (16, 4, "16-bit product without wgmma")]
)
def test_a_bad_tile_is_reported(
    root: Path, tmp_path: Path, rows: int, num_warps: int, found: str
) -> None:
    """Too large for its warps: registers spill. Too small for a wgmma: none is there."""
    printed = toy(
        root,
        tmp_path,
        f"""
        bad = tiles.Tile({rows}, {rows}, {num_warps}, 1)
        with mock.patch.object(tiles, "tile", lambda *_: bad):
            launches, _ = record([attention_case("bf16", 128)])
        launches = [x for x in launches if "query" in x.kernel.__name__ and x.architecture == 90]
        print(problems(launches))
        """,
    )
    assert found in printed


def test_too_much_shared_memory_is_reported(root: Path, tmp_path: Path) -> None:
    """Tiles that fit Hopper do not fit the others."""
    printed = toy(
        root,
        tmp_path,
        """
        large = tiles.Tile(128, 128, 8, 3)
        with mock.patch.object(tiles, "tile", lambda *_: large):
            launches, _ = record([attention_case("bf16", 128)])
        launches = [x for x in launches if "forward" in x.kernel.__name__ and x.architecture == 80]
        print(problems(launches))
        """,
    )
    assert "shared memory" in printed and f"above {SHARED_LIMIT[80]} B" in printed


def test_a_32_bit_offset_that_overflows_is_reported(root: Path, tmp_path: Path) -> None:
    """Only where a tensor is large enough, and not if the row is widened first."""
    printed = toy(
        root,
        tmp_path,
        """
        for rows in ((1 << 19) - 1, (1 << 19) + 1):
            for wide in (False, True):
                with recording(80, "copy") as launches:
                    x = torch.empty(rows, 4096, dtype=torch.bfloat16)
                    copy_kernel[(rows,)](x, x, x.stride(0), WIDE=wide, BLOCK=4096)
                print(rows > 1 << 19, wide, len(problems(launches)) > 0)
        """,
    )
    assert printed.splitlines() == [
        "False False False",
        "False True False",
        "True False True",
        "True True False",
    ]


def test_offsets_are_followed_through_loops(root: Path, tmp_path: Path) -> None:
    """A row number that a loop counts up overflows where the loop is long enough."""
    printed = toy(
        root,
        tmp_path,
        """
        for rows in (1000, 3000000):
            with recording(80, "carried") as launches:
                carried_kernel[(1,)](torch.empty(4096), rows, 1024, BLOCK=1024)
            print(["32-bit overflow" in problem for problem in problems(launches)][:1])
        """,
    )
    assert printed.splitlines() == ["[]", "[True]"]


def test_a_kernel_that_does_not_compile_is_reported(root: Path, tmp_path: Path) -> None:
    """And does not stop the others."""
    printed = toy(
        root,
        tmp_path,
        """
        x = torch.empty(1024)
        with recording(90, "broken") as launches:
            broken_kernel[(1,)](x, BLOCK=1024)
            copy_kernel[(1,)](x, x, 1024, WIDE=True, BLOCK=1024)
        print(problems(launches))
        """,
    )
    assert "does not compile" in printed and "no_such_name" in printed
    assert printed.count("does not") == 1
