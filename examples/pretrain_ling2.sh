#!/usr/bin/env bash
# Pre-trains LING2 with a recipe of this package (maxtext_ling2/configs/recipes) on a Megatron mmap data set.
#   DATA=/data/prefix OUT=gs://bucket/out examples/pretrain_ling2.sh [KEY=VALUE...]
#   CPU=1 examples/pretrain_ling2.sh       ling2-tiny, 3 steps, two forced CPU devices, a temporary folder
# RECIPE=pretrain_ling2 has the values of the script that the model comes from; pretrain_ling2_recommended, the default,
# names what differs and why. DATA is a path without .bin and .idx; EOD is the end-of-document token in it. Samples and their
# order are Megatron's; the indices that say so are kept in INDEX, beside the data unless it is given.
# On a single host add skip_jax_distributed_system=true.
set -euo pipefail
source "$(dirname "$0")/common.sh"

recipe=$("$python" -m maxtext_ling2 recipe "${RECIPE:-pretrain_ling2_recommended}")
steps=${STEPS:-100000} expert=${EXPERT:-8} rows=${ROWS:-1} warmup=250
sizes=()
if [ -n "${BASE_YML:-}" ]; then  # the recipe's values on the model of your yml
  cp "$(dirname "$recipe")"/*.yml "$work"
  sed -i -e "s|^base_config: \"base.yml\"|base_config: \"$BASE_YML\"|" -e "s|^model_name: .*|model_name: \"$MODEL\"|" "$work"/*.yml
  recipe=$work/$(basename "$recipe")
fi
if [ "${CPU:-}" = 1 ]; then
  steps=3 expert=2 warmup=1 EOD=2 OUT=$work
  sizes=(max_target_length=64 scan_layers=false gradient_accumulation_steps=2)
  if [ -z "${BASE_YML:-}" ]; then sizes+=(model_name="$MODEL" base_num_decoder_layers=5); fi
  export XLA_FLAGS=--xla_force_host_platform_device_count=2
  DATA=$("$python" -c "import pathlib, sys; from maxtext_ling2.demo import data; print(data.prepare(pathlib.Path(sys.argv[1])).prefix)" "$work/data")
fi
eod=${EOD:-156892}
index=${INDEX:-$(dirname "${DATA:?prefix of a Megatron data set}")/index}

"$python" -m maxtext.trainers.pre_train.train "$recipe" "${common[@]}" \
  run_name="${RUN:-ling2}" base_output_directory="${OUT:?a folder or bucket}" steps="$steps" "${sizes[@]}" \
  warmup_steps_fraction="$(awk "BEGIN { print $warmup / $steps }")" \
  per_device_batch_size="$rows" ici_expert_parallelism="$expert" ici_fsdp_parallelism=-1 \
  grain_train_files="$index|$DATA" mmap_eod_id="$eod" pad_id="$eod" grain_worker_count="${WORKERS:-0}" "$@"
