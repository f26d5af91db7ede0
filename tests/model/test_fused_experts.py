"""A train step whose routed experts are `ops.experts`, against MaxText's grouped products; and when which is taken."""

import collections
import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import tiny
from maxtext_ling2.model import fused_experts, moe_view
from maxtext_ling2.ops.experts import xla

# Experts that fill registers, so that the kernels take them.
WIDE = {"base_num_decoder_layers": 2, "base_emb_dim": 128, "base_moe_mlp_dim": 128, "group_norm_size": 1}
WIDE |= {"sparse_matmul": True, "megablox": False, "opt_type": "sgd", "gradient_clipping_threshold": 0.0}
WIDE |= {"moe_z_loss_weight": 1e-2, "load_balance_loss_weight": 1e-2, "gla_backend": "chunked"}
KERNELS = {"experts_forward", "experts_backward"}


@functools.cache
def step(backend, **settings):
  """(metrics, weights) after a step on packed documents, kernels in Pallas's own interpreter; names of the kernels."""
  original, ran = pl.pallas_call, set()

  def interpreted(*args, name, **kwargs):
    ran.add(name)
    return original(*args, name=name, interpret=True, **kwargs)

  with mock.patch.object(pl, "pallas_call", interpreted):
    run = tiny.Run(**WIDE | settings, experts_backend=backend)
    metrics = run.step(tiny.batch(run.config, 0))
  return metrics, run.weights(), ran


def assert_equal(found, expected):
  for ours, theirs in zip(found[:2], expected[:2], strict=True):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
      error = np.abs(np.asarray(ours[name], np.float64) - value).max()
      assert error <= 1e-5 * np.abs(value).max() + 1e-7, name


def test_kernels_give_the_step_of_grouped_products():
  """Loss, metrics and weights after the step, MTP's experts among them, in float32."""
  found = step("pallas")
  assert found[2] == KERNELS
  assert_equal(found, step("maxtext"))


def test_the_program_of_a_gpu_gives_the_step_of_grouped_products():
  """`auto` there, with the products of a GPU, which a CPU runs as well."""
  kind = "NVIDIA H100 80GB HBM3"
  spied = mock.patch.object(xla, "products_for", wraps=xla.products_for)
  kinds = mock.patch.object(moe_view, "kind_of", lambda _: kind), mock.patch.object(xla, "device_kind", lambda: kind)
  with kinds[0], kinds[1], spied as products:
    found = step("auto", activations_in_float32=True)
  assert {call.args[0] for call in products.call_args_list} == {kind}
  assert found[2] == set()
  assert_equal(found, step("maxtext", activations_in_float32=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "reference", "pallas"])
@pytest.mark.parametrize(
  "settings",
  [
    {"scan_layers": True, "base_num_decoder_layers": 9},
    {"gradient_accumulation_steps": 2},
    {"remat_policy": "none"},
    {"remat_policy": "minimal"},
    {"num_experts_per_tok": 8, "topk_routing_group": 4},  # all experts
    {"max_target_length": 7},
    {"activations_in_float32": True},
  ],
  ids=str,
)
def test_all_backends_give_the_step_of_grouped_products(backend, settings):
  """Among others with 7 tokens per sequence, a multiple of nothing."""
  assert_equal(step(backend, **settings), step("maxtext", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("in_float32", [False, True])
def test_bfloat16_errs_as_grouped_products_do(in_float32):
  """Gradients against those in float32: not more than a tenth further off, over all weights of experts."""
  half = {"dtype": "bfloat16", "matmul_precision": "default", "activations_in_float32": in_float32, "learning_rate": 1.0}
  exact = step("maxtext", learning_rate=1.0)[1]

  def error(backend):
    weights = step(backend, **half)[1]
    names = [name for name in exact if "MoeBlock_0" in name and name[-1].startswith("w")]
    assert len(names) == 2 * 3  # gate, up and down of the one sparse layer and of MTP's
    return np.sqrt(sum(np.sum((weights[name] - exact[name]) ** 2) for name in names))

  theirs = error("maxtext")
  assert theirs > 0
  assert error("pallas") <= 1.1 * theirs and error("xla") <= 1.1 * theirs


def kernels_of_a_step(**settings):
  """{name: number} of the kernels in the program of a step and its gradients."""
  run = tiny.Run(**WIDE | settings, experts_backend="pallas")
  with run.context():
    program = jax.make_jaxpr(run.step_function)(run.state, tiny.batch(run.config, 0))
  found = collections.Counter()

  def count(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "pallas_call":
        found[equation.params["name"]] += 1
      for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
          count(getattr(inner, "jaxpr", inner))

  count(program.jaxpr)
  return dict(found)


def test_full_rematerialisation_runs_no_kernel_again():
  """One forward and one backward kernel per layer of experts: one sparse layer and MTP's."""
  assert kernels_of_a_step(remat_policy="full") == dict.fromkeys(KERNELS, 2)


@pytest.mark.parametrize("in_float32", [False, True])
def test_activations_in_float32_reach_the_experts(in_float32):
  """The setting itself: what `ops.experts` makes of it is tested there."""
  with mock.patch.object(fused_experts, "experts", wraps=fused_experts.experts) as experts:
    kernels_of_a_step(activations_in_float32=in_float32, dtype="bfloat16")
  assert {call.kwargs["activation_in_float32"] for call in experts.call_args_list} == {in_float32}


# ---- when

CHIP = "TPU v6 lite"
RULES = {"activation_batch": ("fsdp", "expert"), "exp": "expert", "mlp_no_fsdp": ("tensor",)}


def layer_of(ring=False, tensor=1, expert=1, factor=-1.0, fallback=None, only_maxtext=None, quant=None):
  """What `why_maxtext` asks of a layer of 256 experts on 64 devices."""
  config = SimpleNamespace(
    experts_backend="auto", use_ring_of_experts=ring, moe_dropless_fallback=fallback, num_experts_per_tok=8
  )
  return SimpleNamespace(
    config=config,
    only_maxtext=only_maxtext,
    quant=quant,
    num_experts=256,
    mesh=SimpleNamespace(shape={"fsdp": 64 // expert // tensor, "expert": expert, "tensor": tensor}),
    get_expert_parallelism_size=lambda: expert,
    get_ragged_buffer_factor=lambda: factor,
    get_dropless_fallback_num_chunks=lambda length, chunks: None if factor <= 0 else 8,
    _logical_to_mesh_axes=lambda names: jax.P(*map(RULES.get, names)),
  )


def why(layer, tokens=(64, 4096), width=2048, hidden=512, kind=CHIP, dtype=jnp.bfloat16):
  x = jax.ShapeDtypeStruct((*tokens, width), dtype)
  shapes = [(256, width, hidden)] * 2 + [(256, hidden, width)]
  with mock.patch.object(jax, "Array", object):  # of the matrices no values are needed
    return fused_experts.why_maxtext(
      layer, x, fused_experts.Matrices(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)), kind
    )


@pytest.mark.parametrize("kind", ["TPU v5", CHIP, "TPU7x"])
def test_where_the_kernels_compute(kind):
  assert why(layer_of(), kind=kind) is None


@pytest.mark.parametrize(
  "call", [{}, {"tokens": (64, 8)}, {"width": 8192, "hidden": 2048}, {"dtype": jnp.float32}], ids=str
)
def test_on_a_gpu_the_same_runs_in_plain_jax(call):
  """Where MaxText's kernel is interpreted. The rules of TPU kernels do not matter there."""
  assert why(layer_of(), kind="NVIDIA H100 80GB HBM3", **call) is None


@pytest.mark.parametrize("ring", [{}, {"factor": 1.5, "fallback": "layer"}])
def test_a_ring_has_kernels(ring):
  """The recipe of v6e-64 moves 775 GB per step with them and 1067 without (docs/train_step.md)."""
  assert why(layer_of(ring=True, expert=4, **ring)) is None


@pytest.mark.parametrize(
  ("layer", "call", "reason"),
  [
    ({"only_maxtext": "experts_backend=maxtext"}, {}, "experts_backend=maxtext"),
    ({"quant": object()}, {}, "quantised weights"),
    ({"tensor": 2}, {}, "an expert's matrices cut over the mesh axes tensor"),
    ({"expert": 4}, {}, "without a ring of experts"),
    ({"expert": 4, "ring": True, "factor": 1.5}, {}, "ragged_buffer_factor=1.5, which drops tokens"),
    ({}, {"kind": "cpu"}, "a cpu device"),
    ({}, {"kind": "TPU v4"}, "MiB of VMEM"),
    ({}, {"width": 8192, "hidden": 2048}, "MiB of VMEM"),
    ({}, {"width": 2000}, "multiples of 128"),
    ({}, {"tokens": (64, 8)}, "fewer than 16 tokens per expert"),
  ],
)
def test_where_maxtext_computes(layer, call, reason):
  assert reason in why(layer_of(**layer), **call)


def test_a_named_backend_that_cannot_be_had():
  layer = layer_of(tensor=2)
  layer.config.experts_backend = "pallas"
  matrices = fused_experts.Matrices(*[jnp.zeros((1, 1, 1))] * 3)
  with pytest.raises(
    ValueError, match="experts_backend='pallas': it cannot be had with an expert's matrices cut over the mesh axes tensor"
  ):
    fused_experts.computes(layer, jnp.zeros((1, 1, 1)), matrices, CHIP)


def test_the_log_says_once_why_maxtext_computes(caplog):
  layer = layer_of(only_maxtext="float32_weight_sum=False, as this test has it")
  with caplog.at_level("INFO", "maxtext_ling2"):
    assert [fused_experts.computes(layer, None, None, CHIP) for _ in range(2)] == [False, False]
  (message,) = caplog.messages
  assert message == f"routed experts are computed by MaxText's grouped products: {layer.only_maxtext}"


@pytest.mark.parametrize(
  ("sparse", "level", "ends"), [(True, "WARNING", "use sparse_matmul=false"), (False, "INFO", "test")]
)
def test_the_log_warns_on_a_gpu(caplog, sparse, level, ends):
  layer = layer_of(only_maxtext=f"sparse={sparse} in this test")
  layer.config.sparse_matmul = sparse
  with caplog.at_level("INFO", "maxtext_ling2"):
    assert not fused_experts.computes(layer, None, None, "NVIDIA H100 80GB HBM3")
  (record,) = caplog.records
  assert (record.levelname, record.getMessage()[-len(ends) :]) == (level, ends)
