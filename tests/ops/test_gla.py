import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

pytest.register_assert_rewrite("gla_suite")

from gla_closed_form import closed_form, make_case  # noqa: E402
from gla_suite import GlaSuite, assert_close, error, jit, run  # noqa: E402

from maxtext_ling2.ops.gla import gla  # noqa: E402
from maxtext_ling2.ops.gla.chunked import in_chunks_of  # noqa: E402


class TestReference(GlaSuite):
  backend = "reference"
  drift = 2048 * 2.0**-24  # a decay close to 1 is rounded by half an ulp, the same way at every token


class TestChunked(GlaSuite):
  backend = "chunked"
  drift = 3e-6

  @pytest.mark.parametrize("chunk_size", [1, 16, 64, 130, 256])
  def test_the_size_of_the_chunks_does_not_matter(self, chunk_size):
    case = make_case(130, 3, 8, segments=True)
    expected = closed_form(case)
    args = [jnp.asarray(x) for x in (case.q, case.k, case.v, case.g)]
    options = {"segment_ids": jnp.asarray(case.ids), "initial_state": jnp.asarray(case.state), "scale": 8**-0.5}
    o, state = jit(lambda: in_chunks_of(chunk_size)(*args, **options, final=True))()
    assert_close({"o": o, "final_state": state}, {n: expected[n] for n in ("o", "final_state")}, 2e-6)

  def test_no_decay_overflows_before_it_is_masked(self):
    # An infinity that a mask hides in the results would show as NaN here; `gla` itself gives g no gradient.
    case = make_case(130, 3, 8)
    q, k, v, state = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.state))

    def total(g):
      return in_chunks_of(None).forward(q, k, v, g, None, state, scale=1.0, final=False, save=False)[0].sum()

    gradient = jit(jax.grad(total))(jnp.float32([-50, -1, -1e-6]))
    assert bool(jnp.isfinite(gradient).all())

  @pytest.mark.parametrize("segments", [False, True], ids=["one_document", "segments"])
  @pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
  def test_memory_is_linear_in_the_length(self, gradient, segments):
    short, long = (temporary_bytes(length, gradient, segments) for length in (1024, 4096))
    assert long <= 4.5 * short
    # A state for every token would be 64 times the input, the scores of all tokens 16 times or more.
    assert long <= 6 * (4 * 4096 * 2 * 64)


class TestPallas(GlaSuite):
  """The kernels on the CPU, in an interpreter that knows the TPU's memories and looks for races."""

  backend = "pallas"
  drift = 3e-6

  @pytest.fixture(autouse=True)
  def _interpreted(self):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
      yield
    assert not interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def temporary_bytes(length: int, gradient: bool, segments: bool) -> int:
  """What the compiled op needs beside its arguments and results, for q [1, T, 2, 64] float32."""
  x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if segments else None

  def objective(q, k, v, ids):
    o, state = gla(q, k, v, np.float32([-0.1, -0.01]), segment_ids=ids, output_final_state=True, backend="chunked")
    return (o**2).sum() + (state**2).sum()

  function = jax.grad(objective, (0, 1, 2)) if gradient else objective
  return jit(function).lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes


def test_auto_is_chunked():
  case = make_case(140, 3, 8)
  auto, expected, reference = (
    run(case.q, case.k, case.v, case.g, backend=backend)[0] for backend in ("auto", "chunked", "reference")
  )
  np.testing.assert_array_equal(auto, expected)
  assert 0 < error(auto, reference) <= 2e-6


def test_an_unknown_backend_is_named_with_the_choices():
  case = make_case(4, 3, 8)
  with pytest.raises(ValueError, match="backend is 'triton', expected one of 'auto', 'reference', 'chunked', 'pallas'"):
    gla(case.q, case.k, case.v, case.g, backend="triton")


Q = np.zeros((2, 5, 4, 8), np.float32)
WRONG = [
  ({"q": Q[0]}, r"q has shape \(5, 4, 8\), expected 4 dimensions \[B, T, H, D\]"),
  ({"q": Q[:, :0]}, r"q has shape \(2, 0, 4, 8\), expected 4 dimensions \[B, T, H, D\], none of size 0"),
  ({"q": Q.astype(np.float16)}, "q has dtype float16, expected float32 or bfloat16"),
  ({"k": Q[:, :, :3]}, r"k has shape \(2, 5, 3, 8\), expected \(2, 5, 4, 8\), because q is \(2, 5, 4, 8\)"),
  ({"k": Q.astype(np.int32)}, "k has dtype int32, expected float32 or bfloat16"),
  ({"v": Q[:, :4]}, r"v has shape \(2, 4, 4, 8\), expected \(2, 5, 4, 8\)"),
  ({"v": Q[..., 0]}, r"v has shape \(2, 5, 4\), expected 4 dimensions"),
  ({"v": Q.astype(np.float64)}, "v has dtype float64, expected float32 or bfloat16"),
  ({"g_gamma": np.zeros((1, 4), np.float32)}, r"g_gamma has shape \(1, 4\), expected \(4,\)"),
  ({"g_gamma": np.zeros(4)}, "g_gamma has dtype float64, expected float32"),
  ({"segment_ids": np.ones((2, 6), np.int32)}, r"segment_ids has shape \(2, 6\), expected \(2, 5\)"),
  ({"segment_ids": np.ones((2, 5), bool)}, "segment_ids has dtype bool, expected integer"),
  ({"initial_state": np.zeros((2, 4, 8, 7), np.float32)}, r"initial_state has shape .*, expected \(2, 4, 8, 8\)"),
  ({"initial_state": jnp.zeros((2, 4, 8, 8), jnp.bfloat16)}, "initial_state has dtype bfloat16, expected float32"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected(wrong, message):
  good = {"q": Q, "k": Q, "v": Q, "g_gamma": np.zeros(4, np.float32)}
  with pytest.raises(ValueError, match=message):
    gla(**(good | wrong))
