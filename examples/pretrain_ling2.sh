#!/usr/bin/env bash
# Pre-trains LING2 with the published recipe on a Megatron mmap data set.
#   DATA=/data/prefix EOD=156892 OUT=gs://bucket/out examples/pretrain_ling2.sh [KEY=VALUE...]
#   CPU=1 examples/pretrain_ling2.sh       ling2-tiny, 3 steps, two forced CPU devices, a temporary folder
# AdamW with b1 0.9, b2 0.95, weight decay 0.1, clipping at 1.0, peak 3.36e-4 after 250 steps of warm-up. The decay after
# the peak is MaxText's cosine. DATA is a path without .bin and .idx; EOD is the end-of-document token in it. Samples and
# their order are Megatron's; the indices that say so are kept in INDEX, beside the data unless it is given.
# On a single host add skip_jax_distributed_system=true.
set -euo pipefail
source "$(dirname "$0")/common.sh"

model=ling2 steps=${STEPS:-100000} expert=${EXPERT:-8} accumulation=${ACCUMULATION:-4} rows=${ROWS:-1} warmup=250
sizes=(max_target_length=4096 scan_layers=true)
if [ "${CPU:-}" = 1 ]; then
  model=ling2-tiny steps=3 expert=2 accumulation=2 warmup=1 EOD=2 OUT=$work
  sizes=(max_target_length=64 scan_layers=false base_num_decoder_layers=5)
  export XLA_FLAGS=--xla_force_host_platform_device_count=2
  DATA=$("$python" -c "import pathlib, sys; from maxtext_ling2.demo import data; print(data.prepare(pathlib.Path(sys.argv[1])).prefix)" "$work/data")
fi
index=${INDEX:-$(dirname "${DATA:?prefix of a Megatron data set}")/index}

"$python" -m maxtext.trainers.pre_train.train "$base" model_name="$model" "${common[@]}" \
  run_name="${RUN:-$model}" base_output_directory="${OUT:?a folder or bucket}" steps="$steps" "${sizes[@]}" \
  opt_type=adamw adam_b1=0.9 adam_b2=0.95 adam_weight_decay=0.1 gradient_clipping_threshold=1.0 \
  learning_rate=3.36e-4 warmup_steps_fraction="$(awk "BEGIN { print $warmup / $steps }")" \
  per_device_batch_size="$rows" gradient_accumulation_steps="$accumulation" \
  ici_expert_parallelism="$expert" ici_fsdp_parallelism=-1 \
  dataset_type=grain grain_file_type=mmap_npy grain_train_files="$index|$DATA" \
  mmap_eod_id="${EOD:?end-of-document token}" packing=true reset_attention_mask=true \
  packing_max_segments_per_sample=0 grain_worker_count="${WORKERS:-0}" "$@"
