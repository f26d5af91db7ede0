"""The kernels of ops.experts as libtpu writes them (4 experts of 256 x 128, 64 tokens with two choices, on a v5p)."""

import pytest

from maxtext_ling2.plan.bounds import compute_seconds
from maxtext_ling2.plan.chips import CHIPS
from maxtext_ling2.plan.fused_experts import experts_flops
from maxtext_ling2.plan.operations import read_program
from maxtext_ling2.plan.parts import part

pytestmark = pytest.mark.unit

BLOCKS = ["s32[]", *["s32[2,3]{1,0}"] * 5]
ROWS, OF_ROW = "bf16[12,16,256]{2,1,0}", "f32[2,3,1,128]{3,2,1,0}"
MATRICES = ["bf16[4,256,128]{2,1,0}"] * 2 + ["bf16[4,128,256]{2,1,0}"]
FORWARD = (ROWS, [*BLOCKS, ROWS, OF_ROW, *MATRICES], "jit(f)/jvp(experts_forward)/pallas_call")
BACKWARD = (
  f"({ROWS}, {OF_ROW}, {', '.join(MATRICES)})",
  [*BLOCKS, ROWS, ROWS, OF_ROW, *MATRICES],
  "jit(f)/transpose(jvp(experts_backward))/pallas_call",
)
PRODUCT = 2 * 256 * 128  # operations of a row with a matrix


def operation(kernel, routed_rows=None):
  result, operands, name = kernel
  parameters = "".join(f"  %p{i} = {shape} parameter({i})\n" for i, shape in enumerate(operands))
  given = ", ".join(f"%p{i}" for i in range(len(operands)))
  line = (
    f'  ROOT %r = {result} custom-call({given}), custom_call_target="tpu_custom_call", operand_layout_constraints='
    f'{{{", ".join(operands)}}}, frontend_attributes={{kernel_metadata={{}}}}, metadata={{op_name="{name}"}}'
  )
  text = f"HloModule m\nENTRY %main (a: bf16[1]) -> bf16[1] {{\n{parameters}{line}\n}}\n"
  (one,) = (one for one in read_program(text, routed_rows).operations if one.kernel)
  return one


@pytest.mark.parametrize(
  ("kernel", "name", "products"), [(FORWARD, "experts_forward", 3), (BACKWARD, "experts_backward", 8)]
)
def test_operations_and_bytes(kernel, name, products):
  """Of the rows that are routed, at most those of the buffer: 12 tiles of 16."""
  one = operation(kernel, 128)
  assert (one.kernel, one.flops) == (name, products * 128 * PRODUCT)
  assert operation(kernel).flops == operation(kernel, 1000).flops == products * 12 * 16 * PRODUCT
  row_arrays, matrices = {"experts_forward": (2, 3), "experts_backward": (3, 6)}[name]
  of_row = {"experts_forward": 1, "experts_backward": 2}[name] * 2 * 3 * 128 * 4
  expected = row_arrays * 12 * 16 * 256 * 2 + matrices * 4 * 256 * 128 * 2 + of_row + 4 * (1 + 5 * 2 * 3)
  assert one.memory == expected
  assert part(one.name, one.sources) == "other" and part(name + ".1", ()) == "experts"


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_a_kernel_takes_longer_than_its_floor(chip):
  """By the counted ratio, over the longer of operations and bytes; here bytes."""
  one, device = operation(FORWARD, 128), CHIPS[chip]
  floor = max(one.flops / device.flops, one.memory / device.memory_bandwidth)
  assert one.memory / device.memory_bandwidth == floor
  assert compute_seconds(one, device) == device.experts_time_ratio * floor
  assert 1.3 < device.experts_time_ratio < 1.35


def test_another_kernel():
  assert experts_flops("gmm", None, None) is None
