"""What one loss over LING2's vocabulary computes, moves, sends and keeps on each device of a slice, in several forms.

    python benchmarks/loss_traffic.py v6e-64 --rows 4               one table
    python benchmarks/loss_traffic.py v6e-64 ici_tensor_parallelism=8 --form here --form "MaxText's MTP loss"
    python benchmarks/loss_traffic.py                               all: writes benchmarks/results/loss_traffic.{json,md}

The program: final norm, logits, loss, and the gradients of hidden states, norm and output matrix, of `ling2` under its
mesh (FSDP over all devices), 4096 tokens per sequence, bfloat16, weights float32, with LING2's XLA flags. Compiled ahead
of time and counted as `maxtext-ling2 plan` does (`maxtext_ling2/plan/operations.py`). Milliseconds: each instruction for
the longer of its computing and its bytes, one after the other, without collectives. "kept" are the temporaries at the
peak, GiB. `num_vocab_tiling` is the number of sequences per device, 2 at least. Bytes and operations of tokamax's kernels
are calculated from their grids; the rest of its program is counted.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "DECOUPLE_GCLOUD": "TRUE"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # another process may be compiling, too

RESULTS = Path(__file__).parent / "results"
CASES = (("v6e-64", 1), ("v6e-64", 4), ("v5p-64", 4), ("tpu7x-64", 12))
"""(topology, sequences per device): the recipes', and one sequence."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One form on one slice; all figures are per device and loss.

  Attributes:
    topology: MaxText's compile_topology.
    rows: sequences per device.
    form: as in `loss_forms.FORMS`.
    gigabytes: read from and written to the HBM, without collectives.
    teraflops: of matrix products.
    ms: see above.
    sent: gigabytes to other devices.
    kept: GiB.
  """

  topology: str
  rows: int
  form: str
  gigabytes: float
  teraflops: float
  ms: float
  sent: float
  kept: float


def count(topology: str, rows: int, form: str, extra: Sequence[str] = ()) -> Row:
  """Compiles a form in this process; `extra` are settings of MaxText."""
  from benchmarks import loss_forms
  from maxtext_ling2.plan.chips import chip_of
  from maxtext_ling2.plan.operations import read_program

  function = loss_forms.FORMS[form]
  settings = {"num_vocab_tiling": max(rows, 2)} if function is loss_forms.tiled else {}
  config = _config(topology, rows, settings, extra)
  compiled = _compile(function, config)
  chip = chip_of(topology)
  operations = read_program(compiled.as_text()).operations
  by_hand: list[tuple[float, float]] = []
  if function is loss_forms.kernels:
    tokens = rows * config.max_target_length
    product = 2.0 * tokens * config.emb_dim * config.vocab_size
    by_hand = [(4 * product, loss_forms.kernel_bytes(tokens, config.emb_dim, config.vocab_size))]
  counted = [one for one in operations if not one.collectives and not one.name.startswith(loss_forms.KERNELS)]
  work = [(one.run_count * one.flops, one.run_count * one.memory) for one in counted] + by_hand
  return Row(
    topology=topology,
    rows=rows,
    form=form,
    gigabytes=sum(memory for _, memory in work) / 1e9,
    teraflops=sum(flops for flops, _ in work) / 1e12,
    ms=sum(max(flops / chip.flops, memory / chip.memory_bandwidth) for flops, memory in work) * 1e3,
    sent=sum(one.run_count * one.network_bytes for one in operations) / 1e9,
    kept=compiled.memory_analysis().temp_size_in_bytes / 2**30,
  )


def _config(topology: str, rows: int, settings: dict[str, Any], extra: Sequence[str]) -> Any:
  from maxtext_ling2.host.compile_step import read_config
  from maxtext_ling2.maxtext_api import overrides
  from maxtext_ling2.maxtext_api.start import maxtext_folder

  given = {"model_name": "ling2", "override_model_config": True, "base_num_decoder_layers": 2, "mtp_num_layers": 0}
  given |= {"compile_topology": topology, "compile_topology_num_slices": 1, "per_device_batch_size": rows}
  given |= {"log_config": False, "enable_goodput_recording": False, "jax_cache_dir": "", **settings}
  words = overrides.words(given)
  return read_config(str(maxtext_folder() / "configs" / "base.yml"), [*words, *extra])


def _compile(form: Any, config: Any) -> Any:
  """The loss and its gradients, for the devices of the config's topology."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from maxtext.models import models
  from maxtext.trainers.pre_train import train_compile
  from maxtext.utils.sharding import create_sharding
  from maxtext.utils.vocabulary_tiling import _is_output_head_param_path

  from maxtext_ling2.maxtext_api import session
  from maxtext_ling2.training.xla_flags import compiler_options

  mesh = train_compile.get_topology_mesh(config)
  options = compiler_options(config, mesh.devices.flat[0], {})
  with session.model_context(config, mesh):
    model = nnx.eval_shape(lambda: models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(0)))
    graph, head, rest = nnx.split(model, nnx.All(nnx.Param, _is_output_head_param_path), ...)
    placed = jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, leaf.sharding.spec), head)
    tokens = create_sharding(mesh, ("activation_batch", "activation_length"))
    states = create_sharding(mesh, ("activation_batch", "activation_length", "activation_embed"))

    def program(head: Any, hidden: jax.Array, data: dict[str, jax.Array]) -> Any:
      def loss(head: Any, hidden: jax.Array) -> jax.Array:
        others = jax.tree.map(_nothing, rest)  # layers, which the loss does not read
        return form(nnx.merge(graph, head, others), hidden, data, config)

      return jax.value_and_grad(loss, argnums=(0, 1))(head, hidden)

    shape = (config.micro_batch_size_to_train_on, config.max_target_length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    arguments = (
      jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), head),
      jax.ShapeDtypeStruct((*shape, config.emb_dim), jnp.bfloat16),
      {"targets": ids, "targets_segmentation": ids},
    )
    jitted = jax.jit(
      program,
      in_shardings=(placed, states, {"targets": tokens, "targets_segmentation": tokens}),
      out_shardings=(jax.sharding.NamedSharding(mesh, jax.P()), (placed, states)),
      compiler_options=options,
    )
    return jitted.lower(*arguments).compile()


def _nothing(leaf: Any) -> Any:
  """Zeros, or a random key, in the shape of an abstract variable."""
  import jax
  import jax.numpy as jnp

  if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jnp.zeros(leaf.shape, leaf.dtype)
  return jax.random.split(jax.random.key(0), leaf.shape) if leaf.shape else jax.random.key(0)


def table(rows: Sequence[Row]) -> str:
  """As Markdown."""
  lines = ["| slice | sequences | form | GB | TFLOP | ms | GB sent | GiB kept |", "|---|---|---|---|---|---|---|---|"]
  for row in rows:
    figures = (row.gigabytes, row.teraflops, row.ms, row.sent, row.kept)
    lines.append(f"| {row.topology} | {row.rows} | {row.form} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
  return "\n".join(lines) + "\n"


def main() -> None:
  from benchmarks import loss_forms

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("topology", nargs="?", help="MaxText's compile_topology; without it all")
  parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of MaxText")
  parser.add_argument("--rows", type=int, default=4, help="sequences per device")
  parser.add_argument("--form", action="append", choices=loss_forms.FORMS, help="only this (may be given more than once)")
  parser.add_argument("--json", action="store_true", help="prints JSON in place of a table")
  options = parser.parse_args()
  cases = [(options.topology, options.rows)] if options.topology else CASES
  found = []
  for topology, rows in cases:
    for form in options.form or loss_forms.FORMS:
      try:
        found.append(count(topology, rows, form, options.settings))
      except Exception as error:  # compilers raise what they like
        print(f"{topology}, {form}: {str(error).splitlines()[0][:300]}", file=sys.stderr)
  print(json.dumps([dataclasses.asdict(row) for row in found]) if options.json else table(found))
  if not options.topology and not options.form:
    versions = {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu", "tokamax")}
    kept = {"versions": versions, "rows": [dataclasses.asdict(row) for row in found]}
    (RESULTS / "loss_traffic.json").write_text(json.dumps(kept, indent=1) + "\n")
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    (RESULTS / "loss_traffic.md").write_text(f"{made}.\n\n{table(found)}")


if __name__ == "__main__":
  main()
