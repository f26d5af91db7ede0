"""Programs that libtpu compiles, small enough to know by hand what they do: 4 v5e chips, or one v5p."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2.plan.operations import read_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts():
  program = Path(__file__).with_name("tpu_programs.py")
  done = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, check=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])  # MaxText prints, too


def flops(program):
  return sum(one.run_count * one.flops for one in program.operations)


def kernel(program):
  (found,) = [one for one in program.operations if one.kernel]
  return found


def test_products_in_a_loop(texts):
  assert flops(read_program(texts["scan"])) == 10 * 2 * 256 * 512 * 512


def test_a_batched_product(texts):
  assert flops(read_program(texts["batched"])) == 16 * 2 * 64 * 128 * 256


def test_the_larger_branch(texts):
  """True, which is 1, has three products."""
  found = read_program(texts["cond"])
  assert flops(found) == 3 * 2 * 1024**3
  assert [one.partition(":")[2] for one in found.assumed] == [
    " branch 1, of 2 the one that moves most, assumed in 100 % of the steps"
  ]


def test_a_gather(texts):
  """Each of 4 sends its quarter of 256 MiB to 3 others, reads it, and writes all, which the compiler then copies."""
  whole = 8192 * 8192 * 4
  found = read_program(texts["gather"])
  assert found.collectives == {"all-gather": (1, whole / 4 * 3)}
  assert found.collective_memory == whole / 4 + whole
  assert found.memory == found.collective_memory + 2 * whole


def test_a_sum(texts):
  piece = 1024 * 4096 * 4
  found = read_program(texts["reduce"])
  assert found.collectives == found.synchronous_collectives == {"all-reduce": (1, 1.5 * piece)}
  assert found.memory == found.collective_memory == 2 * piece


def test_a_scattered_sum(texts):
  """The compiler pads 4096 rows to 4 x 1056, fuses sum and slice, and shifts 96 rows to the next device meanwhile."""
  found = read_program(texts["scatter"])
  assert found.synchronous_collectives == {"reduce-scatter": (1, 0.75 * 4 * 1056 * 1024 * 4)}
  assert found.collectives == found.synchronous_collectives | {"collective-permute": (1, 96 * 1024 * 4)}
  assert found.collective_memory == 0  # those of a fusion are its operands and result


@pytest.mark.parametrize(("routed", "rows"), [(None, 1024), (256.0, 256)])
def test_a_ragged_exchange(texts, routed, rows):
  found = read_program(texts["exchange"], routed)
  assert found.collectives == {"ragged-all-to-all": (1, rows * 512 * 4 * 3 / 4)}
  assert found.collective_memory == 2 * rows * 512 * 4


def test_a_grouped_product(texts):
  """Its tiles stand in the program; its rows are on the chip already, its weights are read at each of 15 visits."""
  found = kernel(read_program(texts["grouped"]))
  product = found.grouped
  assert (found.kernel, product.groups, product.rows, product.k, product.n) == ("gmm", 8, 1024, 512, 256)
  assert (product.tiles, product.visits, product.steps) == ((128, 256, 256), 15, 30)
  assert found.reread == (15 - 8) * 512 * 256 * 2
  assert found.memory - product.bytes_accessed < 200  # the numbers of groups and tiles
  assert found.flops == 2 * 1024 * 512 * 256


def test_fewer_rows_than_the_buffer_holds(texts):
  found = kernel(read_program(texts["grouped"], 512.0))
  assert found.grouped.visits == 4 + 7
  assert found.grouped.bytes_accessed == (11 * 512 * 256 + 512 * 256) * 2


def test_a_gradient_of_weights(texts):
  product = kernel(read_program(texts["grouped_gradient"])).grouped
  assert (product.kernel, product.k, product.n, product.tiles) == ("tgmm", 512, 256, (128, 512, 256))
  assert product.bytes_accessed == 8 * 512 * 256 * 2


def test_the_second_version_copies_transposed_weights(texts):
  """XLA's copy before the kernel: read and written once, besides what the kernel reads."""
  found = read_program(texts["grouped_v2"])
  weights = 8 * 512 * 256 * 2
  assert kernel(found).kernel == "gmm_v2"
  assert [one.memory for one in found.operations if one.name.startswith("copy") and one.memory > weights] == [2 * weights]
  assert kernel(found).reread == 0
