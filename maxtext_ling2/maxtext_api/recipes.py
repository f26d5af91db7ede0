"""Recipes: base YAML files of training runs.

MODEL-TOPOLOGY sets batch, mesh and memory options for a slice; pretrain_... optimizer, learning rate, objective and data.
"""

from pathlib import Path

from maxtext_ling2.errors import Ling2Error

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"


class RecipeError(Ling2Error, ValueError):
  """No recipe has this name, or it is for another model."""


def names() -> list[str]:
  """Names of all recipes for a slice, MODEL-TOPOLOGY."""
  return sorted(path.stem for path in FOLDER.glob("*-*.yml"))


def trainings() -> list[str]:
  """Names of all recipes for pre-training."""
  return sorted(path.stem for path in FOLDER.glob("pretrain_*.yml"))


def file_of(recipe: str) -> Path:
  """Finds the YAML file of a recipe.

  Args:
    recipe: one of `names()` or `trainings()`, or the path of the user's own file.

  Raises:
    RecipeError: it is neither.
  """
  path = Path(recipe) if recipe.endswith(".yml") else FOLDER / f"{recipe}.yml"
  if not path.is_file():
    raise RecipeError(
      f"{recipe}: no such recipe; use one of {', '.join(names() + trainings())}, or the file of your own .yml"
    )
  return path


def title(recipe: str) -> str:
  """The first line of a recipe, its title."""
  return file_of(recipe).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
