"""LING2, the hybrid of gated linear attention and latent attention, for stock MaxText.

Where this package was installed into an environment nobody has to import it. Where Python does not process .pth
files (PYTHONPATH, ``--target``, ``-S``) the import is what puts the plugin in place; it costs next to nothing.
"""

from maxtext_ling2 import startup

__all__ = ["__version__"]

__version__ = "0.1.0"  # the only home of the version: pyproject.toml has it read here

startup.install("import")
