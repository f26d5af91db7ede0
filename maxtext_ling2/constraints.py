"""Where the versions of other packages are with which the tests passed, for `pip install -c`.

It imports nothing: `python -m maxtext_ling2 constraints` answers in an environment that has this package alone, before
anything that it names is installed.
"""

from pathlib import Path

PATH = Path(__file__).with_name("constraints.txt")
"""A pip constraints file: NAME==VERSION per line, and comments."""
