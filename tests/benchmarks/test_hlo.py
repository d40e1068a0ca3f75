"""Reading the text of compiled programs, on small ones in XLA's form."""

import pytest

from benchmarks import hlo

# Three steps. In each: a loop of 10 turns with a kernel, one that the data ends, a fusion, an all-reduce.
LOOPS = """HloModule jit_run, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %copy.1 = f32[8]{0} copy(%v)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %copy.1)
}

%ten (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n.1 = s32[]{:T(128)} constant(10)
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%by_data (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n.2 = s32[] constant(10)
  %lt.2 = pred[] compare(%i.2, %n.2), direction=LT
  %ne = pred[] compare(%i.2, %n.2), direction=NE
  ROOT %and = pred[] and(%lt.2, %ne)
}

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %all-reduce.0 = f32[8]{0} all-reduce(%q), replica_groups={{0,1}}, to_apply=%add
  ROOT %neg = f32[8]{0} negate(%all-reduce.0)
}

%step (p.3: (s32[], f32[8], /*index=2*/bf16[4,2])) -> (s32[], f32[8], bf16[4,2]) {
  %p.3 = (s32[], f32[8]{0}, /*index=2*/bf16[4,2]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %v.3 = f32[8]{0} get-tuple-element(%p.3), index=1
  %b.3 = bf16[4,2]{1,0} get-tuple-element(%p.3), index=2
  %start = (s32[], f32[8]{0}) tuple(%i.3, %v.3)
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%ten, body=%turn
  %while.2 = (s32[], f32[8]{0}) while(%while.1), condition=%by_data, body=%turn
  %v.4 = f32[8]{0} get-tuple-element(%while.2), index=1
  %fusion.1 = f32[8]{0} fusion(%v.4), kind=kLoop, calls=%fused
  %sum.1 = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%fusion.1, /*index=1*/%b.3), replica_groups={{0,1}}, to_apply=%add
  %gather-start = (f32[8]{0}, f32[16]{0}) all-gather-start(%v.4), dimensions={0}
  %gather-done = f32[16]{0} all-gather-done(%gather-start)
  ROOT %t.3 = (s32[], f32[8]{0}, bf16[4,2]{1,0}) tuple(%i.3, %fusion.1, %b.3)
}

%three (p.5: (s32[], f32[8], bf16[4,2])) -> pred[] {
  %p.5 = (s32[], f32[8]{0}, bf16[4,2]{1,0}) parameter(0)
  ROOT %go = pred[] custom-call(%p.5), custom_call_target="Anything"
}

ENTRY %main (a: s32[], b: f32[8], c: bf16[4,2]) -> (s32[], f32[8], bf16[4,2]) {
  %a = s32[] parameter(0)
  %b = f32[8]{0} parameter(1)
  %c = bf16[4,2]{1,0} parameter(2)
  %small = (s32[], f32[8]{0}) tuple(%a, %b)
  %before = (s32[], f32[8]{0}) while(%small), condition=%ten, body=%turn
  %all = (s32[], f32[8]{0}, bf16[4,2]{1,0}) tuple(%a, %b, %c)
  ROOT %while.9 = (s32[], f32[8]{0}, bf16[4,2]{1,0}) while(%all), condition=%three, body=%step, THRICE
}
""".replace("THRICE", 'backend_config={"known_trip_count":{"n":"3"}}')


@pytest.fixture(scope="module")
def loops():
    return hlo.parse(LOOPS)


def program(*lines, before=""):
    """Return a module whose step is one computation."""
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"{before}\nENTRY %main (a: f32[1]) -> f32[1] {{\n{body}\n}}\n")


def last(module):
    """Return the last instruction of the entry, and its computation."""
    around = module.computations[module.entry]
    return list(around.values())[-1], around


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_run {}")


def test_an_instruction_is_read_with_tuples_layouts_and_comments(loops):
    actual = loops.computations["step"]["sum.1"]
    assert (actual.opcode, actual.operands) == ("all-reduce", ("fusion.1", "b.3"))
    assert hlo.arrays(actual.shape) == [("f32", (8,), "{0}"), ("bf16", (4, 2), "{1,0}")]
    tiled, _ = last(program('%x = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%y), metadata={op_name="a(b)"}'))
    assert (tiled.opcode, tiled.operands, hlo.size(tiled.shape)) == ("copy-done", ("y",), 16 * 32 * 2)


@pytest.mark.parametrize(
    "shape, expected",
    [("f32[]", 4), ("pred[3]{0}", 3), ("(s32[2]{0}, u8[5,5]{1,0})", 33), ("s64[2]", 16), ("token[]", 4)],
)
def test_bytes_of_a_shape(shape, expected):
    assert hlo.size(shape) == expected


def test_bytes_outside_of_the_fast_memory():
    shape = "(f32[8]{0:T(128)S(1)}, f32[4]{0:T(128)})"
    assert hlo.size(shape, outside=hlo.FAST_MEMORY) == 16


def test_the_step_is_the_body_of_the_largest_loop(loops):
    assert hlo.step(loops) == "step"
    alone = program("%x = f32[1]{0} parameter(0)")
    assert hlo.step(alone) == "main" and hlo.step_loop(alone) is None


def test_trip_counts_come_from_xla_or_from_a_counter(loops):
    entry, step = loops.computations["main"], loops.computations["step"]
    counts = [hlo.trip_count(loops, each) for each in (entry["while.9"], step["while.1"], step["while.2"])]
    assert counts == [3, 10, None]


def test_loops_that_the_data_end_are_counted(loops):
    assert hlo.dynamic_loops(loops, "step") == 1


def test_a_counter_whose_comparison_is_fused_has_a_trip_count():
    text = LOOPS.replace(
        "%ten (p.1",
        "%less (u: s32[]) -> pred[] {\n  %u = s32[] parameter(0)\n  %n.0 = s32[] constant(7)\n"
        "  ROOT %lt.0 = pred[] compare(%u, %n.0), direction=LT\n}\n\n%ten (p.1",
    ).replace(
        "  %n.1 = s32[]{:T(128)} constant(10)\n  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT",
        "  ROOT %lt.1 = pred[] fusion(%i.1), kind=kLoop, calls=%less",
    )
    module = hlo.parse(text)
    assert hlo.trip_count(module, module.computations["step"]["while.1"]) == 7


def test_kernels_count_as_often_as_their_loop_runs(loops):
    # ten copies, one in the loop that the data end, a fusion, an all-reduce, a gather's start
    assert hlo.kernels(loops, "step") == 10 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(
    "line, counts",
    [
        ("%x = f32[8]{0} add(%a, %b)", True),
        ("%x = s32[] add(%a, %b)", False),
        ("%x = s32[] fusion(%a), kind=kLoop, calls=%f", True),
        ("%x = f32[8]{0} bitcast(%a)", False),
        ("%x = f32[8]{0:S(1)} copy-done(%a)", False),
        ("%x = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%a)", False),
        ('%x = f32[8]{0} custom-call(%a), custom_call_target="ConcatBitcast"', False),
        ('%x = f32[8]{0} custom-call(%a), custom_call_target="__cublas$gemm"', True),
    ],
)
def test_kernels_are_distinguished_from_other_instructions(line, counts):
    assert hlo.is_kernel(last(program(line))[0]) is counts


def test_an_asynchronous_sum_counts_its_operand_once():
    module = program(
        "%a = f32[32]{0} parameter(0)",
        "%start = ((f32[32]{0}), f32[32]{0}) all-reduce-start(%a), replica_groups={{0,1}}, to_apply=%add",
        "%done = f32[32]{0} all-reduce-done(%start)",
    )
    assert hlo.collectives(module, "main") == {"all-reduce": hlo.Moved(1, 128, ("f32",))}


def test_collectives_have_kind_count_bytes_and_types(loops):
    # 8 floats in the fusion; 8 floats and 8 bfloat16s; a gather's 16 floats, of which its start names the operand too
    assert hlo.collectives(loops, "step") == {
        "all-gather": hlo.Moved(1, 64, ("f32",)),
        "all-reduce": hlo.Moved(2, 32 + 32 + 16, ("bf16", "f32")),
    }


@pytest.mark.parametrize(
    "line, count",
    [
        ("%x = (f32[8]{0}, token[]) infeed(%t)", 1),
        ("%x = token[] outfeed(%a, %t), outfeed_shape=f32[8]{0}", 1),
        ('%x = f32[8]{0} custom-call(%a), custom_call_target="xla_ffi_python_gpu_callback"', 1),
        ('%x = f32[8]{0} custom-call(%a), custom_call_target="MoveToHost"', 1),
        ("%x = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%a)", 1),
        ("%x = f32[8]{0} copy(%a)", 0),
        ('%x = f32[8]{0} custom-call(%a), custom_call_target="__cudnn$convForward"', 0),
    ],
)
def test_transfers_from_and_to_the_host(line, count):
    assert hlo.host_transfers(program(line), "main") == count


CONVOLUTIONS = {  # 4 images of 8x8 pixels and 3 channels, 5 channels out, 3x3 taps, stride 1 and padding
    "plain": """
  %a = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[3,3,3,5]{3,2,1,0} parameter(1)
  %c = f32[4,8,8,5]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f""",
    "cuDNN, forward": """
  %a = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[5,3,3,3]{3,2,1,0} parameter(1)
  %c = (f32[4,8,8,5]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), CUDNN"__cudnn$convForward" """,
    "cuDNN, to the input": """
  %a = f32[4,8,8,5]{3,2,1,0} parameter(0)
  %b = f32[5,3,3,3]{3,2,1,0} parameter(1)
  %c = (f32[4,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), CUDNN"__cudnn$convBackwardInput" """,
    "cuDNN, to the kernel": """
  %a = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[4,8,8,5]{3,2,1,0} parameter(1)
  %c = (f32[5,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), CUDNN"__cudnn$convBackwardFilter" """,
    "to the kernel, as a plain convolution": """
  %a = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[4,8,8,5]{3,2,1,0} parameter(1)
  %c = f32[3,3,3,5]{3,2,1,0} convolution(%a, %b), window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf""",
}


CUDNN = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="


PAIRS = (8 * 3 - 2) ** 2  # of pixels that come out and taps that meet no padding


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_operations_of_a_convolution_and_its_gradients(kind):
    module = program(*CONVOLUTIONS[kind].replace("CUDNN", CUDNN).strip().splitlines())
    assert hlo.work(module, *last(module)).operations == 2 * 4 * 3 * 5 * PAIRS


@pytest.mark.parametrize(
    "came, kernel, out, attributes, pairs",  # pairs: along one axis
    [
        (
            "4,8,8,5",
            "3,3,3,5",
            "4,16,16,3",
            "window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2}, dim_labels=b01f_01oi->b01f",
            23,
        ),
        ("4,1,1,3", "8,8,3,5", "4,8,8,5", "window={size=8x8 pad=7_7x7_7}, dim_labels=b01f_01io->b01f", 8),
        ("4,8,8,6", "1,1,3,5", "4,8,8,5", "dim_labels=b01f_01io->b01f, feature_group_count=2", 8),
        ("4,9,9,3", "2,2,3,5", "4,7,7,5", "window={size=2x2 rhs_dilate=2x2}, dim_labels=b01f_01io->b01f", 14),
    ],
    ids=["zeros between pixels", "a map as the kernel", "groups", "taps apart"],
)
def test_operations_with_zeros_do_not_count(came, kernel, out, attributes, pairs):
    module = program(
        f"%a = f32[{came}]{{3,2,1,0}} parameter(0)",
        f"%b = f32[{kernel}]{{3,2,1,0}} parameter(1)",
        f"%c = f32[{out}]{{3,2,1,0}} convolution(%a, %b), {attributes}",
    )
    assert hlo.work(module, *last(module)).operations == 2 * 4 * 3 * 5 * pairs**2


@pytest.mark.parametrize(
    "line",
    [
        "%c = f32[6,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        '%c = (f32[6,2]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}',
    ],
)
def test_operations_of_a_product(line):
    module = program("%a = bf16[6,7]{1,0} parameter(0)", "%b = bf16[7,2]{1,0} parameter(1)", line)
    actual = hlo.work(module, *last(module))
    assert (actual.operations, actual.type) == (2 * 6 * 7 * 2, "bf16")


def test_a_product_in_a_fusion_in_a_fusion_counts():
    inner = """%inner (a: f32[6,7], b: f32[7,2]) -> f32[6,2] {
  %a = f32[6,7]{1,0} parameter(0)
  %b = f32[7,2]{1,0} parameter(1)
  ROOT %c = f32[6,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    outer = """%outer (x: f32[6,7], y: f32[7,2]) -> f32[6,2] {
  %x = f32[6,7]{1,0} parameter(0)
  %y = f32[7,2]{1,0} parameter(1)
  %f = f32[6,2]{1,0} fusion(%x, %y), kind=kOutput, calls=%inner
  ROOT %n = f32[6,2]{1,0} negate(%f)
}
"""
    module = program(
        "%p = f32[6,7]{1,0} parameter(0)",
        "%q = f32[7,2]{1,0} parameter(1)",
        "%r = f32[6,2]{1,0} fusion(%p, %q), kind=kOutput, calls=%outer",
        before=inner + outer,
    )
    assert hlo.work(module, *last(module)).operations == 2 * 6 * 7 * 2


CUTS = """%cuts (p: f32[100,8], i: s32[], q: f32[8]) -> f32[8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[8]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%row)
  ROOT %sum = f32[8]{0} add(%flat, %q)
}
"""


def test_a_fusion_reads_the_part_that_it_cuts_out():
    module = program(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%q = f32[8]{0} parameter(2)",
        "%f = f32[8]{0} fusion(%a, %i, %q), kind=kLoop, calls=%cuts",
        before=CUTS,
    )
    assert hlo.work(module, *last(module)).bytes == 32 + 4 + 32 + 32  # a row, where it is, what is added; the sum


def test_a_fusion_that_changes_a_part_in_place_writes_that_part():
    writes = """%writes (p: f32[100,8], i: s32[], q: f32[1,8]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p, %q, %i, %zero)
}
"""
    module = program(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%q = f32[1,8]{1,0} parameter(2)",
        "%f = f32[100,8]{1,0} fusion(%a, %i, %q), kind=kLoop, calls=%writes",
        before=writes,
    )
    assert hlo.work(module, *last(module)).bytes == 4 + 32 + 32


CHIP = hlo.Chip("made up", {"f32": 1e9, "bf16": 2e9}, 1e6, 1e7, 1000, kernel=1e-6, links=1e6, collective=1e-3)


def test_a_kernels_time_is_bound_by_products_memory_or_a_minimum():
    module = program(
        "%a = f32[1000]{0} parameter(0)",
        "%large = f32[1000]{0} negate(%a)",  # 8,000 bytes at 1e6 a second
        "%b = f32[100]{0} slice(%a), slice={[0:100]}",  # reads all, or so it says: 4,400 bytes
        "%small = f32[100]{0} negate(%b)",  # 800 bytes fit the cache: 1e7 a second
        "%l = f32[1000,1000]{1,0} parameter(1)",
        "%r = f32[1000,1]{1,0} parameter(2)",
        "%one = f32[1]{0} parameter(3)",
        "%least = f32[1]{0} negate(%one)",
    )
    actual = hlo.estimate(module, "main", CHIP, 1)
    assert actual.seconds == pytest.approx(8e-3 + 4.4e-3 + 80e-6 + 1e-6)
    assert (actual.bytes, actual.collectives, actual.cycles) == (8000 + 4400 + 800 + 8, 0, 0)


def test_collectives_take_a_minimum_and_a_share_of_their_bytes(loops):
    actual = hlo.estimate(loops, "step", CHIP, 2)
    assert actual.collectives == pytest.approx(3 * 1e-3 + 2 * 80 / 2 / 1e6 + 64 / 2 / 1e6)
    assert hlo.estimate(loops, "step", CHIP, 1).collectives == 0


def test_xlas_cycles_are_summed_over_loops():
    text = LOOPS.replace("copy(%v)", 'copy(%v), backend_config={"window_config":{"estimated_cycles":"150"}}')
    actual = hlo.estimate(hlo.parse(text), "step", CHIP._replace(clock=1e6), 1)
    assert actual.cycles == pytest.approx((10 + 1) * 150 / 1e6)


def test_convolutions_with_wide_windows_are_found():
    call = '%c{0} = f32[1]{{0}} custom-call(%a), window={{size={0}x{0}}}, custom_call_target="__cudnn$convForward"'
    assert hlo.wide_windows(program(*(call.format(size) for size in (3, 7, 32))), "main") == 1


SUM = "%1 = stablehlo.reduce(%0 init: %cst) applies stablehlo.{op} across dimensions = [{axes}] : "
SUM += "(tensor<{shape}x{kind}>, tensor<{kind}>) -> tensor<16x{kind}>"


@pytest.mark.parametrize(
    "text, count",
    [
        (dict(axes="0, 1, 2", shape="128x32x32x16", kind="bf16"), 1),
        (dict(axes="0, 1, 2", shape="128x32x32x16", kind="f32"), 0),
        (dict(axes="0, 1, 2", shape="128x32x32x16", kind="bf16", op="maximum"), 0),
        (dict(axes="0", shape="128x16", kind="bf16"), 1),
        (dict(axes="1", shape="128x16", kind="bf16"), 0),
        (dict(axes="1, 2, 3", shape="4x128x8x8x16", kind="bf16"), 1),
    ],
)
def test_sums_of_bfloat16_over_a_batch(text, count):
    assert hlo.narrow_sums(SUM.format(**{"op": "add", **text}), 128) == count


def test_scatters_of_lowered_text():
    text = '%1 = "stablehlo.scatter"(%0)\n%2 = "stablehlo.select_and_scatter"(%1)\n%3 = "stablehlo.gather"(%2)\n'
    assert hlo.scatters(text + "%4 = stablehlo.reduce_scatter") == 2


THUNKS = """000: kCommandBuffer [source | next=003 (1)]
    001: kCopy         [source | sink] kCopy
003: kWhile         [prev=000 (1) | sink]
condition:
    004: kCustomKernel [source | sink] loop_and_fusion
  body:
    005: kCustomKernel [source | sink] one
006: kWhile         [prev=003 (1) | sink]
condition:
    007: kCustomKernel [source | sink] compare
  body:
    008: kCommandBuffer [source | next=011 (1)]
        009: kCustomKernel [source | sink] two
        010: kCustomKernel [source | sink] three
    011: kConvolution  [source | sink] cudnn-conv
    012: kWhile         [prev=011 (1) | sink]
    condition:
        013: kCustomKernel [source | sink] compare.1
      body:
        014: kCommandBuffer [source | sink]
            015: kCustomKernel [source | sink] four
        016: kConvolution  [source | sink] cudnn-conv.1
"""
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {number}\n  }}\n'
    f'  thunk_kind: "{kind}"\n}}\n'
    for number, (name, kind) in enumerate(
        [("before", "kWhile"), ("while.9", "kWhile"), ("two", "kCustomKernel"), ("while.1", "kWhile")]
    )
)


def test_launches_of_a_step(loops):
    actual = hlo.launches(loops, THUNKS, METADATA)
    # graphs: one, and one in each of ten turns; alone: a condition, a convolution, and in each turn one of each
    assert actual == hlo.Launches(graphs=1 + 10, nodes=2 + 10, alone=2 + 10 * 2)
    assert actual.all == 33


def test_a_graph_around_the_loop_has_no_launches_in_a_step(loops):
    whole = "000: kCommandBuffer [source | sink]\n" + "".join(f"    {line}\n" for line in THUNKS.splitlines()[2:])
    actual = hlo.launches(loops, whole, METADATA)
    assert (actual.graphs, actual.alone) == (0, 0) and actual.nodes > 0
