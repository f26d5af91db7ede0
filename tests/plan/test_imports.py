"""What `plan` is built on."""

import ast
from pathlib import Path

from maxtext_ling2 import plan


def test_plan_imports_no_demo():
  modules = set()
  for path in Path(plan.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom):
        modules.add(node.module)
      elif isinstance(node, ast.Import):
        modules |= {alias.name for alias in node.names}
  assert "maxtext_ling2.host.compile_step" in modules
  assert not [module for module in modules if module.startswith("maxtext_ling2.demo")]
