"""Read the text of a compiled program for `benchmarks.compiled`: optimised HLO, lowered StableHLO, and GPU thunks.

Nothing here starts JAX.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Operations that move no data, or are counted elsewhere: loops in their body, asynchronous operations at their start.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "async-start", "async-update", "domain"),
}
# Custom calls of the TPU's compiler that only name memory.
NAMES_MEMORY = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")
HOST = ("infeed", "outfeed", "send", "recv")
FAST_MEMORY = "S(1)"  # in a layout: the TPU's vector memory; no mark is HBM, S(5) is the host's memory


class Instruction(NamedTuple):
    name: str
    shape: str  # such as "f32[128,64]{1,0}", or a tuple of them
    opcode: str
    operands: tuple[str, ...]  # names
    attributes: str  # the rest of the line; it starts with the value of a constant, or the number of a parameter


Computation = dict[str, Instruction]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parse XLA's text of a module, from `jax.stages.Compiled.as_text()`. Raise ValueError if it has no entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$", line):
            current = computations.setdefault(opened[2], {})
            entry = opened[2] if opened[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if entry not in computations:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = re.sub(r"/\*.*?\*/", "", rest[:end]), rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    if opcode in ("constant", "parameter"):
        return Instruction(match[1], shape, opcode, (), rest[len(opcode) :])
    inside = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1 : end])
    names = tuple(part.split()[-1].lstrip("%") for part in _split(inside))
    return Instruction(match[1], shape, opcode, names, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Find the end of the parenthesis that opens at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Return (type, dimensions, layout) of each array in the text of a shape."""
    matches = re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", shape)
    return [(kind, tuple(int(x) for x in dims.split(",") if x), layout) for kind, dims, layout in matches]


def size(shape: str, *, outside: str = "") -> int:
    """Count the bytes of a shape, without arrays whose layout has the mark `outside`."""
    counted = [(kind, dims) for kind, dims, layout in arrays(shape) if not outside or outside not in layout]
    return sum(BYTES.get(kind, 4) * math.prod(dims) for kind, dims in counted)


def step_loop(module: Module) -> Instruction | None:
    """Return the loop over steps: the entry's largest."""
    loops = [each for each in module.computations[module.entry].values() if each.opcode == "while"]
    return max(loops, key=lambda loop: sum(1 for _ in executed(module, _called(loop, "body"))), default=None)


def step(module: Module) -> str:
    """Return the computation of a step; without a loop over steps, the entry."""
    loop = step_loop(module)
    return module.entry if loop is None else _called(loop, "body")


def _called(instruction: Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


class Executed(NamedTuple):
    """One instruction of a computation, or of a loop, branch or call within it."""

    instruction: Instruction
    computation: Computation  # around it
    times: int  # executions; loops of unknown length count once


def executed(module: Module, name: str, times: int = 1) -> Iterator[Executed]:
    """Yield the instructions of a computation, its loops, branches and calls, but not of its fusions."""
    for each in module.computations[name].values():
        yield Executed(each, module.computations[name], times)
        if each.opcode == "while":
            yield from executed(module, _called(each, "body"), times * (trip_count(module, each) or 1))
        elif each.opcode in ("call", "async-start"):
            inner = _called(each, "to_apply") or _called(each, "calls")
            yield from executed(module, inner, times) if inner in module.computations else ()
        elif each.opcode == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", each.attributes.partition("metadata=")[0]):
                yield from executed(module, branch, times) if branch in module.computations else ()


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Return the iterations of a `while`, from XLA's note or a counter's bound; None if they depend on data."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations.get(_called(loop, "condition"), {})
    within = [part for each in condition.values() for part, _ in _parts(module, each, condition)]
    compares = [each for each in within if each.opcode == "compare"]
    constants = [each for each in within if each.opcode == "constant"]
    bounds = [int(match[1]) for each in constants if (match := re.match(r"\((\d+)\)", each.attributes))]
    if len(compares) == 1 and "direction=LT" in compares[0].attributes and len(bounds) == 1:
        return bounds[0]
    return None


def _inside(module: Module, instruction: Instruction) -> Computation:
    """Return the computation of a fusion; {} for other instructions."""
    if instruction.opcode != "fusion":
        return {}
    return module.computations.get(_called(instruction, "calls"), {})


def _parts(
    module: Module, instruction: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation]]:
    """Yield an instruction and, recursively, all instructions of a fusion, each with the computation around it."""
    yield instruction, computation
    inside = _inside(module, instruction)
    for each in inside.values():
        yield from _parts(module, each, inside)


class Moved(NamedTuple):
    """The collectives of one kind."""

    count: int
    size: int  # bytes that each device sends; of a gather, bytes that it has afterwards
    types: tuple[str, ...]


def collectives(module: Module, name: str) -> dict[str, Moved]:
    """Return {kind: bytes and types} of all collectives of a computation, also in fusions."""
    count: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    types: dict[str, set[str]] = {}
    for each, computation, times in executed(module, name):
        for part, within in _parts(module, each, computation):
            kind = part.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                given = _operands(part, within)
                # the shape of an asynchronous gather includes its operand
                gathered = size(part.shape) - (size(given) if part.opcode != kind else 0)
                count[kind] += times
                moved[kind] += times * (gathered if kind == "all-gather" else size(given))
                types.setdefault(kind, set()).update(array[0] for array in arrays(given))
    return {kind: Moved(count[kind], moved[kind], tuple(sorted(types[kind]))) for kind in sorted(count)}


def _operands(instruction: Instruction, computation: Computation) -> str:
    return ", ".join(computation[name].shape for name in instruction.operands if name in computation)


def is_kernel(instruction: Instruction) -> bool:
    """Return whether an instruction outside of fusions is a kernel.

    Not counted are scalars, which a TPU computes in parallel to its vectors, copies between its memories, and the ends
    of asynchronous operations.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith("-done") or instruction.opcode == "copy-start":
        return False
    if instruction.opcode == "custom-call" and any(name in instruction.attributes for name in NAMES_MEMORY):
        return False
    return instruction.opcode in ("fusion", "custom-call") or any(dims for _, dims, _ in arrays(instruction.shape))


def kernels(module: Module, name: str) -> int:
    return sum(times for each, _, times in executed(module, name) if is_kernel(each))


def host_transfers(module: Module, name: str) -> int:
    """Count transfers from or to the host, and callbacks, in a computation."""

    def counts(each: Instruction) -> bool:
        calls = each.opcode == "custom-call" and re.search(r'target="[^"]*(callback|Host)', each.attributes)
        moves = each.opcode in ("copy-start", "copy", "slice-start") and "S(5)" in each.shape
        return each.opcode.removesuffix("-done") in HOST or bool(calls or moves)

    return sum(times for each, _, times in executed(module, name) if counts(each))


def dynamic_loops(module: Module, name: str) -> int:
    """Count loops whose length depends on data: a GPU's host waits for each of their iterations."""
    loops = [each for each, _, _ in executed(module, name) if each.opcode == "while"]
    return sum(trip_count(module, each) is None for each in loops)


def wide_windows(module: Module, name: str, least: int = 8) -> int:
    """Count convolutions with a kernel of `least` pixels or more: weight gradients as forward convolutions."""

    def wide(each: Instruction) -> bool:
        match = re.search(r"window=\{size=([\dx]+)", each.attributes)
        return match is not None and max(map(int, match[1].split("x"))) >= least

    return sum(times for each, _, times in executed(module, name) if each.opcode == "custom-call" and wide(each))


# Operations and bytes


class Work(NamedTuple):
    operations: float
    bytes: float  # read from and written to the device's memory
    type: str  # of the products: "bf16", or "f32" for all others


def work(module: Module, instruction: Instruction, computation: Computation) -> Work:
    """Count the work of one instruction outside of fusions, with all instructions of a fusion."""
    inside = _inside(module, instruction)
    parts = list(_parts(module, instruction, computation))
    counts = [_products(each, within) for each, within in parts]
    factors = [_operands(each, within) for count, (each, within) in zip(counts, parts, strict=True) if count]
    narrow = any(kind == "bf16" for shapes in factors for kind, _, _ in arrays(shapes))
    given = [(number, computation[name]) for number, name in enumerate(instruction.operands) if name in computation]
    moved = sum(_read(inside, *each) for each in given) + _written(instruction, inside)
    return Work(sum(counts), moved, "bf16" if narrow else "f32")


def _read(inside: Computation, number: int, operand: Instruction) -> float:
    """Count the bytes read of operand `number`; if a fusion only slices it, those of the slices."""
    whole = size(operand.shape, outside=FAST_MEMORY)
    parameters = [each for each in inside.values() if each.opcode == "parameter"]
    names = [each.name for each in parameters if each.attributes.startswith(f"({number})")]
    users = [each for each in inside.values() if names and names[0] in each.operands]
    cuts = ("dynamic-slice", "gather", "slice", "dynamic-update-slice")
    if users and all(each.opcode in cuts and each.operands[0] == names[0] for each in users):
        return min(whole, sum(size(each.shape) for each in users if each.opcode != "dynamic-update-slice"))
    return whole


def _written(instruction: Instruction, inside: Computation) -> float:
    """Count the bytes of the result; if it is changed in place, those of the change."""
    whole = size(instruction.shape, outside=FAST_MEMORY)
    changes = [each for each in inside.values() if each.opcode == "dynamic-update-slice"]
    if len(changes) == 1 and changes[0].operands[1] in inside and size(changes[0].shape) >= whole:
        return min(whole, size(inside[changes[0].operands[1]].shape))
    return whole


def _products(instruction: Instruction, computation: Computation) -> float:
    """Count operations of a convolution or a matrix product, without products with zeros; 0 for all others."""
    given = [computation[name] for name in instruction.operands if name in computation]
    text, results = instruction.attributes, arrays(instruction.shape)
    if len(given) < 2 or not results:
        return 0.0
    left, right, out = (arrays(shape)[0][1] for shape in (given[0].shape, given[1].shape, instruction.shape))
    if instruction.opcode == "convolution" or "__cudnn$conv" in text:
        # cuDNN's gradients have the labels of the forward convolution, so put operands and result in its order
        if "convBackwardFilter" in text:
            return _convolution(left, out, right, text)
        if "convBackwardInput" in text:
            return _convolution(out, right, left, text)
        return _convolution(left, right, out, text)
    summed = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]"?([\d",]*)', text)
    if summed and (instruction.opcode == "dot" or "__cublas" in text):
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", summed[1]))
    return 0.0


def _convolution(x: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...], text: str) -> float:
    """Count operations of a convolution with attributes `text`, without padding and zeros between pixels."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None
    of_x, of_kernel, of_out = (part.index for part in labels.groups())
    axes = sum(letter.isdigit() for letter in labels[1])
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def along(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * axes

    pairs = 1  # of an output pixel and a tap on an input pixel
    numbers = zip(*(along(name, "1") for name in ("size", "stride", "lhs_dilate", "rhs_dilate")), strict=True)
    for axis, ((taps, stride, apart, spread), pad) in enumerate(zip(numbers, along("pad", "0_0"), strict=True)):
        last, before = (x[of_x(str(axis))] - 1) * int(apart), int(pad.split("_")[0])
        starts = [place * int(stride) - before for place in range(out[of_out(str(axis))])]
        meets = [start + tap * int(spread) for start in starts for tap in range(int(taps))]
        pairs *= sum(0 <= place <= last and place % int(apart) == 0 for place in meets)
    return 2.0 * pairs * out[of_out("b")] * out[of_out("f")] * kernel[of_kernel("i")]


class Chip(NamedTuple):
    """A chip by its vendor's specification."""

    name: str
    products: Mapping[str, float]  # operations a second of products, by type, with JAX's default precision
    memory: float  # bytes a second
    cache: float  # bytes a second, for data that fits there
    cache_size: int
    kernel: float  # minimum seconds of a kernel: our assumption
    links: float  # bytes a second from a chip to all others
    collective: float  # minimum seconds of a collective: our assumption
    clock: float = 0.0  # Hz, for XLA's estimated cycles


H100 = Chip("H100", {"f32": 494.7e12, "bf16": 989.4e12}, 3.35e12, 5.5e12, 30_000_000, 2e-6, 450e9, 12e-6)
# float32 in one pass of bfloat16; two of four links, as at the corner of eight chips
V5E = Chip("TPU v5e", {"f32": 197e12, "bf16": 197e12}, 819e9, 819e9, 0, 0.0, 90e9, 5e-6, 1.5e9)


class Estimate(NamedTuple):
    """Estimates for one run of a computation on one device."""

    operations: float
    bytes: float
    seconds: float  # a lower bound: each kernel at the chip's peak, at its memory's bandwidth, or its minimum
    collectives: float  # their part of `seconds`
    cycles: float  # seconds by XLA's estimate, with those of the collectives; 0 without one (GPU)


def estimate(module: Module, name: str, chip: Chip, devices: int) -> Estimate:
    operations = moved = busy = cycles = 0.0
    for each, computation, times in executed(module, name):
        if match := re.search(r'estimated_cycles":"(\d+)"', each.attributes):
            cycles += times * int(match[1])
        if each.opcode == "copy-start":  # between the memories of a TPU, in parallel to kernels
            moved += times * size(each.shape.rpartition(", ")[0], outside=FAST_MEMORY)
        elif is_kernel(each) and each.opcode.removesuffix("-start") not in COLLECTIVES:
            done = work(module, each, computation)
            speed = chip.cache if done.bytes <= chip.cache_size else chip.memory
            busy += times * max(done.operations / chip.products[done.type], done.bytes / speed, chip.kernel)
            operations += times * done.operations
            moved += times * done.bytes
    shares = {"all-reduce": 2.0}  # there and back
    sums = collectives(module, name) if devices > 1 else {}
    among = sum(
        each.count * chip.collective + shares.get(kind, 1.0) * each.size * (devices - 1) / devices / chip.links
        for kind, each in sums.items()
    )
    busy = max(busy, moved / chip.memory) if chip.clock else busy
    return Estimate(operations, moved, busy + among, among, cycles / chip.clock + among if cycles else 0.0)


# Lowered StableHLO


def narrow_sums(stablehlo: str, least: int) -> int:
    """Count sums of bfloat16 over `least` numbers or more: eight bits are too few for them."""
    pattern = r"stablehlo\.reduce\(.*applies stablehlo\.add across dimensions = \[([\d, ]*)\] : \(tensor<([\dx]+)xbf16>"
    count = 0
    for axes, shape in re.findall(pattern, stablehlo):
        dims = [int(x) for x in shape.split("x")]
        count += math.prod(dims[int(axis)] for axis in axes.split(",")) >= least
    return count


def scatters(stablehlo: str) -> int:
    """Count scatters, which accelerators apply sequentially, or in any order."""
    return len(re.findall(r"\bstablehlo\.(?:scatter|select_and_scatter)\b", stablehlo))


# Thunks: the launches of a GPU's host, in order


class Launches(NamedTuple):
    """The launches of one step."""

    graphs: int  # CUDA graphs
    nodes: int  # kernels and copies in them
    alone: int  # kernels and copies outside of graphs

    @property
    def all(self) -> int:
        return self.graphs + self.alone


def launches(module: Module, thunks: str, metadata: str) -> Launches:
    """Count the host's launches for a step, from XLA's dumps `thunk_sequence_after_thunk_passes` and `thunk_metadata`.

    The second dump names the loops of the first.
    """
    loops = re.findall(r'profile_annotation: "([^"]*)"[^{}]*\}\s*thunk_kind: "kWhile"', metadata)
    known = {each.name: each for computation in module.computations.values() for each in computation.values()}
    steps = step_loop(module)
    graphs = nodes = alone = seen = 0
    around: list[tuple[int, str, int]] = []  # (indentation, kind, executions; 0 outside of the steps)
    for line in thunks.splitlines():
        match = re.match(r"(\s*)\d+: (k\w+)", line)
        if not match:
            continue
        indentation, kind = len(match[1]), match[2]
        around = [each for each in around if each[0] < indentation]
        times = around[-1][2] if around else int(steps is None)
        if kind == "kWhile":
            loop, seen = known[loops[seen]], seen + 1
            around.append((indentation, kind, 1 if loop is steps else times * (trip_count(module, loop) or 1)))
            continue
        inside = any(each[1] == "kCommandBuffer" for each in around)
        if kind == "kCommandBuffer":
            graphs += times * (not inside)
        elif kind not in ("kConditional", "kSequential"):
            nodes += times * inside
            alone += times * (not inside)
        around.append((indentation, kind, times))
    return Launches(graphs, nodes, alone)
