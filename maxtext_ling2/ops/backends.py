"""Names of the backends of linear attention, for code that must not import JAX, such as the rules of the config."""

from typing import Final

GLA_BACKENDS: Final = ("auto", "reference", "chunked", "pallas")
"""What `ops.gla.gla` takes as `backend`."""
