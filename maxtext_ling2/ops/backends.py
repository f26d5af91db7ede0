"""Names of the backends of linear attention and experts, for code that must not import JAX: the rules of the config."""

from typing import Final

GLA_BACKENDS: Final = ("auto", "reference", "chunked", "pallas")
"""What `ops.gla.gla` takes as `backend`."""

EXPERTS_BACKENDS: Final = ("auto", "reference", "xla", "pallas")
"""What `ops.experts.experts` takes as `backend`."""
