"""The PyTorch code that an exported folder carries (`torch_code/`), and the keys of config.json that lead to it.

transformers builds it with `trust_remote_code=True`. Without, transformers >= 5.20 would silently build Ling 3.0, which
has the same model_type; so config.json also names a weight file that does not exist, and loading fails. The class of
`torch_code/configuration_ling2.py` takes that name out again.
"""

import ast
import shutil
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "torch_code"
FILES = ("configuration_ling2.py", "attention_ling2.py", "modeling_ling2.py")


def _constants(path: Path) -> dict[str, Any]:
  """Literals that a module assigns to names, without importing it: it needs PyTorch and transformers."""
  body = ast.parse(path.read_text(encoding="utf-8")).body
  assigned = (node for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Dict))
  return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned if isinstance(node.targets[0], ast.Name)}


def keys() -> dict[str, Any]:
  """What config.json of a folder with this code says beside the model's settings."""
  constants = _constants(FOLDER / FILES[0])
  return {"auto_map": constants["AUTO_MAP"], "transformers_weights": constants["GUARD"]}


def write(folder: Path) -> None:
  """Puts the code into an exported folder."""
  for name in FILES:
    shutil.copyfile(FOLDER / name, folder / name)
