"""The experts' backends: one suite for all, against float64; dispatch; errors by name."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.experts import block_sizes, experts, xla
from maxtext_ling2.ops.experts.block_sizes import Chip
from maxtext_ling2.ops.experts.dispatch import ABSENT, choice_values, combine, dispatch, gather_tokens, gather_weights
from maxtext_ling2.ops.experts.schedule import Blocks, bound, schedule

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


def equations(jaxpr):
  """All equations, those of inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if (inner := getattr(value, "jaxpr", value)) is not value or hasattr(value, "eqns"):
        yield from equations(inner)


def assert_close(found, wanted, tolerance):
  """Frobenius norms of the differences, relative; what is zero has to be zero."""
  errors = {}
  for name, value in wanted.items():
    difference = np.linalg.norm(np.asarray(found[name], np.float64) - value)
    errors[name] = difference if not value.any() else difference / np.linalg.norm(value)
  assert max(errors.values()) <= tolerance, errors


class ExpertsSuite:
  backend: str
  check_vma = True

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

  def test_gradients_of_gradients(self):
    x, chosen, weights, *matrices = arguments("random", 20, 2)

    def slope(backend, *arrays):
      def loss(x, weights, *matrices):
        return jnp.sum(experts(x, chosen, weights, *matrices, backend=backend) ** 2)

      return sum(jnp.sum(gradient**2) for gradient in jax.grad(loss, range(5))(*arrays))

    found, wanted = (
      jax.jit(jax.grad(functools.partial(slope, backend), range(5)))(x, weights, *matrices)
      for backend in (self.backend, "reference")
    )
    assert_close(
      dict(zip(NAMES[1:], found, strict=True)), dict(zip(NAMES[1:], map(np.asarray, wanted), strict=True)), 1e-5
    )

  def test_shards_of_experts_add_up(self):
    """Expert parallelism: each device has half of the experts, and indices from its first one on."""
    x, chosen, weights, *matrices = arguments("random", 33, 2)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    specs = (jax.P(),) * 3 + (jax.P("expert"),) * 3

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=self.check_vma)
    def shard(x, chosen, weights, *matrices):
      return jax.lax.psum(experts(x, chosen, weights, *matrices, backend=self.backend), "expert")

    half = EXPERTS // 2
    parts = [jax.jit(shard)(x, chosen - i, weights, *(w[i : i + half] for w in matrices)) for i in (0, half)]
    assert_close({"y": sum(parts)}, {"y": expected(("random", 33, 2))["y"]}, 1e-5)


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
def on_a_gpu(monkeypatch):
  """The program of a GPU, which runs on CPUs, too."""
  monkeypatch.setattr(xla, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.usefixtures("on_a_gpu")
class TestXlaOnGpus(ExpertsSuite):
  backend = "xla"

  def test_no_operand_has_all_rows_for_each_expert(self):
    """XLA for GPUs makes ragged_dot a dense product. The largest array: a matrix for each of the blocks."""
    x, chosen, weights, *matrices = arguments("uniform", 96, 2)
    jaxpr = jax.make_jaxpr(lambda *a: values_and_gradients(*a, self.backend))(x, chosen, weights, matrices, x)
    assert "ragged_dot" not in str(jaxpr)
    largest = max(math.prod(var.aval.shape) for equation in equations(jaxpr.jaxpr) for var in equation.outvars)
    blocks = (192 + EXPERTS * 31) // 32 + 1  # of 32 rows: 192 choices of 6 experts
    assert largest <= blocks * WIDTH * HIDDEN


@pytest.mark.parametrize("empty_experts", [False, True])
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_cover_each_row_once(case, cores, empty_experts):
  where = dispatch(jnp.asarray(indices(*case)), EXPERTS, 16)
  blocks, steps = schedule(where, cores, 32, 48, empty_experts)
  blocks = Blocks(*map(np.asarray, blocks))
  assert (
    blocks.expert.shape == (cores, bound(where.row.size, EXPERTS, cores, 32)) and int(steps) <= blocks.expert.shape[1]
  )
  assert not blocks.tiles[:, int(steps) :].any()
  sizes, starts = where.sizes.tolist(), where.starts.tolist()
  for e in range(EXPERTS):
    own = [(c, b) for c, b in np.ndindex(blocks.expert.shape) if blocks.expert[c, b] == e]
    real = [at for at in own if blocks.tiles[at] or blocks.first[at]]
    assert len(real) == (max(-(-(sizes[e] - 16) // 32), 1) if sizes[e] else int(empty_experts))
    assert [int(blocks.tiles[at]) for at in real[:-1]] == [2] * (len(real) - 1) and all(
      blocks.tiles[at] <= 3 for at in real
    )
    assert len({c for c, _ in own}) <= 1 and [b for _, b in own] == list(range(own[0][1], own[-1][1] + 1) if own else [])
    assert [int(blocks.first[at]) for at in real] == [1, *[0] * (len(real) - 1)][: len(real)]
    assert [int(blocks.last[at]) for at in real] == [1, *[0] * (len(real) - 1)][: len(real)][::-1]
    covered = [blocks.start[at] + i for at in real for i in range(blocks.tiles[at])]
    assert covered == list(range(starts[e] // 16, starts[e] // 16 + -(-sizes[e] // 16)))


def test_two_cores_get_as_much():
  sizes = np.random.default_rng(0).multinomial(4096, np.full(64, 1 / 64)).astype(np.int32)
  chosen = np.repeat(np.arange(64, dtype=np.int32), sizes)[:, None]
  blocks, _ = schedule(dispatch(jnp.asarray(chosen), 64, 16), 2, 64, 64, True)
  tiles = np.asarray(blocks.tiles).sum(axis=1)
  assert tiles.sum() == (-(-sizes // 16)).sum() and abs(int(tiles[0]) - int(tiles[1])) <= 2


@pytest.mark.parametrize(
  ("kind", "width", "hidden", "itemsize", "reason"),
  [
    ("TPU v5", 2048, 512, 2, None),
    ("TPU v6 lite", 2048, 512, 4, None),
    ("TPU v6 lite", 2048, 500, 2, "C=2048 and F=500 are not both multiples of 128"),
    ("TPU v4", 2048, 512, 2, "experts of 2048 x 512 need 41 MiB of VMEM, and a kernel on TPU v4 has 14"),
    ("TPU v5", 4096, 1024, 2, "experts of 4096 x 1024 need 154 MiB of VMEM, and a kernel on TPU v5 has 58"),
  ],
)
def test_why_a_chip_does_not_take_the_kernels(kind, width, hidden, itemsize, reason):
  assert block_sizes.why_not_kernel(width, hidden, itemsize, kind) == reason


def test_tiers_beyond_all_choices_are_left_out():
  def tiers(choices):
    return block_sizes.block_sizes_for(2048, 512, 2, choices, "TPU v6 lite").forward.tiers

  assert {n: tiers(n) for n in (1, 128, 129, 400)} == {
    1: (128,),
    128: (128,),
    129: (128, 256),
    400: (128, 256, 384, 512),
  }


def test_the_kernels_are_refused_by_name():
  x, chosen, weights, *matrices = arguments(*CASES[0])
  narrow = [w[:, :, :64] for w in matrices[:2]]
  with pytest.raises(
    ValueError, match="backend is 'pallas', but C=256 and F=64 are not both multiples of 128; use 'xla'"
  ):
    experts(x, chosen, weights, *narrow, matrices[2][:, :64], backend="pallas")


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels on two cores, in an interpreter that fills memory with NaN and looks for races; blocks of few rows."""
  monkeypatch.setattr(block_sizes, "_OTHER", Chip(2, 64 * 2**20, (32, 64), (16, 48), (32, 32)))
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
    yield
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.usefixtures("interpreted")
class TestPallas(ExpertsSuite):
  backend = "pallas"
  check_vma = False  # the interpreter does not know it with a grid of dynamic size


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
