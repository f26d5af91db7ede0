"""Recipes: base ymls of training runs.

MODEL-TOPOLOGY: batch, mesh and memory for a slice. pretrain_...: optimizer, rate, objective and data of a pre-training.
"""

from pathlib import Path

from maxtext_ling2.errors import Ling2Error

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"


class RecipeError(Ling2Error, ValueError):
  """There is no recipe of this name, or it is for another model."""


def names() -> list[str]:
  """All recipes of a slice, MODEL-TOPOLOGY."""
  return sorted(path.stem for path in FOLDER.glob("*-*.yml"))


def trainings() -> list[str]:
  """All recipes of a pre-training."""
  return sorted(path.stem for path in FOLDER.glob("pretrain_*.yml"))


def file_of(recipe: str) -> Path:
  """The yml of a recipe.

  Args:
    recipe: one of `names()` or `trainings()`, or the path of a yml of the user's.

  Raises:
    RecipeError: neither.
  """
  path = Path(recipe) if recipe.endswith(".yml") else FOLDER / f"{recipe}.yml"
  if not path.is_file():
    raise RecipeError(
      f"{recipe}: no such recipe; use one of {', '.join(names() + trainings())}, or the file of your own .yml"
    )
  return path


def title(recipe: str) -> str:
  """The first line of a recipe, what it is for."""
  return file_of(recipe).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
