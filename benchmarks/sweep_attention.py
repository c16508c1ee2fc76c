"""Finds tiles for the attention kernels: the sweep behind the table in kernels/tiles.py.

    python benchmarks/sweep_attention.py [--kernel forward] [--block-d 128] [--architecture 90]
                                         [--dtype bf16] [--candidates 128x64x8x3 ...] [--out FILE]

Every candidate (rows x columns x warps x stages) is compiled, plain and with bounds, as the public
function would launch it. Candidates that take too much shared memory or miss the tensor cores are
dropped. Spilled bytes are told, and do not drop one: a few outside of the loop cost nothing. All
that are sound are timed where there is a GPU of that architecture, on B 2, T 4096, 32 heads, 8
key/value heads, causal. The best are printed as lines of the table. Without a GPU nothing is timed;
what spills least and then the largest tiles come first. The file of figures is complete after
every entry.
"""

import itertools
import sys
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import measuring
import torch
import triton
from compile_kernels import compile_all
from launches import DTYPES, Launch, recording

from llamapro.kernels import attention, device, tiles
from llamapro.kernels.tiles import Tile

KERNELS = {
    "forward": "_attention_forward_kernel",
    "query": "_attention_query_kernel",
    "key_value": "_attention_key_value_kernel",
}
B, T, H, KV = 2, 4096, 32, 8
# Matrix products of T x T x D, of which a causal mask leaves half: 2 in forward.
PRODUCTS = {"forward": 2, "query": 3, "key_value": 4}


class Entry(NamedTuple):
    """A key of the table, with the dtype in place of its size."""

    kernel: str
    architecture: int
    block_d: int
    dtype: str


def candidates(entry: Entry) -> list[Tile]:
    """Returns the tiles worth compiling: powers of two, 4 or 8 warps, 1 to 3 stages."""
    sizes = (16, 32, 64) if entry.dtype == "fp32" else (32, 64, 128)
    return [
        Tile(rows, columns, num_warps, num_stages)
        for rows, columns, num_warps, num_stages in itertools.product(
            sizes, sizes, (4, 8), (1, 2, 3)
        )
        if rows * columns <= 2048 * num_warps  # 64 scores per thread
    ]


def call(entry: Entry, where: str, bounded: bool) -> Any:
    """Runs forward; returns backward as a function that computes what the entry's kernel gives."""
    dtype = DTYPES[entry.dtype]
    q, k, v = (
        torch.empty(B, T, heads, entry.block_d, dtype=dtype, device=where).normal_()
        if where == "cuda"
        else torch.empty(B, T, heads, entry.block_d, dtype=dtype)
        for heads in (H, KV, KV)
    )
    bounds = None
    if bounded:
        positions = torch.arange(T, dtype=torch.int32, device=where)[None]
        bounds = (torch.zeros_like(positions), torch.full_like(positions, T - 1))
    asked = {"query": (q,), "key_value": (k, v)}.get(entry.kernel, (q, k, v))
    for x in asked:
        x.requires_grad_(entry.kernel != "forward")

    def forward() -> torch.Tensor:
        return attention.attention(q, k, v, bounds)

    if entry.kernel == "forward":
        return forward
    out = forward()
    dout = torch.empty_like(out)
    return lambda: torch.autograd.grad(out, asked, dout, retain_graph=True)


def taking(entry: Entry, tile: Tile) -> Any:
    """Gives the entry's kernel that tile inside the with-block, and the others the table's."""
    choose = tiles.tile
    return mock.patch.object(
        tiles, "tile", lambda kernel, *key: tile if kernel == entry.kernel else choose(kernel, *key)
    )


def launch(entry: Entry, tile: Tile, bounded: bool) -> Launch:
    """Records the launch of the entry's kernel with that tile."""
    with (
        taking(entry, tile),
        recording(entry.architecture, f"{entry.kernel} {tuple(tile)}") as recorded,
    ):
        call(entry, "cpu", bounded)()
    name = KERNELS[entry.kernel]
    return next(launch for launch in recorded if launch.kernel.__name__ == name)


def seconds(entry: Entry, tile: Tile) -> float:
    """Returns the median time of the public function's forward or backward, with cold caches."""
    with taking(entry, tile):
        function = call(entry, "cuda", bounded=False)
        return triton.testing.do_bench(function, warmup=25, rep=200, return_mode="median") / 1e3


def sweep(entry: Entry, chosen: list[Tile], jobs: int, has_gpu: bool) -> list[dict[str, Any]]:
    """Compiles all candidates of an entry, times those that are sound, and puts them in order."""
    results: dict[Tile, dict[str, Any]] = {
        tile: {"tile": tuple(tile), "problems": []} for tile in chosen
    }
    for bounded in (True, False):  # with bounds first: it takes more registers
        sound = [tile for tile, result in results.items() if not result["problems"]]
        recorded = [launch(entry, tile, bounded) for tile in sound]
        rows = compile_all(recorded, jobs)
        for tile, row in zip(sound, rows, strict=True):
            result = results[tile]
            # Of those, the check of the table refuses spills too.
            result["problems"] += [p for p in row["problems"] if not p.startswith("spills ")]
            for name in ("registers", "shared_bytes", "spilled_bytes"):
                result[name] = max(row.get(name, 0), result.get(name, 0))
    for tile, result in results.items():
        if has_gpu and not result["problems"]:
            result["seconds"] = seconds(entry, tile)
            flop = PRODUCTS[entry.kernel] * B * H * T * T * entry.block_d
            result["tflops"] = flop / result["seconds"] / 1e12

    def order(result: dict[str, Any]) -> tuple[float, ...]:
        rows, columns, _, num_stages = result["tile"]
        untimed = (result["spilled_bytes"], -rows * columns, -num_stages)
        return (len(result["problems"]), result.get("seconds", 0.0), *untimed)

    return sorted(results.values(), key=order)


def line(entry: Entry, result: dict[str, Any]) -> str:
    """Returns a result as a line of `tiles.TILES`."""
    size = DTYPES[entry.dtype].itemsize
    key = f'("{entry.kernel}", {entry.architecture}, {entry.block_d}, {size})'
    tile = ", ".join(map(str, result["tile"]))
    measured = f"{result['tflops']:.0f} TFLOP/s" if "tflops" in result else "not timed"
    facts = f"{result['registers']} registers, {result['shared_bytes'] // 1024} KiB"
    if result["spilled_bytes"]:
        facts += f", spills {result['spilled_bytes']} B"
    return f"    {key}: Tile({tile}),  # {measured}, {facts}"


def main() -> None:
    parser = measuring.parser(__doc__)
    add = partial(parser.add_argument, nargs="+")
    add("--kernel", choices=KERNELS, default=list(KERNELS), help="kernels to sweep")
    add("--block-d", type=int, choices=(64, 128, 256), default=[128], help="head dims")
    own = device.architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    both = [own] if own else [80, 90]
    add("--architecture", type=int, choices=(80, 90), default=both, help="sm_80, sm_90")
    add("--dtype", choices=DTYPES, default=["bf16"], help="dtypes of the inputs")
    add("--candidates", help="tiles as ROWSxCOLUMNSxWARPSxSTAGES; all if none is given")
    parser.add_argument("--show", type=int, default=5, help="tiles printed of each entry")
    parser.add_argument("--jobs", type=int, default=2, help="compilations that run at a time")
    args = parser.parse_args()
    if device.is_interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    given = [Tile(*map(int, text.split("x"))) for text in args.candidates or []]
    entries = itertools.product(args.kernel, args.architecture, args.block_d, args.dtype)
    about = {"machine": measuring.machine(), "versions": measuring.versions("triton", "torch")}
    results = []
    for entry in itertools.starmap(Entry, entries):
        if (*entry[:3], DTYPES[entry.dtype].itemsize) not in tiles.TILES:
            print(f"{entry}: the table has no such entry", file=sys.stderr)
            continue
        ranked = sweep(entry, given or candidates(entry), args.jobs, entry.architecture == own)
        sound = [result for result in ranked if not result["problems"]]
        print(f"{entry.kernel} sm_{entry.architecture} BLOCK_D {entry.block_d} {entry.dtype}:"
              f" {len(sound)} of {len(ranked)} candidates are sound")  # fmt: skip
        for result in sound[: args.show]:
            print(line(entry, result), flush=True)
        results.append({**entry._asdict(), "candidates": ranked})
        measuring.write(args.out, about | {"entries": results})


if __name__ == "__main__":
    main()
