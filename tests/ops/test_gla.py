import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gla_closed_form import make_case
from gla_suite import error, run_with_gradients

from maxtext_ling2.ops.gla import gla

pytestmark = pytest.mark.unit


def test_auto_is_chunked_on_a_cpu():
  case = make_case(140, 3, 8, segments=True)
  args = (case.q, case.k, case.v, case.g, case.ids, case.state, case.do, case.dstate)
  auto, expected, reference = (run_with_gradients(*args, backend=name) for name in ("auto", "chunked", "reference"))
  for name, value in auto.items():
    np.testing.assert_array_equal(value, expected[name])
    assert 0 < error(value, reference[name]) <= 2e-6


@pytest.mark.parametrize("remat", [lambda layer: layer, jax.checkpoint], ids=["kept", "rematerialised"])
def test_auto_is_the_kernel_where_the_program_is_for_a_tpu(remat):
  x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

  def layer(x, _):
    return gla(x, x, x, np.float32([-0.1, -0.2]))[0], None

  def objective(x):
    return jax.lax.scan(remat(layer), x, length=2)[0].astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(objective)).trace(x)
  lowered = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu")}
  for kernel in ("gla_forward", "gla_backward"):
    assert kernel in lowered["tpu"]
    assert kernel not in lowered["cpu"]


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
