"""`maxtext-ling2 run MODULE ARGS...`: what `python -m MODULE ARGS...` does, with the plugin in place."""

import importlib.util
import runpy
import sys

USAGE = """\
usage: python -m maxtext_ling2 run MODULE [ARGS...]
Runs MODULE as `python -m MODULE ARGS...` does, with LING2 in place also where Python does not process .pth files, as in
  python -m maxtext_ling2 run maxtext.trainers.pre_train.train CONFIG.yml model_name=ling2
"""


def run(arguments: list[str]) -> None:
  """Run the module ``arguments[0]`` as ``__main__`` with the rest as its arguments."""
  if not arguments or arguments[0].startswith("-"):
    wants_help = arguments[:1] in (["-h"], ["--help"])
    (sys.stdout if wants_help else sys.stderr).write(USAGE)
    sys.exit(0 if wants_help else 2)
  module = arguments[0]
  try:
    found = _exists(module)
  except ModuleNotFoundError as error:  # raised by a package that it is in
    sys.exit(_without_dependencies(error))
  if not found:
    sys.exit(f"maxtext_ling2 run: there is no module {module!r} on this Python's path; give a name as for `python -m`.")
  if _is_package(module) and not _exists(f"{module}.__main__"):
    sys.exit(f"maxtext_ling2 run: {module!r} is a package without a __main__; give the name of one of its modules.")
  sys.argv = [module, *arguments[1:]]  # alter_sys then puts the module's file in the first place, as -m does
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except ModuleNotFoundError as error:
    sys.exit(_without_dependencies(error))


def _without_dependencies(error: ModuleNotFoundError) -> str:
  """What to do where MaxText was installed without an extra; an error of another kind is raised again."""
  from maxtext_ling2.errors import missing_dependency

  text = None if _exists("jax") else missing_dependency(error)
  if text is None:
    raise error
  return f"error: {text}"


def _exists(module: str) -> bool:
  """Whether Python finds the module; an import that fails inside one of its parent packages is passed on as it is."""
  if module.startswith("."):  # relative, but to nothing
    return False
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError as error:
    if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
      return False
    raise


def _is_package(module: str) -> bool:
  spec = importlib.util.find_spec(module)
  return spec is not None and spec.submodule_search_locations is not None
