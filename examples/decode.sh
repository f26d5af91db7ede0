#!/usr/bin/env bash
# Lets a model go on with a text, and measures its loss on a file.
#   CHECKPOINT=OUT/run/checkpoints MODEL=ling2 TOKENIZER=/models/Ling examples/decode.sh [KEY=VALUE...]
#   CHECKPOINT=/models/Ling-2.6-flash examples/decode.sh     a Hugging Face folder needs neither MODEL nor TOKENIZER
#   CPU=1 examples/decode.sh               trains ling2-tiny for two steps first; what it writes means nothing
set -euo pipefail
source "$(dirname "$0")/common.sh"

prompt=${PROMPT:-The for statement is used to} tokens=${TOKENS:-100} text=${TEXT:-}
if [ "${CPU:-}" = 1 ]; then
    "$python" -m maxtext.trainers.pre_train.train "$base" model_name="$MODEL" "${common[@]}" run_name=tiny \
    base_output_directory="$work" dataset_type=synthetic steps=2 max_target_length=32 per_device_batch_size=1 \
    scan_layers=false save_checkpoint_on_completion=true
  CHECKPOINT=$work/tiny/checkpoints TOKENIZER=$maxtext/assets/tokenizers/tokenizer.llama2
  tokens=8 text=$work/text.txt
  echo "The for statement is used to iterate over the elements of a sequence." > "$text"
fi

model=${BASE_YML:-${MODEL:-}}
options=(${model:+--model "$model"} ${TOKENIZER:+--tokenizer "$TOKENIZER"})
"$python" -m maxtext_ling2 generate "${CHECKPOINT:?a MaxText checkpoint or a Hugging Face folder}" "${options[@]}" \
  --prompt "$prompt" --tokens "$tokens" "$@"
if [ -n "$text" ]; then
  "$python" -m maxtext_ling2 eval "$CHECKPOINT" "${options[@]}" --text "$text" "$@"
fi
