"""What every backend of GLA must do: one class that the test class of each backend inherits."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gla_closed_form import Case, closed_form, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maxtext_ling2.ops.gla import gla, log_decay

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = [
  # T (around chunks of 64 and 128), H, D, Dv, segments
  (1, 1, 8, 8, False),
  (1, 4, 8, 8, True),
  (2, 3, 24, 8, True),
  (63, 4, 8, 24, False),
  (64, 6, 24, 24, True),
  (65, 16, 8, 8, False),
  (127, 1, 128, 24, True),
  (128, 3, 24, 24, False),
  (129, 4, 8, 8, True),
  (256, 3, 8, 8, True),
  (300, 6, 24, 8, False),
  (300, 3, 8, 24, True),
]

# Nearly all of the time is LLVM's: the least of its optimisation is several times faster and computes the same.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@functools.partial(jit, static_argnames=("scale", "backend"))
def run(q, k, v, g, ids=None, state=None, *, scale=None, backend):
  return gla(q, k, v, g, segment_ids=ids, initial_state=state, output_final_state=True, scale=scale, backend=backend)


@functools.partial(jit, static_argnames="backend")
def run_with_gradients(q, k, v, g, ids, state, do, dstate, *, backend):
  def call(q, k, v, state):
    return gla(q, k, v, g, segment_ids=ids, initial_state=state, output_final_state=True, backend=backend)

  (o, final_state), pull = jax.vjp(call, q, k, v, state)
  dq, dk, dv, dinitial_state = pull((do.astype(o.dtype), dstate))
  return {"o": o, "final_state": final_state, "dq": dq, "dk": dk, "dv": dv, "dinitial_state": dinitial_state}


def error(found, expected) -> float:
  """Frobenius norm of the difference, relative to that of the expected."""
  expected = np.asarray(expected, np.float64)
  return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_close(found, expected, tolerance: float) -> None:
  errors = {name: error(found[name], expected[name]) for name in expected}
  assert max(errors.values()) <= tolerance, errors


# The class of each backend runs the same test function, which hypothesis would take for a mistake.
SETTINGS = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.differing_executors]}


class GlaSuite:
  backend: str
  drift: float  # relative error allowed after `long` tokens
  long = 2048
  many = 64  # heads of a case with decays of all strengths

  def call(self, q, k, v, g, ids=None, state=None):
    return run(q, k, v, g, ids, state, backend=self.backend)

  def results(self, case: Case, dtype=jnp.float32):
    q, k, v = (jnp.asarray(x, dtype) for x in (case.q, case.k, case.v))
    return run_with_gradients(q, k, v, case.g, case.ids, case.state, case.do, case.dstate, backend=self.backend)

  @pytest.mark.parametrize(("length", "heads", "dim", "value_dim", "segments"), SHAPES)
  def test_results_and_gradients_are_those_of_the_closed_form(self, length, heads, dim, value_dim, segments):
    self.check_shape(length, heads, dim, value_dim, segments)

  def check_shape(self, length, heads, dim, value_dim, segments):
    case = make_case(length, heads, dim, value_dim, segments=segments, seed=length)
    assert_close(self.results(case), closed_form(case), 3e-6)

  @pytest.mark.parametrize("segments", [False, True], ids=["one_document", "segments"])
  def test_decays_of_every_strength_stay_finite_and_exact(self, segments):
    case = make_case(self.long, self.many, 8, batch=1, segments=segments)
    case.g = -np.geomspace(1e-6, 50, self.many).astype(np.float32)  # exp(50 * 127) is far beyond any float
    found = self.results(case)
    assert all(bool(jnp.isfinite(x).all()) for x in found.values())
    heads = [0, 5 * self.many // 8, self.many - 1]
    picked = {name: x[:, heads] if "state" in name else x[:, :, heads] for name, x in found.items()}
    assert_close(picked, closed_form(case, heads), self.drift)

  @pytest.mark.parametrize("layer", [0, 79])
  def test_decays_of_the_64_heads_of_the_large_model(self, layer):
    case = make_case(self.long, self.many, 8, batch=1)
    case.g = log_decay(layer, 80, 64, 0)[np.linspace(0, 63, self.many).astype(int)]
    o, state = self.call(case.q, case.k, case.v, case.g, None, case.state)
    heads = [0, self.many // 2, self.many - 1]
    expected = closed_form(case, heads)
    assert error(o[:, :, heads], expected["o"]) <= self.drift
    assert error(state[:, heads], expected["final_state"]) <= self.drift

  def test_bfloat16_is_within_its_rounding(self):
    case = make_case(200, 2, 128, segments=True)
    case.q, case.k, case.v, case.do = (
      np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in (case.q, case.k, case.v, case.do)
    )
    found = self.results(case, jnp.bfloat16)
    assert [found[n].dtype for n in ("o", "dq", "dk", "dv", "final_state")] == [jnp.bfloat16] * 4 + [jnp.float32]
    assert_close(found, closed_form(case), 0.004)

  def test_layer_of_the_official_code(self):
    # Layer 1 of oracle/one_cycle/io_long.npz (T = 80), recorded from the official PyTorch code in float32.
    golden = np.load(GOLDEN / "gla_layer.npz")
    q, k, v = (golden[f"gla_{n}"] for n in "qkv")
    np.testing.assert_array_equal(np.ptp(golden["gla_g"], axis=(0, 1)), 0)
    o, _ = self.call(q, k, v, golden["gla_g"][0, 0])
    # Its outputs reach 45, and are themselves 2.3e-5 from a float64 computation.
    expected, largest = golden["gla_o"], np.abs(golden["gla_o"]).max()
    np.testing.assert_allclose(np.asarray(o).reshape(expected.shape), expected, rtol=0, atol=1e-6 * largest)

  @settings(**SETTINGS, max_examples=5)
  @given(cut=st.integers(1, 149), seed=st.integers(0, 99), segments=st.booleans())
  def test_a_sequence_cut_anywhere_is_one_call(self, cut, seed, segments):
    self.check_cut(cut, seed, segments)

  def check_cut(self, cut, seed, segments):
    case = make_case(150, 3, 8, segments=segments, seed=seed)
    ids = np.ones((2, 150), np.int32) if case.ids is None else case.ids
    expected = self.call(case.q, case.k, case.v, case.g, ids, case.state)
    before, after = (
      [x[:, part] for x in (case.q, case.k, case.v)] + [case.g, ids[:, part]] for part in (slice(cut), slice(cut, None))
    )
    first, state = self.call(*before, case.state)
    second, state = self.call(*after, np.where(_border(ids, cut)[:, None, None, None], 0, state).astype(np.float32))
    assert error(np.concatenate([first, second], axis=1), expected[0]) <= 2e-6
    assert error(state, expected[1]) <= 2e-6

  @settings(**SETTINGS, max_examples=5)
  @given(order=st.permutations(range(4)), lengths=st.lists(st.integers(1, 45), min_size=4, max_size=4))
  def test_permuted_documents_give_permuted_outputs(self, order, lengths):
    self.check_permutation(order, lengths)

  def check_permutation(self, order, lengths):
    case = make_case(180, 3, 8, batch=1)  # what the documents leave over is padding
    ids = np.repeat(np.arange(5), [*lengths, 180 - sum(lengths)]).astype(np.int32)
    ids = np.where(ids == 4, 0, ids + 1)
    rank = np.array([0, *(1 + np.argsort(order))])  # of each id among the permuted ones; padding first
    places = np.argsort(rank[ids], kind="stable")
    o, _ = self.call(case.q, case.k, case.v, case.g, ids[None])
    permuted, _ = self.call(*(x[:, places] for x in (case.q, case.k, case.v)), case.g, ids[None, places])
    assert error(permuted, o[:, places]) <= 2e-6

  def test_packed_documents_equal_each_alone(self):
    case = make_case(165, 3, 8, batch=1)
    cuts = [(0, 70), (70, 75), (75, 165)]
    case.ids = np.repeat(np.int32([[4, 9, 4]]), [70, 5, 90], axis=1)
    case.state[:], case.dstate[:] = 0, 0  # the state after the last document would reach only its gradients
    packed = self.results(case)
    for start, stop in cuts:
      one = slice(start, stop)
      alone = Case(case.q[:, one], case.k[:, one], case.v[:, one], case.g, None, case.state, case.do[:, one], case.dstate)
      expected = self.results(alone)
      by_time = {name: expected[name] for name in ("o", "dq", "dk", "dv")}
      assert_close({name: packed[name][:, one] for name in by_time}, by_time, 2e-6)
    assert error(packed["final_state"], expected["final_state"]) <= 2e-6

  def test_padding_is_as_if_it_were_not_there(self):
    case = make_case(200, 3, 8, batch=1)
    ids = np.repeat(np.int32([[0, 1, 0, 1, 2, 0, 2, 0, 3, 0]]), [7, 30, 9, 20, 31, 40, 2, 1, 51, 9], axis=1)
    real = ids[0] != 0
    expected = self.call(*(x[:, real] for x in (case.q, case.k, case.v)), case.g, ids[:, real], case.state)
    o, state = self.call(case.q, case.k, case.v, case.g, ids, case.state)
    assert error(o[:, real], expected[0]) <= 2e-6
    assert error(state, expected[1]) <= 2e-6
    np.testing.assert_array_equal(o[:, ~real], 0)

  def test_garbage_on_the_right_changes_no_output_state_or_gradient(self):
    case = make_case(150, 3, 8)
    expected = self.results(case)

    def padded(x, value):
      return np.pad(x, ((0, 0), (0, 50), (0, 0), (0, 0)), constant_values=value)

    q, k, v, do = padded(case.q, np.nan), padded(case.k, np.nan), padded(case.v, np.nan), padded(case.do, 1)
    ids = np.repeat(np.int32([[5, 0], [7, 0]]), [150, 50], axis=1)
    found = self.results(Case(q, k, v, case.g, ids, case.state, do, case.dstate))
    for name in ("o", "dq", "dk", "dv"):
      np.testing.assert_array_equal(found[name][:, 150:], 0)
      found[name] = found[name][:, :150]
    assert_close(found, expected, 2e-6)

  def test_a_row_of_padding_returns_its_initial_state(self):
    case = make_case(130, 3, 8)
    o, state = self.call(case.q, case.k, case.v, case.g, np.zeros((2, 130), np.int32), case.state)
    np.testing.assert_array_equal(o, 0)
    np.testing.assert_array_equal(state, case.state)

  def test_an_id_that_comes_back_is_a_new_document(self):
    case = make_case(140, 3, 8)
    back, new = (np.repeat(np.int32([ids, ids]), [60, 20, 60], axis=1) for ids in ([1, 2, 1], [1, 2, 3]))
    for found, expected in zip(
      self.call(case.q, case.k, case.v, case.g, back), self.call(case.q, case.k, case.v, case.g, new), strict=True
    ):
      np.testing.assert_array_equal(found, expected)

  def test_the_decay_gets_no_gradient(self):
    case = make_case(20, 3, 8)
    gradient = jit(jax.grad(lambda g: gla(case.q, case.k, case.v, g, backend=self.backend)[0].sum()))(case.g)
    np.testing.assert_array_equal(gradient, 0)

  def test_defaults(self):
    case = make_case(20, 3, 8)
    o, state = jit(functools.partial(gla, backend=self.backend))(case.q, case.k, case.v, case.g)
    assert state is None
    zero, _ = self.call(case.q, case.k, case.v, case.g, np.ones((2, 20), np.int32), np.zeros_like(case.state))
    assert error(o, zero) <= 1e-6
    scaled, _ = run(case.q, case.k, case.v, case.g, scale=3.0, backend=self.backend)
    assert error(scaled, 3 * 8**0.5 * o) <= 1e-6

  def test_operands_of_two_dtypes_give_the_dtype_of_v(self):
    case = make_case(20, 3, 8)
    o, state = self.call(case.q, case.k, jnp.asarray(case.v, jnp.bfloat16), case.g)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    case.v, case.state = np.asarray(jnp.asarray(case.v, jnp.bfloat16), np.float32), np.zeros_like(case.state)
    assert error(state, closed_form(case)["final_state"]) <= 1e-6

  def test_mapped_over_another_axis(self):
    cases = [make_case(70, 2, 8, batch=1, segments=True, seed=seed) for seed in range(2)]
    q, k, v, ids = (np.stack([getattr(case, name) for case in cases]) for name in ("q", "k", "v", "ids"))

    def call(q, k, v, ids):
      return gla(q, k, v, cases[0].g, segment_ids=ids, backend=self.backend)[0]

    for index, found in enumerate(jit(jax.vmap(call))(q, k, v, ids)):
      assert error(found, self.call(q[index], k[index], v[index], cases[0].g, ids[index])[0]) <= 1e-6

  def test_the_gradient_of_a_gradient(self):
    case = make_case(70, 2, 8, batch=1, segments=True)
    case = dataclasses.replace(case, state=0 * case.state, dstate=0 * case.dstate)

    def size_of_gradient(q, k, v):
      def total(q, k, v):
        return (case.do * gla(q, k, v, case.g, segment_ids=case.ids, backend=self.backend)[0]).sum()

      return sum((x**2).sum() for x in jax.grad(total, (0, 1, 2))(q, k, v))

    found, slope = jit(jax.value_and_grad(size_of_gradient))(case.q, case.k, case.v)
    direction = np.random.default_rng(1).normal(size=case.q.shape)
    sizes = []
    for step in (-1e-3, 1e-3):  # the size is quadratic in q, so the central difference is exact
      expected = closed_form(dataclasses.replace(case, q=case.q + step * direction))
      sizes.append(sum((expected[name] ** 2).sum() for name in ("dq", "dk", "dv")))
    assert float(found) == pytest.approx(sum(sizes) / 2, rel=1e-5)
    assert float((slope * direction).sum()) == pytest.approx((sizes[1] - sizes[0]) / 2e-3, rel=1e-4)

  def test_within_a_rematerialised_scan_over_layers(self):
    self.check_scan(jax.checkpoint)

  def check_scan(self, remat):
    case = make_case(130, 3, 8, segments=True)

    def layer(x, index):
      o, _ = gla(x, x, x, log_decay(index, 2, 3, 0), segment_ids=case.ids, backend=self.backend)
      return x + o / (1 + jnp.abs(o)), None

    def scanned(x):
      return jax.lax.scan(remat(layer), x, jnp.arange(2))[0]

    def unscanned(x):
      return layer(layer(x, 0)[0], 1)[0]

    def with_gradient(layers):
      y, pull = jax.vjp(layers, case.v)
      return {"y": y, "dx": pull(case.do)[0]}

    assert_close(jit(lambda: with_gradient(scanned))(), jit(lambda: with_gradient(unscanned))(), 3e-6)

  @pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
  def test_under_a_mesh(self, axis_type):
    # One device is enough to check types: shard_map and explicit sharding want a scan's state to be sharded like q.
    case = make_case(130, 2, 8, segments=True)
    expected = self.call(case.q, case.k, case.v, case.g, case.ids)[0]
    spec = jax.P("data", None, "model")
    specs = (spec, spec, spec, jax.P("model"), jax.P("data"))

    def call(q, k, v, g, ids):
      return gla(q, k, v, g, segment_ids=ids, backend=self.backend)[0]

    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=(axis_type, axis_type))):
      args = [jax.device_put(x, s) for x, s in zip((case.q, case.k, case.v, case.g, case.ids), specs, strict=True)]
      whole = jit(call)(*args)
      mapped = jit(jax.shard_map(call, in_specs=specs, out_specs=spec))(*args)
    assert error(whole, expected) <= 1e-6
    assert error(mapped, expected) <= 1e-6


def _border(ids: np.ndarray, cut: int) -> np.ndarray:
  """Whether a document ends before `cut`, [B]: the real tokens next to it on either side have different ids."""
  sides = [(row[:cut][row[:cut] != 0], row[cut:][row[cut:] != 0]) for row in ids]
  return np.array([before.size > 0 and after.size > 0 and before[-1] != after[0] for before, after in sides])
