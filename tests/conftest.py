"""Environment of all tests: the CPU, no cloud clients, compiled programs kept between runs. `make test` may differ."""

import os
from pathlib import Path

_CACHE = Path(__file__).parent.parent / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
# MaxText sets XLA_FLAGS to dump each program where nobody has set it; that makes every compilation miss the cache.
os.environ.setdefault("XLA_FLAGS", "--xla_dump_max_hlo_modules=0")

import maxtext_ling2  # noqa: E402, F401  before MaxText, as the .pth file would
