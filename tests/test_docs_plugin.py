"""The plugin of docs/another_plugin.md, as a distribution of its own in a process of its own."""

import os
import subprocess
import sys
import tomllib

import pytest

from test_docs import ROOT, blocks


@pytest.mark.parametrize(
  ("index", "statement", "printed"),
  [
    (0, "None", "None"),
    (1, "width(SimpleNamespace(model_name='mymodel')), REGISTRY.seams[0].state.name", "100 APPLIED"),
  ],
  ids=["least", "with our seams"],
)
def test_python_of_another_plugin(tmp_path, index, statement, printed):
  """As a distribution of its own, found by the entry point that the page declares."""
  page = ROOT / "docs" / "another_plugin.md"
  (declared,) = blocks(page, "toml")
  ((group, entries),) = tomllib.loads(declared)["project"]["entry-points"].items()
  folder = tmp_path / "mymodel-1.0.dist-info"
  for path in (folder, tmp_path / "mymodel"):
    path.mkdir()
  (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mymodel\nVersion: 1.0\n")
  (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]))
  (tmp_path / "mymodel" / "plugin.py").write_text(blocks(page, "python")[index])
  code = ["import maxtext", "from maxtext_ling2 import discovery"]
  if index:
    code += ["from types import SimpleNamespace", "from mymodel.plugin import REGISTRY"]
    code += ["from maxtext.utils.maxtext_utils import get_shared_expert_mlp_dim as width"]
  code += [f"print({statement})", "print(*((one.name, one.state, one.reason) for one in discovery.plugins), sep='\\n')"]
  variables = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", "\n".join(code)], env=variables, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-3:] == [printed, "('ling2', 'loaded', None)", "('mymodel', 'loaded', None)"]
