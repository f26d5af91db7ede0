"""Operations of products as a TPU writes them: convolutions, batched ones too, fused, in loops."""

import pytest

from maxtext_ling2.plan.operations import read_program

pytestmark = pytest.mark.unit


def total(line, shapes, dtype="bf16"):
  parameters = [f"  %p{i} = {dtype}[{shape}] parameter({i})\n" for i, shape in enumerate(shapes)]
  found = read_program(
    f"HloModule m\nENTRY %main (a: bf16[1]) -> bf16[1] {{\n{''.join(parameters)}  ROOT %r = {line}\n}}\n"
  )
  return sum(one.run_count * one.flops for one in found.operations)


def test_a_plain_product():
  line = "bf16[4096,512]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf"
  assert total(line, ["4096,2048", "2048,512"]) == 2 * 4096 * 2048 * 512


def test_transposed_operands():
  line = "bf16[2048,512]{1,0} convolution(%p0, %p1), dim_labels=fb_io->bf"
  assert total(line, ["4096,2048", "4096,512"]) == 2 * 4096 * 2048 * 512


def test_a_batched_product():
  """16 products of [64,128] by [128,256]: a convolution whose window of 16 meets one number at each position."""
  line = "bf16[16,64,256]{2,1,0} convolution(%p0, %p1), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf"
  assert total(line, ["16,64,128", "16,128,256"]) == 2 * 16 * 64 * 128 * 256


def test_a_convolution_over_a_sequence():
  """A window of 4 over 10 positions, padded by 3 on the left: 3 positions miss 3, 2, 1 of the window."""
  line = "bf16[2,10,32]{2,1,0} convolution(%p0, %p1), window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f"
  assert total(line, ["2,10,8", "4,8,32"]) == 2 * 2 * 8 * 32 * (10 * 4 - (3 + 2 + 1))


@pytest.mark.parametrize("contracted", ["1", "0"])
def test_a_dot(contracted):
  left = "256,512" if contracted == "1" else "512,256"
  line = f"f32[256,128]{{1,0}} dot(%p0, %p1), lhs_contracting_dims={{{contracted}}}, rhs_contracting_dims={{0}}"
  assert total(line, [left, "512,128"]) == 2 * 256 * 512 * 128


@pytest.mark.parametrize(
  ("dtype", "precision", "passes"), [("f32", "highest", 6), ("f32", "high", 3), ("bf16", "highest", 1)]
)
def test_passes_of_a_precise_product(dtype, precision, passes):
  line = (
    f"f32[4096,256]{{1,0}} convolution(%p0, %p1), dim_labels=bf_io->bf, operand_precision={{{precision},{precision}}}"
  )
  assert total(line, ["4096,2048", "2048,256"], dtype) == passes * 2 * 4096 * 2048 * 256
