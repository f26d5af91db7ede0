"""docs/architecture.md: paths exist, imports go one way, no TPU generation is forgotten. The example of docs/api.md."""

import ast
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import experts_tiles, gla_tpu_static, tpu_static
from maxtext_ling2.ops.experts import block_sizes as experts_block_sizes
from maxtext_ling2.ops.experts import tiles
from maxtext_ling2.ops.gla import block_sizes
from maxtext_ling2.plan import chips
from sandbox import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "maxtext_ling2"


def words() -> set[str]:
  """Each word of the page's code spans."""
  return {word for span in re.findall(r"`([^`\n]+)`", PAGE) for word in span.split()}


def is_path(word: str) -> bool:
  first = word.partition("/")[0]
  return word.endswith(".py") or ("/" in word and ((ROOT / first).is_dir() or (PACKAGE / first).is_dir()))


def test_files_and_folders_on_the_page_exist() -> None:
  paths = sorted(filter(is_path, (word.partition("::")[0] for word in words())))
  assert len(paths) > 80
  assert [path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists()] == []


def test_tests_on_the_page_exist() -> None:
  named = sorted(tuple(word.split("::")) for word in words() if "::" in word)
  assert len(named) > 10
  assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


def imported(folder: str) -> set[str]:
  """The top-level package, or for ours the folder or module in it, of each import in a folder of the package."""
  found = set()
  for path in (PACKAGE / folder).rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      else:
        continue
      parts = [name.split(".") for name in names]
      found |= {part[1] if part[0] == PACKAGE.name else part[0] for part in parts}
  return found


def test_ops_and_configs_know_no_maxtext() -> None:
  ours = {path.stem for path in PACKAGE.iterdir()} | {"maxtext"}
  assert imported("ops") & ours == {"ops"}
  assert imported("configs") & ours <= {"configs", "ops", "errors"}
  assert "maxtext" in imported("model")  # it would be found


def test_every_generation_is_in_every_benchmark() -> None:
  """TPU v4 has no targets: its kernels are compiled, not counted."""
  assert experts_tiles.CHIPS.keys() == chips.CHIPS.keys()
  for name, kind in experts_tiles.CHIPS.items():
    assert chips.peak_flops(SimpleNamespace(device_kind=kind)) == chips.CHIPS[name].flops
  assert {*gla_tpu_static.TESTED.values(), "TPU v4"} == {*experts_tiles.CHIPS.values()}
  assert {name.replace("v7x", "tpu7x") for name in tpu_static.CHIPS} == chips.CHIPS.keys()


def test_every_generation_has_block_sizes() -> None:
  """TPU kernels have block sizes for every generation; other devices take the defaults."""
  kinds = set(experts_tiles.CHIPS.values())
  assert block_sizes._BLOCK_SIZES.keys() == tiles._CHIPS.keys() == experts_block_sizes._CHIPS.keys() == kinds


def test_the_page_links_to_pages_only() -> None:
  """The site has no README and no code; those are named by their path."""
  targets = re.findall(r"\]\(([^)#]+)", PAGE)
  assert len(targets) > 3
  assert [name for name in targets if not Path(ROOT / "docs" / name).is_file()] == []


def test_python_of_the_api_page() -> None:
  """The last output is the last query by the last state."""
  (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
  names: dict[str, Any] = {}
  exec(compile(text, "api.md", "exec"), names)
  last = np.einsum("bhd,bhde->bhe", *(np.asarray(x, np.float64) for x in (names["q"][:, -1], names["state"])))
  assert names["o"].shape == (1, 100, 16, 128)
  np.testing.assert_allclose(names["o"][:, -1], last * 128**-0.5, rtol=1e-5, atol=1e-5)


def test_no_two_files_of_tests_have_one_name() -> None:
  """pytest imports them by their names alone here, and would run only the first of two."""
  found = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
  assert [name for name, count in found.items() if count > 1] == []
