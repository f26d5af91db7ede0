"""What collectives send and move: one instruction each, by hand, for 4 devices."""

import pytest

from maxtext_ling2.plan.operations import read_program

pytestmark = pytest.mark.unit

SHARD = 256 * 128 * 4  # of float32
GROUPS = "replica_groups={{0,1,2,3}}"


def program(lines, more="", rows=None):
  text = f"HloModule m\n{more}\nENTRY %main (x: f32[256,128]) -> f32[256,128] {{\n"
  lines = ["%x = f32[256,128]{1,0} parameter(0)", *lines]
  return read_program(text + "".join(f"  {line}\n" for line in lines) + "}\n", rows)


@pytest.mark.parametrize(
  ("lines", "kind", "sent", "memory", "synchronous"),
  [
    ([f"%r = f32[1024,128]{{1,0}} all-gather(%x), {GROUPS}"], "all-gather", 3 * SHARD, 5 * SHARD, True),
    ([f"%r = f32[256,128]{{1,0}} all-reduce(%x), {GROUPS}"], "all-reduce", 1.5 * SHARD, 2 * SHARD, True),
    ([f"%r = f32[64,128]{{1,0}} reduce-scatter(%x), {GROUPS}"], "reduce-scatter", 0.75 * SHARD, 1.25 * SHARD, True),
    ([f"%r = f32[256,128]{{1,0}} all-to-all(%x), {GROUPS}"], "all-to-all", 0.75 * SHARD, 2 * SHARD, True),
    # The result stays on the chip: it is read from the HBM and not written there.
    ([f"%r = f32[1024,128]{{1,0:S(1)}} all-gather(%x), {GROUPS}"], "all-gather", 3 * SHARD, SHARD, True),
    (
      [
        f"%s = (f32[256,128]{{1,0}}, f32[1024,128]{{1,0}}) all-gather-start(%x), {GROUPS}",
        "%r = f32[1024,128]{1,0} all-gather-done(%s)",
      ],
      *("all-gather", 3 * SHARD, 5 * SHARD, False),
    ),
    (
      [f"%s = f32[256,128]{{1,0}} all-reduce-start(%x), {GROUPS}", "%r = f32[256,128]{1,0} all-reduce-done(%s)"],
      *("all-reduce", 1.5 * SHARD, 2 * SHARD, False),
    ),
    (
      [
        "%s = (f32[256,128]{1,0}, f32[256,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)",
        "%r = f32[256,128]{1,0} collective-permute-done(%s)",
      ],
      *("collective-permute", SHARD, 2 * SHARD, False),
    ),
  ],
)
def test_one(lines, kind, sent, memory, synchronous):
  found = program(lines)
  assert found.collectives == {kind: (1, sent)}
  assert found.synchronous_collectives == ({kind: (1, sent)} if synchronous else {})
  assert found.memory == found.collective_memory == memory


def test_no_groups_are_all_devices():
  line = "  %r = f32[2048,128]{1,0} all-gather(%x), replica_groups={}, dimensions={0}"
  head = "HloModule m, replica_count=2, num_partitions=4\n\nENTRY %main (x: f32[256,128]) -> f32[256,128] {\n"
  found = read_program(f"{head}  %x = f32[256,128]{{1,0}} parameter(0)\n{line}\n}}\n")
  assert found.collectives == {"all-gather": (1, 7 * SHARD)}


def test_a_started_computation_runs_beside_others():
  """As XLA wraps a reduce-scatter: the start moves nothing, what it runs counts once."""
  wrapped = f"""
%wrapped (y: f32[256,128]) -> f32[64,128] {{
  %y = f32[256,128]{{1,0}} parameter(0)
  ROOT %rs = f32[64,128]{{1,0}} reduce-scatter(%y), {GROUPS}
}}
"""
  lines = ["%s = ((f32[256,128]), f32[64,128]) async-start(%x), calls=%wrapped", "%r = f32[64,128]{1,0} async-done(%s)"]
  found = program(lines, wrapped)
  assert found.collectives == {"reduce-scatter": (1, 0.75 * SHARD)}
  assert found.synchronous_collectives == {}
  assert found.memory == found.collective_memory == 1.25 * SHARD


@pytest.mark.parametrize(("fusion", "inner"), [("all-reduce-scatter.1", "scatter"), ("fusion.7", "all-reduce-scatter.2")])
def test_a_fused_reduce_scatter(fusion, inner):
  """It has the name of one, or calls what has; the fusion's own operand and result count, once."""
  fused = f"""
%{inner} (y: f32[256,128]) -> f32[64,128] {{
  %y = f32[256,128]{{1,0}} parameter(0)
  %ar = f32[256,128]{{1,0}} all-reduce(%y), {GROUPS}
  ROOT %own = f32[64,128]{{1,0}} slice(%ar), slice={{[0:64], [0:128]}}
}}
"""
  found = program([f"%{fusion} = f32[64,128]{{1,0}} fusion(%x), kind=kCustom, calls=%{inner}"], fused)
  assert found.collectives == found.synchronous_collectives == {"reduce-scatter": (1, 0.75 * SHARD)}
  assert found.collective_memory == 0
  assert found.memory == 1.25 * SHARD


@pytest.mark.parametrize(("rows", "share"), [(None, 1.0), (64.0, 0.25), (1000.0, 1.0)])
def test_a_ragged_exchange_sends_what_is_routed(rows, share):
  """A buffer of 256 rows, of which 64 are routed: three quarters of these leave the device, all are read and written."""
  line = f"%r = f32[256,128]{{1,0}} ragged-all-to-all(%x, %x, %o, %o, %o, %o), {GROUPS}"
  found = program([line], rows=rows)
  assert found.collectives == {"ragged-all-to-all": (1, 0.75 * share * SHARD)}
  assert found.memory == 2 * share * SHARD
