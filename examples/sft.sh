#!/usr/bin/env bash
# Fine-tunes LING2 on conversations with MaxText's native SFT trainer (train_sft, the other one, needs tunix).
#   CHECKPOINT=/checkpoints/flash/0/items MODEL=ling2.6-flash TOKENIZER=/models/Ling-2.6-flash DATA=chat.jsonl OUT=/out \
#     examples/sft.sh [KEY=VALUE...]
#   BASE_YML=my.yml ... examples/sft.sh    a model of your own instead of MODEL; the same in the other examples
#   CPU=1 examples/sft.sh                  ling2-tiny from random weights, 2 steps, two conversations
# A line of DATA: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
# The tokenizer's folder must have a chat template.
set -euo pipefail
source "$(dirname "$0")/common.sh"

steps=${STEPS:-1000} sizes=(max_target_length=4096 scan_layers=true)
if [ "${CPU:-}" = 1 ]; then
  TOKENIZER=$maxtext/assets/tokenizers/qwen3-tokenizer DATA=$work/chat.jsonl OUT=$work steps=2
  sizes=(max_target_length=64 scan_layers=false vocab_size=151936 num_epoch=100 base_num_decoder_layers=5)
  export HF_DATASETS_CACHE=$work/cache HF_HUB_OFFLINE=1
  for number in 1 2 3 4 5 6 7 8; do
    echo '{"messages": [{"role": "user", "content": "What is '$number' and one?"}, {"role": "assistant", "content": "It is '$((number + 1))'."}]}'
  done > "$DATA"
fi

"$python" -m maxtext.trainers.post_train.sft.train_sft_native "$base" model_name="${MODEL:?}" "${common[@]}" \
  run_name="${RUN:-sft}" base_output_directory="${OUT:?a folder or bucket}" steps="$steps" "${sizes[@]}" \
  ${CHECKPOINT:+load_parameters_path="$CHECKPOINT"} learning_rate=2e-5 per_device_batch_size="${ROWS:-1}" \
  dataset_type=hf hf_path=json hf_train_files="${DATA:?a jsonl file}" train_split=train train_data_columns="['messages']" \
  tokenizer_type=huggingface tokenizer_path="${TOKENIZER:?a folder}" sft_train_on_completion_only=true packing=true "$@"
