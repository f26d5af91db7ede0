"""`python -m maxtext_ling2`: the command line.

`run` and `constraints` are handled before the command line is imported: the process of `run` holds nothing but what its
module imports, and `constraints` answers where nothing but this package is installed. Importing this package has
just put the plugin in place.
"""

import sys


def main() -> None:
  """Handle `run` and `constraints`; leave everything else to the command line."""
  if sys.argv[1:2] == ["run"]:
    from maxtext_ling2.run_module import run

    run(sys.argv[2:])
  elif sys.argv[1:] == ["constraints"]:
    from maxtext_ling2 import constraints

    print(constraints.PATH)
  else:
    from maxtext_ling2.cli import main as command_line

    command_line()


if __name__ == "__main__":
  main()
