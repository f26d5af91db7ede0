"""LoRA: which modules MaxText adapts in a LING2 model, that adapters act, and what their export and merge hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from maxtext.utils import lora_utils

import tiny
from maxtext_ling2.checkpoint import lora, stacking
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model import adapters

RANK, ALPHA = 3, 6.0
SIZES = {"base_num_decoder_layers": 6, "sparse_matmul": False}
EXPECTED = {
  **{f"gla/{name}": 4 for name in ("query_key_value", "output_gate", "out")},
  **{f"mla/{name}": 2 for name in ("wq_a", "wq_b", "wkv_a", "wkv_b", "out")},
  **{f"mlp/{name}": 1 for name in ("wi_0", "wi_1", "wo")},
  **{f"shared_experts/{name}": 5 for name in ("wi_0", "wi_1", "wo")},
}
"""Layers of each kind: 6 layers in cycles of 3, the first one dense."""


def config(path="", **settings):
  options = {"enable_lora": True, "lora_rank": RANK, "lora_alpha": ALPHA, "lora_module_path": path}
  return tiny.config(lora=options | settings.pop("lora", {}), **SIZES | settings)


def adapted(cfg, network, mesh):
  """The model with adapters, as MaxText makes it; traced instead of computed, as far as the base's values matter."""
  with session.model_context(cfg, mesh):
    return nnx.eval_shape(lambda network: lora_utils.apply_lora_to_model(network, None, cfg), network)


def factors(model, seed=0):
  """Random numbers for all adapters, by path."""
  flat = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
  rng = np.random.default_rng(seed)
  return {path: (rng.standard_normal(variable.shape) * 0.2).astype(np.float32) for path, variable in flat.items()}


def save(folder, values):
  """A checkpoint of adapters in the form in which tunix saves them."""
  import orbax.checkpoint as ocp

  tree = {}
  for path, value in values.items():
    node = functools.reduce(lambda node, key: node.setdefault(key, {}), map(str, path[:-1]), tree)
    node[path[-1]] = {"value": value}
  ocp.PyTreeCheckpointer().save(folder.resolve(), tree)
  return folder


def logits(cfg, mesh, network, values=()):
  """Logits [B, T, V] of a model, with these adapters."""
  data = tiny.batch(cfg)
  graph, state = nnx.split(network)
  flat = dict(nnx.to_flat_state(state))
  for path, variable in flat.items():
    if path in values:
      flat[path] = variable.replace(jnp.asarray(values[path]))
  state = nnx.from_flat_state(list(flat.items()))
  arrays = [data[name] for name in ("inputs", "inputs_position", "inputs_segmentation")]
  with session.model_context(cfg, mesh):
    run = jax.jit(lambda state: nnx.merge(graph, state)(*arrays, enable_dropout=False))
    return np.asarray(run(state))


class Case:
  """A model with random adapters, of one layout."""

  def __init__(self, scan, path=""):
    self.config = config(path, scan_layers=scan)
    self.base, self.mesh = tiny.model(self.config)
    self.model = adapted(self.config, self.base, self.mesh)
    self.values = factors(self.model)


@pytest.fixture(scope="module", params=[False, True], ids=["unscanned", "scanned"])
def case(request):
  return Case(request.param)


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
  return save(tmp_path_factory.mktemp("lora") / "model_params", case.values)


def test_default_path_adapts_all_projections(case):
  modules = {tuple(path): module for path, module in nnx.iter_modules(case.model)}
  paths = {path[:-1] for path in case.values}
  assert adapters.counts(paths, modules, case.config) == ", ".join(f"{k} {n}" for k, n in sorted(EXPECTED.items()))
  assert len(case.values) == 2 * len(paths)
  assert not any("mtp_block" in path or adapters.EXPERTS in path for path in paths)


def test_adapted_logits_are_those_of_the_merged_weights(case, saved):
  """Each adapter acts, in the place and with the scale that the export gives it."""
  read = lora.from_checkpoint(epath.Path(saved), case.config)
  assert len(read.by_name) == sum(EXPECTED.values()) and read.rank == RANK
  merged = {}
  for leaf in stacking.leaves(case.config):
    whole = tuple(slice(0, size) for size in leaf.shape)
    merged[leaf.path] = read.added(leaf, whole, tiny.weights(case.config)[leaf.path])
  state = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(case.base))}
  filled = nnx.from_flat_state(
    [
      (path, variable.replace(state.get(path))) if path in state else (path, variable)
      for path, variable in nnx.to_flat_state(nnx.state(case.model))
    ]
  )
  nnx.update(case.model, filled)
  ours = logits(case.config, case.mesh, case.model, case.values)
  plain = tiny.config(**SIZES, scan_layers=case.config.scan_layers)
  network, mesh = tiny.model(plain, merged)
  theirs = logits(plain, mesh, network)
  base = logits(plain, case.mesh, case.base)
  real = tiny.batch(plain)["inputs_segmentation"] > 0
  assert np.abs(theirs - base)[real].max() > 0.1
  np.testing.assert_allclose(ours[real], theirs[real], atol=2e-4, rtol=0)
