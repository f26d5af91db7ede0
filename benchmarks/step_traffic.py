"""What a train step of ling2 moves from and to the HBM, by part of the model, with the GLA layer plain and fused.

    python benchmarks/step_traffic.py --topology v6e-16   compiles the step twice, in processes of their own; half an hour
    python benchmarks/step_traffic.py ici_expert_parallelism=8   the same with settings of MaxText

"Plain" is `layer_cases.PlainComposition`: modules in a row, with GLA as a kernel. All else is the plugin's, with
MaxText's defaults: scanned layers, full rematerialisation, FSDP over all devices, one row of 4096 tokens a device. Bytes
are those of `maxtext_ling2/plan/operations.py`: per device and step, of the program that libtpu compiles. An operation
belongs to the part of the model whose source it comes from (`maxtext_ling2/plan/parts.py`); what the compiler adds has
none. Results are kept in benchmarks/results/step_traffic.json.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results" / "step_traffic.json"
FORMS = ("plain", "fused")

PLAIN = "layer_cases.py"
"""Where the plain layer's operations come from."""


def part(name: str, sources: Sequence[str]) -> str:
  """As `maxtext_ling2.plan.parts`, which does not know the plain layer."""
  from maxtext_ling2.plan import parts

  return "GLA" if any(PLAIN in source for source in sources) else parts.part(name, sources)


def compiled_parts(topology: str, form: str, extra: Sequence[str]) -> dict[str, float]:
  """{part: bytes} of a step compiled in this process."""
  from benchmarks.layer_cases import PlainComposition
  from maxtext_ling2.host.compile_step import compile_step
  from maxtext_ling2.maxtext_api import overrides
  from maxtext_ling2.maxtext_api.start import maxtext_folder
  from maxtext_ling2.model import layer
  from maxtext_ling2.plan.chips import slice_of
  from maxtext_ling2.plan.floor import Shares, routed_rows
  from maxtext_ling2.plan.operations import read_program
  from maxtext_ling2.plan.parts import memory_by

  settings = {"model_name": "ling2", "compile_topology": topology, "compile_topology_num_slices": "1"}
  settings |= {"override_model_config": "true", "scan_layers": "true", "enable_goodput_recording": "false"}
  settings |= {"per_device_batch_size": "1", "gla_backend": "pallas", "log_config": "false"}
  words = overrides.join(settings | overrides.parse(extra))
  attention = PlainComposition if form == "plain" else layer.GatedLinearAttention
  with mock.patch.object(layer, "GatedLinearAttention", attention):
    step = compile_step(str(maxtext_folder() / "configs" / "base.yml"), words)
  rows = routed_rows(step.config, Shares.of(step.config, slice_of(topology).devices))
  return memory_by(read_program(step.compiled.as_text(), rows).operations, part)


def table(found: dict[str, dict[str, float]]) -> str:
  """As Markdown, in GB."""
  lines = ["| part | plain | fused |", "|---|---|---|"]
  names = list(dict.fromkeys([*found["plain"], *found["fused"]]))
  rows = {name: [found[form].get(name, 0.0) for form in FORMS] for name in names}
  rows["all"] = [sum(found[form].values()) for form in FORMS]
  lines += [f"| {name} | {plain / 1e9:.1f} | {fused / 1e9:.1f} |" for name, (plain, fused) in rows.items()]
  plain, fused = rows["all"]
  return "\n".join([*lines, "", f"fused moves {1 - fused / plain:.1%} fewer bytes"])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v6e-16", help="as MaxText's compile_topology")
  parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of MaxText")
  parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.form:
    print(json.dumps(compiled_parts(options.topology, options.form, options.settings)))
    return
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "DECOUPLE_GCLOUD": "TRUE"}
  found = {}
  for form in FORMS:
    command = [sys.executable, __file__, "--topology", options.topology, "--form", form, *options.settings]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found[form] = json.loads(done.stdout.splitlines()[-1])
  keep(" ".join([options.topology, *options.settings]), found)
  print(table(found))


def keep(case: str, found: dict[str, dict[str, float]]) -> None:
  """Writes the result of a topology, and settings, beside those of others."""
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  versions = {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")}
  results[case] = {"versions": versions, "bytes": found}
  RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
