"""Finds 32-bit integers of a kernel that can overflow, by intervals through Triton's IR.

An interval is computed for every integer in the kernel from the grid and the integer arguments of
a recorded launch. Loops are widened from their first iterations, and integers in memory are taken
for positions in a sequence. So this is evidence, not proof, for values carried through loops.
"""

import operator
import re
from collections.abc import Callable

Range = tuple[int, int]
_NAME = re.compile(r"%[\w.]+(?:#\d+)?")
_UNCHANGED = {f"arith.{name}" for name in ("extsi", "extui", "trunci")}
_UNCHANGED |= {f"tt.{name}" for name in "splat unsplat expand_dims broadcast reshape trans".split()}
_EXACT: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.shli": operator.lshift,
}


def _corners(function: Callable[[int, int], int], a: Range, b: Range) -> Range:
    values = [function(x, y) for x in a for y in b]
    return min(values), max(values)


def _interval(
    operation: str,
    text: str,
    values: list[Range | None],
    grid: tuple[int, int, int],
    positions: Range | None,
) -> Range | None:
    """Returns the values that an operation can give, whatever its width; None if unknown."""
    match operation, values:
        case "arith.constant", _:
            constant = re.search(r"constant (?:dense<)?(-?\d+)>? :", text)
            return (int(constant[1]), int(constant[1])) if constant else None
        case "tt.get_program_id", _:
            return 0, grid["xyz".index(text.split()[1])] - 1
        case "tt.get_num_programs", _:
            programs = grid["xyz".index(text.split()[1])]
            return programs, programs
        case "tt.make_range", _:
            bounds = {word: int(n) for word, n in re.findall(r"(end|start) = (\d+)", text)}
            return bounds["start"], bounds["end"] - 1
        case "tt.load", _:
            return (0, positions[1]) if positions and re.search(r"ptr<i32>>?$", text) else None
        case ("arith.select", [_, (_, _) as a, (_, _) as b]):
            return min(a[0], b[0]), max(a[1], b[1])
        case ("arith.minsi", [(_, _) as a, (_, _) as b]):
            return min(a[0], b[0]), min(a[1], b[1])
        case ("arith.maxsi", [(_, _) as a, (_, _) as b]):
            return max(a[0], b[0]), max(a[1], b[1])
        case ("arith.divsi", [(_, _) as a, (_, _) as b]) if b[0] > 0:  # rounds towards zero
            return _corners(lambda x, y: x // y if x >= 0 else -(-x // y), a, b)
        case ("arith.divsi", [(_, _) as a, (_, _)]):  # of no known sign, and 0 is not allowed
            return min(a[0], -a[1]), max(a[1], -a[0])
        case ("arith.remsi", [(_, _) as a, (_, _) as b]):  # takes the sign of a
            largest = max(-b[0], b[1]) - 1
            return max(min(a[0], 0), -largest), min(max(a[1], 0), largest)
        case (_, [(_, _) as a, (_, _) as b]) if operation in _EXACT:
            return _corners(_EXACT[operation], a, b)
        case (_, [(_, _) as a]) if operation in _UNCHANGED:
            return a
    return None


Known = dict[str, Range | None]


def _visit(lines: list[str], known: Known, grid: tuple[int, int, int], found: list[str]) -> Known:
    """Adds the intervals of a block of lines to `known`; what the block yields is under "yield"."""
    positions = known.get("%S")
    at = 0
    while at < len(lines):
        text = lines[at]
        at += 1
        result, is_assigned, body = text.partition(" = ")
        if not is_assigned or not result.startswith("%"):
            result, body = "", text
        operation = body.partition(" ")[0]
        names = _NAME.findall(body)
        values = [known.get(name) for name in names]
        if operation == "scf.for":
            depth, end = 1, at
            while depth:
                depth += lines[end].endswith("{") - lines[end].startswith("}")
                end += 1
            _visit_loop(text, lines[at : end - 1], known, grid, found)
            at = end
            continue
        if operation == "scf.yield":
            known |= {f"yield {i}": value for i, value in enumerate(values)}
        is_narrow = re.search(r"\bi32>*$", body) is not None
        interval = _interval(operation, body, values, grid, positions)
        if is_narrow and interval and not -(2**31) <= interval[0] <= interval[1] < 2**31:
            found.append(f"{text}: in [{interval[0]}, {interval[1]}]")
        elif is_narrow and not interval and operation in ("arith.muli", "arith.trunci"):
            found.append(f"{text}: no bound is known")
        elif is_narrow and operation == "tt.addptr" and not values[1]:
            found.append(f"{text}: no bound is known of the offset")
        known[result] = interval
    return known


def _visit_loop(
    head: str, body: list[str], known: Known, grid: tuple[int, int, int], found: list[str]
) -> None:
    """`%r:n = scf.for %i = %low to %high step %step iter_args(%a = %initial, ...)`."""
    index, low, high, step, *carried = _NAME.findall(head.partition("scf.for ")[2])
    bounds = known.get(low), known.get(high), known.get(step)
    trips = 0
    known[index] = None
    if bounds[0] and bounds[1] and bounds[2]:
        known[index] = (bounds[0][0], max(bounds[0][0], bounds[1][1] - 1))
        trips = max(0, bounds[1][1] - bounds[0][0]) // bounds[2][0] + 1
    arguments = carried[::2]
    ranges = [known.get(initial) for initial in carried[1::2]]
    for last in (False, False, False, True):
        after = _visit(body, known | dict(zip(arguments, ranges, strict=True)), grid, [])
        for i, now in enumerate(ranges):
            then = after.get(f"yield {i}")
            if now and then:
                growth = min(then[0] - now[0], 0), max(then[1] - now[1], 0)
                times = trips if last else 1
                ranges[i] = now[0] + times * growth[0], now[1] + times * growth[1]
            else:
                ranges[i] = None
    known |= dict(zip(arguments, ranges, strict=True))
    _visit(body, dict(known), grid, found)
    result = head.partition(" ")[0].partition(":")[0]
    known |= {f"{result}#{i}": value for i, value in enumerate(ranges)}
    known[result] = ranges[0] if ranges else None


def overflows(ttir: str, grid: tuple[int, int, int], numbers: dict[str, int]) -> list[str]:
    """Finds the 32-bit integer operations of a kernel that can overflow in one launch.

    Every integer gets an interval: program ids from the grid, arguments from their value, loop
    indices from the loop's bounds, results from the operands. What a loop carries is followed for
    three iterations and then taken to go on as in the fourth. 32-bit integers in memory are
    positions, up to the argument S. What a branch gives or memory holds in 64 bits has no interval;
    a 32-bit product, address offset or narrowing of such a value is reported.

    Args:
        ttir: the kernel in Triton's first IR, in which all calls are inlined.
        grid, numbers: as in `Launch`.

    Returns:
        The lines of the IR, each with the interval found.
    """
    lines = [line.partition(" loc(")[0].strip() for line in ttir.splitlines()]
    found: list[str] = []
    _visit(lines, {f"%{name}": (n, n) for name, n in numbers.items()}, grid, found)
    return found
