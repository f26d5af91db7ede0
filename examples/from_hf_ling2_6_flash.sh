#!/usr/bin/env bash
# Ling-2.6-flash from Hugging Face to a MaxText checkpoint; VERIFY=1 checks it bit by bit.
#   HF_DIR=/models/Ling-2.6-flash OUT=/checkpoints/flash examples/from_hf_ling2_6_flash.sh
#   CPU=1 examples/from_hf_ling2_6_flash.sh   the recorded tiny model of tests/golden, in a temporary folder
# The folder comes from: hf download inclusionAI/Ling-2.6-flash --local-dir HF_DIR. 104 B weights are 208 GB in bfloat16,
# here and once more in OUT. No PyTorch, no accelerator: a machine with a large disk is enough.
set -euo pipefail
source "$(dirname "$0")/common.sh"

yml=$base model=(model_name="${MODEL:-ling2.6-flash}" override_model_config=true) dtype=bfloat16
if [ "${CPU:-}" = 1 ]; then
  HF_DIR=$(dirname "$0")/../tests/golden/trailing_mtp OUT=$work/out dtype=float32
  yml=$work/model.yml model=(model_name=ling2-custom)
  "$python" -m maxtext_ling2 config "$HF_DIR" -o "$yml"
fi

"$python" -m maxtext.checkpoint_conversion.to_maxtext "$yml" "${model[@]}" base_output_directory="${OUT:?a folder}" \
  scan_layers=true skip_jax_distributed_system=true hardware=cpu log_config=false \
  --hf_model_path="${HF_DIR:?a folder from Hugging Face}" --save_dtype=$dtype
echo "load_parameters_path=$OUT/0/items"
# The check holds the whole model in float32: for 104 B that is more memory than most machines have.
if [ "${CPU:-}" = 1 ] || [ "${VERIFY:-}" = 1 ]; then
  "$python" -m maxtext_ling2 verify "$HF_DIR" --orbax "$OUT/0/items" --scan
fi
