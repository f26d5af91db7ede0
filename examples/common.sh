# Sourced by the other examples: where MaxText's base.yml is, and with CPU=1 a temporary folder and settings for a CPU.
python=${PYTHON:-python}
maxtext=$("$python" -c "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])")
base=$maxtext/configs/base.yml

# name=value words for every run of MaxText; on a CPU the kernels of sparse_matmul would run in an interpreter.
common=(override_model_config=true enable_goodput_recording=false)
if [ "${CPU:-}" = 1 ]; then
  export JAX_PLATFORMS=cpu DECOUPLE_GCLOUD=TRUE
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  common+=(hardware=cpu skip_jax_distributed_system=true dtype=float32 sparse_matmul=false)
  common+=(log_config=false jax_cache_dir= enable_tensorboard=false)
fi
