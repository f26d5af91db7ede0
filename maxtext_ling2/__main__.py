"""`python -m maxtext_ling2`: the command line.

`run` is handled before the command line is imported, so that the process holds nothing that the module which it runs does
not import; importing this package has just put the plugin in place.
"""

import sys


def main() -> None:
  """Handle `run`; leave everything else to the command line."""
  if sys.argv[1:2] == ["run"]:
    from maxtext_ling2.run_module import run

    run(sys.argv[2:])
  else:
    from maxtext_ling2.cli import main as command_line

    command_line()


if __name__ == "__main__":
  main()
