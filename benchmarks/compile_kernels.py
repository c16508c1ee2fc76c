"""Compiles every kernel with Triton and checks the result on a machine that needs no GPU.

    python benchmarks/compile_kernels.py [--quick] [--architectures 80 90 100 120] [--out FILE]

The kernels' public functions, forward and backward, run on CPU tensors of real sizes. Nothing is
computed: a stand-in for Triton's driver says which GPU there is, and a hook takes each launch with
the specialisation that Triton itself derived from the arguments. Each distinct one is then
compiled, for sm_80 and sm_90 by default. What is checked is therefore what the public functions
launch, and no list of signatures beside it. Do not set TRITON_INTERPRET: it makes kernels that
cannot be compiled.

Checked, and status 1 if one fails:
- no registers spilled: cuobjdump's STACK and LOCAL bytes are 0. On sm_100 and sm_120, which take
  the tiles of sm_80, spilled bytes are reported only;
- shared memory: 227 KiB on sm_90 and sm_100; 99 KiB on sm_80, so that the same code runs on sm_86
  and sm_89, and on sm_120;
- `tl.dot` of 16-bit types became tensor-core instructions: wgmma on sm_90, mma.sync on sm_80 and
  sm_120, either mma.sync or tcgen05 on sm_100;
- 64-bit offsets: from the recorded grid and integer arguments, some of them of tensors with more
  than 2^31 elements, an interval is computed for every integer in the kernel (`overflows`), and
  no addition, subtraction, product or shift in 32 bits, and no narrowing to them, can overflow;
- the grid: at most 65,535 programs along its second and third axis.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import measuring
import triton
from launches import Launch, cases, record
from overflow import overflows
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource
from triton.runtime.cache import triton_key

from llamapro.kernels import device as kernel_device
from llamapro.kernels import tiles

# Bytes of shared memory per block; those of sm_80 are the limit of sm_86 and sm_89.
SHARED_LIMIT = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
MAX_GRID_YZ = 65535  # programs along the second and third axis; 2^31 - 1 along the first
_COUNTED = {
    "wgmma": r"wgmma\.mma_async",
    "mma_sync": r"mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "tma_loads": r"cp\.async\.bulk\.tensor\S*\.shared::(?:cta|cluster)\.global",
    "tma_stores": r"cp\.async\.bulk\.tensor\S*\.global\.shared::cta",
    "loads": r"\b(?:ld\.global|cp\.async\.c[ag])\.",
    "loads_of_16_bytes": r"ld\.global\S*\.(?:v4\.\w32|v2\.\w64|v8\.\w16)"
    r"|cp\.async\.c[ag]\.shared\.global[^;]*, 0x10\b",
}


def compiled(launch: Launch) -> dict[str, Any]:
    """Compiles one launch; returns what it takes of the GPU and what its instructions are."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", launch.architecture, 32)
    result = triton.compile(source, target=target, options=options)
    ptx, ttir = result.asm["ptx"], result.asm["ttir"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        words = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    assert threads
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": result.metadata.shared,
        "threads": int(threads[1]),
        "has_16_bit_dot": bool(re.search(r"tt\.dot .*xb?f16> \*", ttir)),
        **{name: len(re.findall(pattern, ptx)) for name, pattern in _COUNTED.items()},
        "ttir": ttir,
    }


def problems(row: dict[str, Any]) -> list[str]:
    """Names each rule of the module docstring that a compiled launch breaks."""
    found = []
    if row["spilled_bytes"] and row["architecture"] in (80, 90):
        found.append(f"spills {row['spilled_bytes']} B")
    limit = SHARED_LIMIT[row["architecture"]]
    if row["shared_bytes"] > limit:
        found.append(f"shared memory {row['shared_bytes']} B, above {limit} B")
    fitting = {90: ("wgmma",), 100: ("tcgen05", "mma_sync")}.get(row["architecture"], ("mma_sync",))
    if row["has_16_bit_dot"] and not any(row[instruction] for instruction in fitting):
        found.append(f"a 16-bit product without {' or '.join(fitting)}")
    return found


def _describe(launches: list[Launch]) -> dict[str, Any]:
    first = launches[0]
    return {
        "cases": sorted({launch.case for launch in launches}),
        "kernel": first.kernel.__name__,
        "architecture": first.architecture,
        "constants": {
            first.kernel.arg_names[path[0]]: value
            for path, value in first.constants.items()
            if isinstance(value, int | float)
        },
        "num_warps": first.num_warps,
        "num_stages": first.num_stages,
    }


def _compile_into(result: Path, errors: Path, launches: list[Launch]) -> None:
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    row = _describe(launches) | compiled(launches[0])
    row["problems"] = problems(row)
    ttir = row.pop("ttir")
    for launch in launches:
        if max(launch.grid[1:]) > MAX_GRID_YZ:
            row["problems"].append(f"grid {launch.grid} in {launch.case}")
        for text in overflows(ttir, launch.grid, launch.numbers):
            row["problems"].append(f"32-bit overflow in {launch.case}: {text}")
    result.write_text(json.dumps(row), encoding="utf-8")


def compile_all(launches: list[Launch], jobs: int) -> list[dict[str, Any]]:
    """Compiles each distinct launch in a process of its own, because some errors end the compiler.

    Args:
        jobs: processes at a time.

    Returns:
        A row per distinct launch, in order. One that does not compile has no figures, and the
        reason among its "problems".
    """
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.code(), []).append(launch)
    # Computed once, here: a hash of all of Triton, and what its tools print of themselves.
    triton_key(), get_ptxas_version(), triton.knobs.nvidia.cuobjdump
    context = multiprocessing.get_context("fork")  # a launch cannot be pickled
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"{i}.json"), Path(folder, f"{i}.txt")) for i in range(len(groups))]
        running: list[Any] = []
        bar = tqdm(groups.values(), desc="compiling", unit="launch", disable=None)
        for (result, errors), group in zip(files, bar, strict=True):
            while len(running) >= jobs:  # one that ended may still seem alive for a moment
                wait([process.sentinel for process in running])
                running = [process for process in running if process.is_alive()]
            process = context.Process(target=_compile_into, args=(result, errors, group))
            process.start()
            running.append(process)
        for process in running:
            process.join()
        return [_row(*pair, group) for pair, group in zip(files, groups.values(), strict=True)]


def _row(result: Path, errors: Path, launches: list[Launch]) -> dict[str, Any]:
    """Returns what a process wrote, or the compiler's last error if it wrote nothing."""
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    said = errors.read_text(encoding="utf-8", errors="replace")
    print(said, file=sys.stderr)
    reasons = re.findall(r"^.*(?:error|assertion).*$", said, re.MULTILINE | re.I)
    reason = reasons[-1].strip()[:200] if reasons else "no reason given"
    return _describe(launches) | {"problems": [f"does not compile: {reason}"]}


def render(rows: list[dict[str, Any]]) -> str:
    """Returns the table for people, with a line for each distinct launch."""
    heads = (
        "kernel,sm,case,blocks,warps,stages,regs,spill,smem KiB,wgmma,tcgen05,mma,TMA,16 B loads"
    )
    lines = []
    for row in rows:
        blocks = [str(v) for k, v in row["constants"].items() if type(v) is int and v > 1]
        others = f" +{len(row['cases']) - 1}" if len(row["cases"]) > 1 else ""
        line = [row["kernel"], row["architecture"], row["cases"][0] + others, "x".join(blocks)]
        if "registers" in row:
            line += [row["num_warps"], row["num_stages"], row["registers"], row["spilled_bytes"]]
            line += [f"{row['shared_bytes'] / 1024:.0f}", row["wgmma"]]
            line += [row["tcgen05"], row["mma_sync"]]
            line += [row["tma_loads"] + row["tma_stores"]]
            line += [f"{row['loads_of_16_bytes']}/{row['loads']}"]
        lines.append(line)
    return measuring.table(heads.split(","), lines)


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="compile one size and dtype per function"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilations that run at a time")
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=(80, 90), choices=SHARED_LIMIT,
        help="compute capabilities without the point (default: 80 90)",
    )  # fmt: skip
    args = parser.parse_args()
    if kernel_device.is_interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    started = time.perf_counter()
    launches, taken = record(
        [case for case in cases() if case.is_quick or not args.quick], args.architectures
    )
    rows = compile_all(launches, args.jobs)
    bad = [f"{row['kernel']} sm_{row['architecture']} ({row['cases'][0]}): {problem}"
           for row in rows for problem in row["problems"]]  # fmt: skip
    if not args.quick and {80, 90} <= set(args.architectures):
        bad += [f"no case takes the tile of {key}" for key in sorted(tiles.TILES.keys() - taken)]
    seconds = round(time.perf_counter() - started)
    print(render(rows))
    print(f"{len(launches)} launches, {len(rows)} distinct, {len(bad)} problems, {seconds} s")
    print(*bad, sep="\n", end="\n" if bad else "")
    versions = measuring.versions("triton", "torch")
    versions["ptxas"] = triton.knobs.nvidia.ptxas.version
    result = {"versions": versions, "seconds": seconds, "problems": bad, "tiles": sorted(taken)}
    measuring.write(args.out, result | {"rows": rows})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
