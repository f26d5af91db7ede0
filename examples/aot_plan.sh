#!/usr/bin/env bash
# Compiles a train step for TPUs that need not be there: does it fit, and how long does a step take at least?
#   examples/aot_plan.sh                   ling2 on v6e-64 and v5p-64, the best two meshes and batches of each; tens of minutes
#   MODEL=ling2.6-flash TOPOLOGIES="v5p-256" examples/aot_plan.sh [KEY=VALUE...]
#   CPU=1 examples/aot_plan.sh             ling2-tiny on one small slice
# Exit 1 if nothing fits. What has been compiled is kept in ~/.cache/maxtext-ling2/plan.
set -euo pipefail
source "$(dirname "$0")/common.sh"

model=${BASE_YML:-${MODEL:-ling2}} topologies=${TOPOLOGIES:-v6e-64 v5p-64} out=${OUT:-.} options=(--search)
if [ "${CPU:-}" = 1 ]; then
  topologies=v5e-4 out=$work options=(--no-cache)
  set -- max_target_length=256 base_num_decoder_layers=5 "$@"
fi
for topology in $topologies; do options+=(--topology "$topology"); done

"$python" -m maxtext_ling2 plan "$model" "${options[@]}" --json "$out/plan.json" "$@"
