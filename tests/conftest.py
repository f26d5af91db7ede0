"""Environment of all tests: the CPU, no cloud clients, compiled programs kept between runs. `make test` may differ."""

import os
from pathlib import Path

_CACHE = Path(__file__).parent.parent / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
# MaxText sets XLA_FLAGS to dump each program where nobody has set it; that makes every compilation miss the cache. Tiny
# models run for milliseconds and compile for minutes: without LLVM's optimisations that takes a quarter less.
_FLAGS = ("dump_max_hlo_modules=0", "backend_optimization_level=0", "llvm_disable_expensive_passes=true")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in _FLAGS))

import maxtext_ling2  # noqa: E402, F401  before MaxText, as the .pth file would
