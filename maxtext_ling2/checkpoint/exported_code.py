"""The PyTorch code in an exported folder (`torch_code/`), and the keys of config.json that refer to it.

transformers loads it with `trust_remote_code=True`. Without that, transformers >= 5.20 would silently build Ling 3.0,
which has the same model_type; so config.json also names a weight file that does not exist, and loading fails. The class
of `torch_code/configuration_ling2.py` removes that name.
"""

import ast
import shutil
from pathlib import Path
from typing import Any

from maxtext_ling2.checkpoint import disk

FOLDER = Path(__file__).parent / "torch_code"
FILES = ("configuration_ling2.py", "attention_ling2.py", "modeling_ling2.py")


def _constants(path: Path, *names: str) -> list[Any]:
  """Literals that a module assigns to these names; read without importing it, since it needs PyTorch."""
  body = ast.parse(path.read_text(encoding="utf-8")).body
  assigned = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
  return [ast.literal_eval(assigned[name]) for name in names]


def keys() -> dict[str, Any]:
  """The keys that config.json has in addition to the model's settings."""
  auto_map, guard = _constants(FOLDER / FILES[0], "AUTO_MAP", "GUARD")
  return {"auto_map": auto_map, "transformers_weights": guard}


def write(folder: Path) -> None:
  """Copies the code into an exported folder."""
  for name in FILES:
    shutil.copyfile(FOLDER / name, folder / name)
    disk.sync(folder / name)
