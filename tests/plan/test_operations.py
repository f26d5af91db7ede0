"""Operations of a compiled program: by hand on written text, and on a program compiled here."""

import math

import pytest

from maxtext_ling2.plan.operations import read_program
from maxtext_ling2.plan.parts import COLLECTIVES, memory_by

pytestmark = pytest.mark.unit

# A loop of 3 trips that reads a slice of [3,8,128] f32 and adds it to [8,128]; a gather among 4; a reduce-scatter that
# the TPU compiler writes as a fused all-reduce; a result in the chip's own memory, S(1); a Pallas kernel in the loop; an
# all-gather and a gather of rows that the sparse cores do; a slice and an array fetched into the chip's memory, and an
# array copied within the HBM.
TEXT = """HloModule m

%sliced (p0: f32[3,8,128], p1: f32[8,128], p2: s32[]) -> f32[8,128] {
  %p0 = f32[3,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %ds = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p2), dynamic_slice_sizes={1,8,128}
  %b = f32[8,128]{1,0:T(8,128)} bitcast(%ds)
  ROOT %a = f32[8,128]{1,0:T(8,128)} add(%b, %p1)
}

%body (t: (s32[], f32[8,128], f32[3,8,128])) -> (s32[], f32[8,128], f32[3,8,128]) {
  %t = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%t), index=1
  %w = f32[3,8,128]{2,1,0} get-tuple-element(%t), index=2
  %y = f32[8,128]{1,0:T(8,128)} fusion(%w, %x, %i), kind=kLoop, calls=%sliced
  %k = f32[8,128]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/gla/pallas_call"}
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %r = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) tuple(%next, %k, %w)
}

%condition (t.1: (s32[], f32[8,128], f32[3,8,128])) -> pred[] {
  %c = s32[]{:T(128)} constant(3), metadata={op_name="while"}
  %t.1 = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%i.1, %c), direction=LT
}

%scatter (q: f32[8,128]) -> f32[2,128] {
  %q = f32[8,128]{1,0} parameter(0)
  %ar = f32[8,128]{1,0} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[2,128]{1,0} slice(%ar), slice={[0:2], [0:128]}
}

%offloaded (s: f32[8,128]) -> f32[32,128] {
  %s = f32[8,128]{1,0} parameter(0)
  ROOT %ag.1 = f32[32,128]{1,0} all-gather(%s), replica_groups=mesh['f'=4] {'f'}, dimensions={0}
}, execution_thread="sparsecore"

%picked (table: f32[4096,128], rows: s32[8,1]) -> f32[8,128] {
  %table = f32[4096,128]{1,0} parameter(0)
  %rows = s32[8,1]{1,0} parameter(1)
  ROOT %g = f32[8,128]{1,0} gather(%table, %rows), offset_dims={1}, slice_sizes={1,128}
}

%offloaded.1 (table.1: f32[4096,128], rows.1: s32[8,1]) -> f32[8,128] {
  %table.1 = f32[4096,128]{1,0} parameter(0)
  %rows.1 = s32[8,1]{1,0} parameter(1)
  ROOT %gather_fusion = f32[8,128]{1,0} fusion(%table.1, %rows.1), kind=kCustom, calls=%picked
}, execution_thread="sparsecore"

ENTRY %main (a0: f32[8,128], w0: f32[3,8,128]) -> f32[32,128] {
  %a0 = f32[8,128]{1,0} parameter(0)
  %w0 = f32[3,8,128]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %in = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) tuple(%zero, %a0, %w0)
  %loop = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) while(%in), condition=%condition, body=%body
  %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %own.1 = f32[8,128]{1,0:T(8,128)S(1)} negate(%out)
  %all-reduce-scatter.1 = f32[2,128]{1,0} fusion(%own.1), kind=kCustom, calls=%scatter
  %start = ((), (), (s32[4])) custom-call-start(), async_execution_thread="sparsecore", called_computations={%offloaded}
  %update = ((f32[8,128]{1,0}), f32[32,128]{1,0}, (s32[4])) custom-call-update(%start, %out)
  %all = f32[32,128]{1,0} custom-call-done(%update)
  %big = f32[4096,128]{1,0} constant(0)
  %ids = s32[8,1]{1,0} constant(0)
  %gs = ((f32[4096,128]{1,0}, s32[8,1]{1,0}), f32[8,128]{1,0}, u32[]{:S(8)}) call-start(%big, %ids), to_apply=%offloaded.1
  %gd = f32[8,128]{1,0} call-done(%gs)
  %ss = ((f32[4096,128]{1,0}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%big), slice={[0:8], [0:128]}
  %sd = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%ss)
  %in.1 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%gd)
  %in.2 = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%in.1)
  %cs = (f32[8,128]{0,1}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%gd)
  %cd = f32[8,128]{0,1} copy-done(%cs)
  %half = bf16[8,128]{1,0} convert(%out)
  ROOT %ag = bf16[32,128]{1,0} all-gather(%half), replica_groups=mesh['d'=2,'f'=4,'t'=1] {'f','t'}, dimensions={0}
}
"""
ARRAY = 8 * 128 * 4
KERNEL = 2 * ARRAY
ROUND = 3 * ARRAY + 9 + KERNEL  # a slice, the sum so far, the new sum; the condition's numbers and bit


def test_by_hand():
  found = read_program(TEXT)
  loop = 3 * ROUND
  others = ARRAY + ARRAY // 4 + (ARRAY + ARRAY // 2)  # negate reads; the scatter writes; convert
  copies = (2 * ARRAY + 8 * 4) + ARRAY + ARRAY + 2 * ARRAY  # rows and their numbers; a slice, an array fetched; a copy
  gathers = (ARRAY + 4 * ARRAY) + (ARRAY // 2 + 2 * ARRAY)  # each reads its piece and writes all; the scatter is a fusion
  assert found.collective_memory == gathers
  assert found.memory == loop + others + copies + gathers
  assert found.collectives == {
    "all-gather": (2, ARRAY * 3 + ARRAY / 2 * 3),
    "reduce-scatter": (1, ARRAY * 3 / 4),
  }
  assert found.synchronous_collectives == {
    "all-gather": (1, ARRAY / 2 * 3),  # the other one runs on the sparse cores
    "reduce-scatter": (1, ARRAY * 3 / 4),
  }
  assert found.kernels == {"gla": (3, 3 * KERNEL)}
  assert found.unknown_loops == 0
  assert found.assumed == ("kernels of which nothing but the bytes is known: gla",)


SOURCES = """HloModule m

FileNames
1 "/a/train.py"
2 "/a/layer.py"

FunctionNames
1 "step"
2 "Layer.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=0 end_column=1}
2 {file_name_id=2 function_name_id=2 line=5 end_line=5 column=0 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
"""


def test_by_source():
  """Frame 2 was called from frame 1; all parts together are all the bytes."""
  text = TEXT.replace("HloModule m\n", SOURCES).replace("negate(%out)", "negate(%out), metadata={stack_frame_id=2}")
  seen = {}

  def part(name, sources):
    seen[name] = tuple(sources)
    return "layer" if any(source == "/a/layer.py:Layer.__call__" for source in sources) else "rest"

  program = read_program(text)
  found = memory_by(program.operations, part)
  sent = program.collective_memory + ARRAY // 4  # the scatter is one, too: it reads what is on the chip, and writes
  assert found == {"rest": program.memory - ARRAY - sent, "layer": ARRAY, COLLECTIVES: sent}
  assert seen["own.1"] == ("/a/layer.py:Layer.__call__", "/a/train.py:step") and seen["half"] == ()


def test_a_loop_of_unknown_length_is_counted_once():
  found = read_program(TEXT.replace("compare(%i.1, %c), direction=LT", "compare(%i.1, %c), direction=NE"))
  assert found.unknown_loops == 1
  assert found.memory == pytest.approx(read_program(TEXT).memory - 2 * ROUND)


@pytest.mark.parametrize(("start", "step", "trips"), [(0, 1, 3), (0, 2, 2), (1, 1, 2), (1, 2, 1), (0, 4, 1)])
def test_rounds_of_a_loop_follow_its_counter(start, step, trips):
  """XLA unrolls its windowed einsums: their counters grow by 2."""
  text = TEXT.replace("%zero = s32[] constant(0)", f"%zero = s32[] constant({start})")
  text = text.replace("%one = s32[]{:T(128)S(6)} constant(1)", f"%one = s32[]{{:T(128)S(6)}} constant({step})")
  found = read_program(text)
  assert (found.unknown_loops, found.kernels["gla"]) == (0, (trips, trips * KERNEL))


# A conditional whose branch 0 doubles [8,128] and whose branch 1 adds it to itself and writes 16 rows.
CONDITIONAL = """HloModule m

%capped (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %d = f32[8,128]{1,0} negate(%x)
}

%dropless (x.1: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0} parameter(0)
  %more = f32[16,128]{1,0} pad(%x.1)
  ROOT %s = f32[8,128]{1,0} slice(%more), slice={[0:8], [0:128]}
}

ENTRY %main (i: s32[], p: f32[8,128]) -> f32[8,128] {
  %i = s32[] parameter(0)
  %p = f32[8,128]{1,0} parameter(1)
  ROOT %c = f32[8,128]{1,0} conditional(%i, %p, %p), BRANCHES, metadata={op_name="cond" stack_frame_id=2}
}
"""
INDEXED = "branch_computations={%capped, %dropless}"
TRUTH = "true_computation=%dropless, false_computation=%capped"


@pytest.mark.parametrize("file", ["/m/layers/moe.py", "/p/model/fused_experts.py"])
@pytest.mark.parametrize("branches", [INDEXED, TRUTH])
def test_the_capped_path_of_the_experts_counts(branches, file):
  """cond(overflow, dropless, capped), MaxText's and ours: false, which is 0, is the capped one."""
  sources = SOURCES.replace("/a/layer.py", file)
  found = read_program(CONDITIONAL.replace("BRANCHES", branches).replace("HloModule m\n", sources))
  assert found.memory == 2 * ARRAY
  assert found.assumed == ("conditional c: branch 0, the capped path, assumed in 100 % of the steps",)


ATTENTION = ", ".join(
  f"{array}{{2,1,0}}"
  for array in ("s8[1,4,4]", "s8[1,4,4]", "bf16[2,4,2048,192]", "bf16[2,4,KEYS,192]", "bf16[2,4,KEYS,128]")
)
SPLASH = f"""HloModule m

ENTRY %main (q: bf16[2,4,2048,192]) -> bf16[2,4,2048,128] {{
  %q = bf16[2,4,2048,192]{{3,2,1,0}} parameter(0)
  ROOT %s = bf16[2,4,2048,128]{{3,2,1,0}} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", \
operand_layout_constraints={{{ATTENTION}}}, metadata={{op_name="jit(step)/KERNEL/pallas_call"}}
}}
"""


@pytest.mark.parametrize(
  ("kernel", "widths"),
  [
    ("splash_mha_fwd_segmented_residuals", 192 + 128),
    ("splash_mha_dq_segmented_no_residuals", 2 * 192 + 128),
    ("splash_mha_dkv_segmented_no_residuals", 2 * 192 + 2 * 128),
  ],
)
def test_kernels_of_splash_attention(kernel, widths):
  """4 x 4 blocks of 512: the lower triangle's 10; with a part of the queries, all."""
  for keys, blocks in ((2048, 10 * 512 * 512), (4096, 16 * 512 * 1024)):
    found = read_program(SPLASH.replace("KERNEL", kernel).replace("KEYS", str(keys)))
    assert [one.flops for one in found.operations] == [2 * 2 * 4 * blocks * widths]
    assert found.assumed == ()
    one_row = read_program(SPLASH.replace("KERNEL", kernel).replace("KEYS", str(keys)).replace("bf16[2,4,", "bf16[4,"))
    assert [one.flops for one in one_row.operations] == [2 * 4 * blocks * widths]


def test_a_kernel_that_states_nothing_is_named():
  found = read_program(SPLASH.replace("KERNEL", "mine").replace("KEYS", "2048"))
  assert found.assumed == ("kernels of which nothing but the bytes is known: mine",)


def test_room_is_no_write():
  """What others write into it counts there."""
  text = CONDITIONAL.replace("negate(%x)", 'custom-call(), custom_call_target="AllocateBuffer"').replace(
    "BRANCHES", INDEXED
  )
  sources = SOURCES.replace("/a/layer.py", "/m/layers/moe.py")
  assert read_program(text.replace("HloModule m\n", sources)).memory == 0


@pytest.mark.parametrize("branches", [INDEXED, TRUTH])
def test_of_another_conditional_the_larger_branch_counts(branches):
  found = read_program(CONDITIONAL.replace("BRANCHES", branches))
  assert found.memory == (ARRAY + 2 * ARRAY) + 2 * ARRAY  # pad reads and writes, of the slice the slice counts twice
  assert found.assumed == ("conditional c: branch 1, of 2 the one that moves most, assumed in 100 % of the steps",)


def test_against_xla_on_a_program_without_loops():
  """XLA's own count of the bytes and operations of a matrix product, and of a batched one."""
  import jax
  import jax.numpy as jnp

  x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
  y = jax.ShapeDtypeStruct((4, 64, 128), jnp.float32)
  for function, shape, products in (
    (lambda a, b: a @ b.T, x, 256 * 256 * 512),
    (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), y, 4 * 64 * 64 * 128),
  ):
    compiled = jax.jit(function).lower(shape, shape).compile()
    found, costs = read_program(compiled.as_text()), compiled.cost_analysis()
    assert found.memory == pytest.approx(costs["bytes accessed"], rel=0.01)
    assert math.fsum(one.flops for one in found.operations) == costs["flops"] == 2 * products
