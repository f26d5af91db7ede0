import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gla_closed_form import closed_form, make_case
from gla_suite import GlaSuite, assert_close, jit

from maxtext_ling2.ops.gla import gla
from maxtext_ling2.ops.gla.base import GlaInputs
from maxtext_ling2.ops.gla.block_sizes import chunk_size
from maxtext_ling2.ops.gla.chunked import chunked


class TestChunked(GlaSuite):
  backend = "chunked"
  drift = 3e-6

  @pytest.mark.parametrize("chunk_size", [1, 16, 64, 130, 256])
  def test_the_size_of_the_chunks_does_not_matter(self, chunk_size):
    case = make_case(130, 3, 8, segments=True)
    expected = closed_form(case)
    inputs = GlaInputs(*(jnp.asarray(x) for x in (case.q, case.k, case.v, case.g, case.ids, case.state)))
    o, state = jit(lambda: chunked(chunk_size=chunk_size)(inputs, scale=8**-0.5, output_final_state=True))()
    assert_close({"o": o, "final_state": state}, {n: expected[n] for n in ("o", "final_state")}, 2e-6)

  def test_no_decay_overflows_before_it_is_masked(self):
    # An infinity that a mask hides in the results would show as NaN here; `gla` itself gives g no gradient.
    case = make_case(130, 3, 8)
    q, k, v, state = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.state))

    def total(g):
      inputs = GlaInputs(q, k, v, g, None, state)
      return chunked().forward(inputs, scale=1.0, output_final_state=False, save_residuals=False).o.sum()

    gradient = jit(jax.grad(total))(jnp.float32([-50, -1, -1e-6]))
    assert bool(jnp.isfinite(gradient).all())

  @pytest.mark.parametrize("segments", [False, True], ids=["one_document", "segments"])
  @pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
  def test_memory_is_linear_in_the_length(self, gradient, segments):
    short, long = (temporary_bytes(length, gradient, segments) for length in (1024, 4096))
    assert long <= 4.5 * short
    # A state for every token would be 64 times the input, the scores of all tokens 16 times or more.
    assert long <= 6 * (4 * 4096 * 2 * 64)


def temporary_bytes(length: int, gradient: bool, segments: bool) -> int:
  """What the compiled op needs beside its arguments and results, for q [1, T, 2, 64] float32."""
  x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if segments else None

  def objective(q, k, v, ids):
    o, state = gla(q, k, v, np.float32([-0.1, -0.01]), segment_ids=ids, output_final_state=True, backend="chunked")
    return (o**2).sum() + (state**2).sum()

  function = jax.grad(objective, (0, 1, 2)) if gradient else objective
  return jit(function).lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes


def test_chunks_by_device():
  """No chunk is longer than a row rounded up to 128 tokens."""
  sizes = {
    kind: [chunk_size(length, kind) for length in (1, 130, 4096)] for kind in ("cpu", "NVIDIA H200", "TPU v6 lite")
  }
  assert sizes == {"cpu": [128, 128, 128], "NVIDIA H200": [128, 256, 512], "TPU v6 lite": [128, 256, 256]}
