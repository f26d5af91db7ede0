"""LoRA: which modules MaxText adapts in a LING2 model, and that each adapter computes what its export holds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from maxtext.utils import lora_utils, max_logging

import tiny
from maxtext_ling2.checkpoint import lora, stacking
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model import adapters

RANK, ALPHA = 3, 6.0
SIZES = {"base_num_decoder_layers": 6, "sparse_matmul": False}
EXPERTS = r"decoder/.*/moe/MoeBlock_0"
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
  """The model as MaxText adapts it, traced: Qwix runs it operation by operation otherwise."""
  with session.model_context(cfg, mesh):
    return nnx.eval_shape(lambda network: lora_utils.apply_lora_to_model(network, None, cfg), network)


def save(folder, values):
  """A checkpoint of adapters in the form in which tunix saves them."""
  import orbax.checkpoint as ocp

  tree = {}
  for path, value in values.items():
    node = functools.reduce(lambda node, key: node.setdefault(key, {}), map(str, path[:-1]), tree)
    node[path[-1]] = {"value": value}
  ocp.PyTreeCheckpointer().save(folder.resolve(), tree)
  return folder


def modules(network):
  return {tuple(path): module for path, module in nnx.iter_modules(network)}


class Case:
  """A model with random adapters, of one layout; the unscanned one has adapters of experts, too."""

  def __init__(self, scan, folder):
    path = "" if scan else f"{adapters.MODULE_PATH}|{EXPERTS}"
    self.config = config(path, scan_layers=scan)
    self.base, self.mesh = tiny.model(self.config)
    self.lines = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(max_logging, "log", self.lines.append)
      self.model = adapted(self.config, self.base, self.mesh)
    nnx.pop(self.model, nnx.Intermediate)
    rng = np.random.default_rng(0)
    shapes = {path: value.shape for path, value in nnx.to_flat_state(nnx.state(self.model, nnx.LoRAParam))}
    self.values = {path: (rng.standard_normal(shape) * 0.2).astype(np.float32) for path, shape in shapes.items()}
    self.folder = save(folder / "model_params", self.values)

  def filled(self, values):
    """The adapted model with the base's weights and these adapters."""
    graph, state = nnx.split(self.model)
    known = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(self.base))} | values
    flat = [(path, variable.replace(_value(variable, known.get(path)))) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _value(variable, known):
  """The value of a variable; random streams, which no forward pass without dropout reads, start anew."""
  if not isinstance(variable, nnx.RngState):
    return jnp.asarray(known)
  shape, dtype = variable.get_value().shape, variable.get_value().dtype
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
  return jnp.zeros(shape, dtype)


@pytest.fixture(scope="module", params=[False, True], ids=["unscanned", "scanned"])
def case(request, tmp_path_factory):
  return Case(request.param, tmp_path_factory.mktemp("lora"))


def logits(cfg, mesh, network):
  """Logits [tokens, V] at all tokens but padding."""
  data = tiny.batch(cfg)
  graph, state = nnx.split(network)
  arrays = [data[name] for name in ("inputs", "inputs_position", "inputs_segmentation")]
  with session.model_context(cfg, mesh):
    run = jax.jit(lambda state: nnx.merge(graph, state)(*arrays, enable_dropout=False))
    return np.asarray(run(state))[data["inputs_segmentation"] > 0]


def test_the_default_path_is_all_projections(case):
  pattern = lora_utils._get_lora_module_path(config(scan_layers=case.config.scan_layers))
  assert pattern == adapters.MODULE_PATH
  found = modules(case.base)
  matched = [path for path in found if re.fullmatch(pattern, "/".join(map(str, path)))]
  expected = ", ".join(f"{kind} {number}" for kind, number in sorted(EXPECTED.items()))
  assert adapters.counts(matched, found, case.config) == expected
  given = {path[:-1] for path in case.values}
  experts = {path for path in found if path[-1:] == (adapters.EXPERTS,) and path[0] == "decoder"}
  assert given == set(matched) | (set() if case.config.scan_layers else experts)


def test_the_log_counts_what_is_adapted(case):
  (line,) = [line for line in case.lines if line.startswith("LING2: LoRA adapts ")]
  experts = {} if case.config.scan_layers else {"experts": 5}
  for kind, number in (EXPECTED | experts).items():
    assert f" {kind} {number}" in line
  assert f"; {len(case.values)} arrays, {sum(value.size for value in case.values.values())} parameters;" in line


def test_adapted_logits_are_those_of_the_merged_weights(case):
  """Each adapter acts, in the place and with the scale that its export has."""
  read = lora.from_checkpoint(epath.Path(case.folder), case.config)
  assert read.rank == RANK and len(read.by_name) == sum(EXPECTED.values()) + (not case.config.scan_layers) * 5 * 8 * 3
  merged = {}
  for leaf in stacking.leaves(case.config):
    whole = tuple(slice(0, size) for size in leaf.shape)
    merged[leaf.path] = read.added(leaf, whole, tiny.weights(case.config)[leaf.path])
  plain = tiny.config(**SIZES, scan_layers=case.config.scan_layers)
  network, mesh = tiny.model(plain, merged)
  expected = logits(plain, mesh, network)
  assert np.abs(expected - logits(plain, mesh, tiny.model(plain)[0])).max() > 0.5
  np.testing.assert_allclose(logits(case.config, case.mesh, case.filled(case.values)), expected, atol=1e-3)


def test_every_adapter_has_a_gradient(case):
  data, network = tiny.batch(case.config), case.filled(case.values)
  graph, trained, rest = nnx.split(network, nnx.LoRAParam, ...)
  arrays = [data[name] for name in ("inputs", "inputs_position", "inputs_segmentation")]

  def loss(trained):
    model = nnx.merge(graph, trained, rest, copy=True)
    return jnp.mean(jnp.square(model(*arrays, enable_dropout=False)))

  with session.model_context(case.config, case.mesh):
    gradient = jax.jit(jax.grad(loss))(trained)
  sizes = {path: float(jnp.abs(variable.get_value()).max()) for path, variable in nnx.to_flat_state(gradient)}
  assert sizes.keys() == case.values.keys() and min(sizes.values()) > 0


def test_maxtext_loads_what_is_converted(case, tmp_path):
  """Written by us from peft's form, restored by MaxText's own function."""
  if not case.config.scan_layers:
    pytest.skip("one of the factors of experts is shared, which peft's form does not say")
  read = lora.from_checkpoint(epath.Path(case.folder), case.config)
  lora.write(read, case.config, epath.Path(tmp_path / "0"), Storage())
  zeros = case.filled({path: np.zeros_like(value) for path, value in case.values.items()})
  cfg = config(
    scan_layers=True, lora={"lora_restore_path": str(tmp_path / "0" / "items"), "lora_rank": 0, "lora_alpha": 0.0}
  )
  restored = lora_utils.restore_lora_from_path(zeros, cfg)
  for path, variable in nnx.to_flat_state(nnx.state(restored, nnx.LoRAParam)):
    np.testing.assert_array_equal(variable.get_value(), case.values[path], err_msg=str(path))


@pytest.mark.parametrize(
  ("path", "settings", "message"),
  [
    ("decoder/layers/.*", {}, "it matches no module of this model"),
    ("self_attention/out", {}, "the whole path of a module must match"),
    (EXPERTS, {"sparse_matmul": True}, "sparse_matmul=true: Qwix cannot adapt the grouped products of routed experts"),
  ],
  ids=["nothing", "not the whole path", "sparse experts"],
)
def test_a_pattern_that_adapts_nothing_is_refused(case, path, settings, message):
  cfg = config(path, scan_layers=case.config.scan_layers, **settings)
  with pytest.raises(ValueError, match=r"lora.lora_module_path=") as error:
    adapted(cfg, case.base, case.mesh)
  assert message in str(error.value)


def test_qlora_quantises_what_it_adapts():
  """GLA's kernels included, which its own products reshape without adapters."""
  cfg = config(scan_layers=False, lora={"lora_weight_qtype": "nf4", "lora_tile_size": 8})
  network, mesh = tiny.model(cfg)
  found = modules(adapted(cfg, network, mesh))
  pattern = re.compile(adapters.MODULE_PATH)
  chosen = {path for path in found if pattern.fullmatch("/".join(map(str, path)))}
  quantised = {path for path, module in found.items() if type(getattr(module, "kernel", None)).__name__ == "WithAux"}
  assert quantised == chosen and len(chosen) == sum(EXPECTED.values())
