"""The experts' backends: one suite for all, against float64; dispatch; errors by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.experts import block_sizes, experts
from maxtext_ling2.ops.experts.block_sizes import Chip
from maxtext_ling2.ops.experts.dispatch import ABSENT, choice_values, combine, dispatch, gather_tokens, gather_weights

EXPERTS, WIDTH, HIDDEN = 6, 256, 128
NAMES = ("y", "x", "weights", "w_gate", "w_up", "w_down")


def indices(name, tokens, k):
  """[N, k] experts; -1 and EXPERTS are elsewhere."""
  rng = np.random.default_rng(3)
  token, choice = np.mgrid[:tokens, :k]
  return np.int32(
    {
      "uniform": (token + choice) % EXPERTS,
      "all to one": np.full((tokens, k), 2),
      "some without rows": np.where((token + choice) % 2, 1, 4),
      "none local": np.where((token + choice) % 2, -1, EXPERTS),
      "random": rng.integers(0, EXPERTS, (tokens, k)),
      "some elsewhere": rng.integers(-2, EXPERTS + 2, (tokens, k)),
    }[name]
  )


CASES = [  # distribution, N, k
  ("uniform", 48, 2),
  ("all to one", 150, 1),
  ("some without rows", 40, 3),
  ("none local", 24, 2),
  ("random", 1, 1),
  ("random", 77, 8),
  ("some elsewhere", 130, 2),
]


def arguments(name, tokens, k, dtype=jnp.float32):
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

  shapes = [(EXPERTS, WIDTH, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, WIDTH)]
  matrices = [normal(*shape, scale=shape[1] ** -0.5) for shape in shapes]
  weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, k)), jnp.float32)
  return normal(tokens, WIDTH), jnp.asarray(indices(name, tokens, k)), weights, *matrices


@functools.partial(jax.jit, static_argnames=("backend", "options"))
def values_and_gradients(x, chosen, weights, matrices, dy, backend, options=()):
  def call(x, weights, *matrices):
    return experts(x, chosen, weights, *matrices, backend=backend, **dict(options))

  y, pull = jax.vjp(call, x, weights, *matrices)
  return dict(zip(NAMES, (y, *pull(dy)), strict=True))


def results(backend, case, dtype=jnp.float32, **options):
  x, chosen, weights, *matrices = arguments(*case, dtype)
  dy = jnp.asarray(np.random.default_rng(7).standard_normal(x.shape), dtype)
  return values_and_gradients(x, chosen, weights, matrices, dy, backend, tuple(options.items()))


def expected(case, dtype=jnp.float32):
  """y and all gradients in float64, token by token and choice by choice."""
  x, chosen, weights, w_gate, w_up, w_down = (np.asarray(a, np.float64) for a in arguments(*case, dtype))
  dy = np.asarray(jnp.asarray(np.random.default_rng(7).standard_normal(x.shape), dtype), np.float64)
  y, dx, dweights, dgate, dup, ddown = (np.zeros_like(a) for a in (x, x, weights, w_gate, w_up, w_down))
  for n, j in np.ndindex(chosen.shape):
    if not 0 <= (e := int(chosen[n, j])) < EXPERTS:
      continue
    gate, up = x[n] @ w_gate[e], x[n] @ w_up[e]
    sigmoid = 1 / (1 + np.exp(-gate))
    h = gate * sigmoid * up
    y[n] += weights[n, j] * (h @ w_down[e])
    dh = w_down[e] @ dy[n]
    dweights[n, j] = h @ dh
    ddown[e] += weights[n, j] * np.outer(h, dy[n])
    to_gate = weights[n, j] * dh * up * sigmoid * (1 + gate * (1 - sigmoid))
    to_up = weights[n, j] * dh * gate * sigmoid
    dgate[e] += np.outer(x[n], to_gate)
    dup[e] += np.outer(x[n], to_up)
    dx[n] += w_gate[e] @ to_gate + w_up[e] @ to_up
  return dict(zip(NAMES, (y, dx, dweights, dgate, dup, ddown), strict=True))


def assert_close(found, wanted, tolerance):
  """Frobenius norms of the differences, relative; what is zero has to be zero."""
  errors = {}
  for name, value in wanted.items():
    difference = np.linalg.norm(np.asarray(found[name], np.float64) - value)
    errors[name] = difference if not value.any() else difference / np.linalg.norm(value)
  assert max(errors.values()) <= tolerance, errors


class ExpertsSuite:
  backend: str

  @pytest.mark.parametrize("case", CASES, ids=str)
  def test_float32_is_the_closed_form(self, case):
    found = results(self.backend, case)
    assert all(value.dtype == jnp.float32 for value in found.values())
    assert_close(found, expected(case), 1e-5)

  @pytest.mark.parametrize("in_float32", [False, True])
  @pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
  def test_bfloat16_is_the_closed_form_of_its_operands(self, case, in_float32):
    """Roundings of at most 2^-9 each, independent of one another: of h, h * weight, result; gate, up, silu."""
    found = results(self.backend, case, jnp.bfloat16, activation_in_float32=in_float32)
    assert {name: value.dtype for name, value in found.items() if name != "weights"} == dict.fromkeys(
      set(NAMES) - {"weights"}, jnp.bfloat16
    )
    assert found["weights"].dtype == jnp.float32
    assert_close(found, expected(case, jnp.bfloat16), (3 if in_float32 else 6) ** 0.5 * 2**-9)


class TestReference(ExpertsSuite):
  backend = "reference"

  def test_float64(self):
    """What the kernels of a model are compared with, where float32 is not exact enough."""
    with jax.enable_x64(True):
      x, chosen, *others = arguments(*CASES[5])
      x, *others = (jnp.asarray(a, jnp.float64) for a in (x, *others))
      found = experts(x, chosen, *others, backend=self.backend)
      assert found.dtype == jnp.float64
      assert_close({"y": found}, {"y": expected(CASES[5])["y"]}, 1e-14)


class TestXla(ExpertsSuite):
  backend = "xla"


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels on two cores, in an interpreter that fills memory with NaN and looks for races; blocks of few rows."""
  monkeypatch.setattr(block_sizes, "_OTHER", Chip(2, 64 * 2**20, (32, 64), (16, 48)))
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
    yield
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.usefixtures("interpreted")
class TestPallas(ExpertsSuite):
  backend = "pallas"


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_sorts_by_expert_and_back(case, alignment):
  chosen = indices(*case)
  where = dispatch(jnp.asarray(chosen), EXPERTS, alignment)
  counts = [int(np.sum(chosen == e)) for e in range(EXPERTS)]
  assert where.sizes.tolist() == counts
  choice, row = np.asarray(where.choice), np.asarray(where.row)
  assert len(choice) % alignment == 0 and set(row[(chosen < 0) | (chosen >= EXPERTS)]) <= {ABSENT}
  for e, (start, size) in enumerate(zip(where.starts.tolist(), counts, strict=True)):
    assert start % alignment == 0
    found = choice[start : start + size]
    assert found.tolist() == np.flatnonzero(chosen.reshape(-1) == e).tolist()  # in the order of tokens
    assert row.reshape(-1)[found].tolist() == list(range(start, start + size))
  assert np.sum(choice != ABSENT) == sum(counts)  # the rest is padding


def test_gathers_are_each_others_inverse():
  """A token's rows, weighted, sum up to the token times its local weights; a choice's value comes back to it."""
  x, chosen, weights, *_ = arguments("some elsewhere", 50, 3)
  where = dispatch(chosen, EXPERTS, 16)
  of_row = gather_weights(weights, where)
  local = np.where((np.asarray(chosen) >= 0) & (np.asarray(chosen) < EXPERTS), weights, 0)
  assert choice_values(of_row, where).tolist() == local.tolist()
  assert float(of_row.sum()) == pytest.approx(local.sum(), rel=1e-6)
  rows = of_row[:, None] * gather_tokens(x, where)
  np.testing.assert_allclose(combine(rows, where), np.asarray(x) * local.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_nothing_is_scattered():
  """Two cores race in a scatter-add, and XLA's is serial."""
  x, chosen, weights, *matrices = arguments(*CASES[5])
  jaxpr = jax.make_jaxpr(lambda *a: values_and_gradients(*a, "xla"))(x, chosen, weights, matrices, x)
  assert "sort" in str(jaxpr) and "scatter" not in str(jaxpr)


def test_only_the_arguments_are_saved():
  x, chosen, weights, *matrices = arguments(*CASES[5])
  _, pull = jax.vjp(lambda *a: experts(a[0], chosen, *a[1:], backend="xla"), x, weights, *matrices)
  saved = sorted(a.shape for a in jax.tree.leaves(pull))
  assert saved == sorted(a.shape for a in (x, chosen, weights, *matrices))


@pytest.mark.parametrize(
  ("change", "text"),
  [
    ({"backend": "triton"}, "experts: backend is 'triton', expected one of 'auto', 'reference', 'xla', 'pallas'"),
    ({"x": jnp.ones((4, 8, 256))}, r"experts: x has shape \(4, 8, 256\), expected \[N, C\], none of size 0"),
    ({"indices": jnp.ones((0, 2), jnp.int32)}, r"experts: indices has shape \(0, 2\), expected \[N, k\]"),
    ({"indices": jnp.ones((48, 2))}, r"experts: indices has dtype float32, expected int32"),
    ({"weights": jnp.ones((48, 3))}, r"experts: weights has shape \(48, 3\), expected \(48, 2\), because x is"),
    ({"weights": jnp.ones((48, 2), jnp.bfloat16)}, "experts: weights has dtype bfloat16, expected float32"),
    ({"w_up": jnp.ones((6, 256, 64))}, r"experts: w_up has shape \(6, 256, 64\), expected \(6, 256, 128\)"),
    ({"w_down": jnp.ones((6, 256, 128))}, r"experts: w_down has shape \(6, 256, 128\), expected \(6, 128, 256\)"),
    ({"w_down": jnp.ones((6, 128, 256), jnp.bfloat16)}, "experts: w_down has dtype bfloat16, expected float32"),
  ],
)
def test_what_does_not_fit_is_named(change, text):
  names = ("x", "indices", "weights", "w_gate", "w_up", "w_down")
  with pytest.raises(ValueError, match=text):
    experts(**{**dict(zip(names, arguments(*CASES[0]), strict=True)), **change})
