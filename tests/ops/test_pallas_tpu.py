"""The TPU kernels on the CPU, in an interpreter that knows the TPU's memories, fills them with NaN, looks for races."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gla_closed_form import closed_form, make_case
from gla_suite import SETTINGS, GlaSuite, assert_close, error
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.gla import block_sizes, gla, log_decay
from maxtext_ling2.ops.gla.block_sizes import Block, block_sizes_for
from maxtext_ling2.ops.gla.pallas_grid import Grid
from maxtext_ling2.ops.gla.pallas_tpu import segments_by_step


@pytest.fixture
def interpreted():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    yield
  # The interpreter's own record; it has none if nothing ran.
  assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.usefixtures("interpreted")
class TestPallas(GlaSuite):
  backend = "pallas"
  drift = 3e-6
  long, many = 300, 8  # the interpreter takes seconds for what a chip does in microseconds

  @pytest.mark.parametrize(
    ("length", "heads", "dim", "value_dim", "segments"),
    [
      (1, 1, 8, 8, False),
      pytest.param(2, 3, 24, 8, True, marks=pytest.mark.slow),
      pytest.param(127, 1, 128, 24, True, marks=pytest.mark.slow),
      pytest.param(128, 3, 24, 24, False, marks=pytest.mark.slow),
      (300, 3, 8, 24, True),
      (530, 2, 136, 130, False),  # two steps, two registers a head
    ],
  )
  def test_results_and_gradients_are_those_of_the_closed_form(self, length, heads, dim, value_dim, segments):
    self.check_shape(length, heads, dim, value_dim, segments)

  @pytest.mark.slow
  @settings(**SETTINGS, max_examples=2)
  @given(cut=st.integers(1, 149), seed=st.integers(0, 99), segments=st.booleans())
  def test_a_sequence_cut_anywhere_is_one_call(self, cut, seed, segments):
    self.check_cut(cut, seed, segments)

  @pytest.mark.slow
  @settings(**SETTINGS, max_examples=2)
  @given(order=st.permutations(range(4)), lengths=st.lists(st.integers(1, 45), min_size=4, max_size=4))
  def test_permuted_documents_give_permuted_outputs(self, order, lengths):
    self.check_permutation(order, lengths)

  # What the other backends have with `make test`, and what the kernels share with the cases that run then.

  @pytest.mark.slow
  def test_mapped_over_another_axis(self):
    super().test_mapped_over_another_axis()

  @pytest.mark.slow
  @pytest.mark.parametrize("layer", [0, 79])
  def test_decays_of_the_64_heads_of_the_large_model(self, layer):
    super().test_decays_of_the_64_heads_of_the_large_model(layer)

  @pytest.mark.slow
  def test_an_id_that_comes_back_is_a_new_document(self):
    super().test_an_id_that_comes_back_is_a_new_document()

  @pytest.mark.slow  # with a scale, which the fused layers of the oracle have
  def test_defaults(self):
    super().test_defaults()

  @pytest.mark.slow
  def test_packed_documents_equal_each_alone(self):
    super().test_packed_documents_equal_each_alone()

  @pytest.mark.slow
  def test_within_a_rematerialised_scan_over_layers(self):
    self.check_scan(lambda layer: layer)  # the interpreter has side effects, which jax.checkpoint refuses

  @pytest.mark.slow
  @pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto])
  def test_under_a_mesh(self, axis_type):
    super().test_under_a_mesh(axis_type)  # explicitly sharded arrays have to go through shard_map

  @pytest.mark.parametrize("segments", [False, True], ids=["one_document", "segments"])
  def test_long_chunks_of_two_blocks(self, segments, monkeypatch):
    monkeypatch.setattr(block_sizes, "device_kind", lambda: "TPU v6 lite")
    case = make_case(600, 1, 8, batch=1, segments=segments)
    assert block_sizes_for(600, 1, 128, 4).forward == Block(256, 3, 1)
    assert_close(self.results(case), closed_form(case), 3e-6)

  @pytest.mark.slow
  @pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite"])  # chunks of 128 and of 256
  @pytest.mark.parametrize(("dtype", "o", "gradients"), [(jnp.float32, 1e-5, 1e-5), (jnp.bfloat16, 0.0035, 0.004)])
  def test_errors_of_each_head_after_8192_tokens(self, kind, dtype, o, gradients, monkeypatch):
    monkeypatch.setattr(block_sizes, "device_kind", lambda: kind)
    case = make_case(8192, 4, 128, batch=1)
    case.g = np.concatenate([log_decay(layer, 80, 64, 0)[[0, 63]] for layer in (0, 79)])
    rounded = {n: np.asarray(jnp.asarray(getattr(case, n), dtype), np.float32) for n in ("q", "k", "v", "do")}
    case = dataclasses.replace(case, **rounded)
    found, expected = self.results(case, dtype), closed_form(case)
    for name, bound in {"o": o, "dq": gradients, "dk": gradients, "dv": gradients}.items():
      errors = [error(found[name][:, :, h], expected[name][:, :, h]) for h in range(4)]
      assert max(errors) <= bound, (name, errors)


def products(dtype):
  """(operand dtypes, precision, dtype of the sum) of the matrix products of both kernels."""
  x = jax.ShapeDtypeStruct((1, 256, 2, 128), dtype)
  ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)

  def objective(q, k, v, ids):
    return gla(q, k, v, np.float32([-0.1, -0.2]), segment_ids=ids, backend="pallas")[0].astype(jnp.float32).sum()

  found, kernels = set(), set()

  def collect(jaxpr, inside):
    for equation in jaxpr.eqns:
      kernel = equation.primitive.name == "pallas_call"
      if kernel:
        kernels.add(equation.params["name"])
      if inside and equation.primitive.name == "dot_general":
        operands = tuple(x.aval.dtype.name for x in equation.invars)
        precision = equation.params["precision"]
        found.add((*operands, precision and precision[0], equation.params["preferred_element_type"].name))
      for inner in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
      ):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          collect(inner, inside or kernel)

  collect(jax.make_jaxpr(jax.grad(objective, (0, 1, 2)))(x, x, x, ids).jaxpr, False)
  assert kernels == {"gla_forward", "gla_backward"}
  return found


def test_float32_is_multiplied_in_full_and_bfloat16_in_one_pass():
  # The interpreter multiplies as the CPU does, so it cannot tell.
  assert products(jnp.float32) == {("float32", "float32", jax.lax.Precision.HIGHEST, "float32")}
  assert products(jnp.bfloat16) == {("bfloat16", "bfloat16", None, "float32")}


def test_which_steps_hold_padding():
  grid = Grid(2, 1000, 4, 128, 128, Block(128, 2, 4), reverse=False)
  ids = np.ones((2, 1000), np.int32)
  ids[1, 700:705] = 0
  has_padding, meta = segments_by_step(jnp.asarray(ids), grid)
  np.testing.assert_array_equal(has_padding, [[0, 0, 0, 1], [0, 0, 1, 1]])  # 24 places are left of the last step
  assert meta.shape == (2, 8, 1024)
  assert segments_by_step(None, dataclasses.replace(grid, length=1024)) == (None, None)


def test_one_document_of_whole_steps_needs_no_segment_metadata():
  def inputs(length, ids=None):
    x = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)
    run = functools.partial(gla, g_gamma=np.float32([-0.1, -0.2]), segment_ids=ids, backend="pallas")
    jaxpr = jax.make_jaxpr(lambda q, k, v: run(q, k, v)[0])(x, x, x)
    return str(jaxpr).count("cumsum")

  assert inputs(512) == 0
  assert inputs(513) > 0


@pytest.mark.parametrize(
  ("length", "heads", "width", "itemsize", "forward"),
  [
    (4096, 16, 128, 2, Block(128, 8, 8)),
    (4096, 4, 128, 2, Block(128, 8, 4)),
    (4096, 7, 128, 2, Block(128, 8, 7)),
    (4096, 11, 128, 2, Block(128, 8, 1)),
    (4096, 16, 128, 4, Block(128, 8, 4)),
    (4096, 16, 1024, 4, Block(128, 4, 1)),
    (300, 16, 128, 2, Block(128, 3, 8)),
    (1, 1, 128, 2, Block(128, 1, 1)),
  ],
)
def test_block_sizes_fit_the_shape(length, heads, width, itemsize, forward):
  assert block_sizes_for(length, heads, width, itemsize, "TPU7x").forward == forward
