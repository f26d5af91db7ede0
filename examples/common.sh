# Sourced by the other examples: the base yml, a temporary folder, and with CPU=1 settings for a CPU.
# A model of your own is BASE_YML=my.yml, the YAML file that `maxtext-ling2 config HF_DIR -o my.yml` writes; its name,
# MODEL=ling2-custom, can be left out.
python=${PYTHON:-python}
if [ -n "${BASE_YML:-}" ]; then
  MODEL=${MODEL:-ling2-custom} BASE_YML=$(realpath "$BASE_YML")
elif [ "${MODEL:-}" = ling2-custom ]; then
  "$python" -c "from maxtext_ling2.configs import validation as v; raise SystemExit('Error: ' + v.no_sizes('MODEL=$MODEL', 'BASE_YML=my.yml'))"
fi
maxtext=$("$python" -c "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])")
base=${BASE_YML:-$maxtext/configs/base.yml}

# name=value words for every run of MaxText; on a CPU the kernels of sparse_matmul would run in an interpreter.
common=(override_model_config=true enable_goodput_recording=false)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "${CPU:-}" = 1 ]; then
  if [ -z "${BASE_YML:-}" ]; then MODEL=ling2-tiny; fi
  export JAX_PLATFORMS=cpu DECOUPLE_GCLOUD=TRUE
  common+=(hardware=cpu skip_jax_distributed_system=true dtype=float32 sparse_matmul=false)
  common+=(log_config=false jax_cache_dir= enable_tensorboard=false)
fi
