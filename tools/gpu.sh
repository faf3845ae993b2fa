#!/usr/bin/env bash
# Everything that a machine with a GPU has to show: build, tests on the device, sanitizer, benchmarks. `tools/gpu.sh [python] [bench options]`
# Nothing is installed: such machines bring torch, Triton, pytest, rich, CMake and ninja, and may have no network.
# Every step runs even when one before it failed; the exit code is 0 only if all passed.
# PART=attention|linear|moe|slices takes the rooms of one engine only, PART=room,room those rooms.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true

"$python" - <<'PY' || exit 1
import importlib.util, sys
missing = [name for name in ("torch", "triton", "pytest", "rich") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu: {sys.executable} has no {', '.join(missing)}; name another Python: make gpu PYTHON=...")
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu: torch {torch.__version__} sees no GPU; run this on a machine with one")
PY

case ${PART:-} in
  attention) rooms=interval_attention,gated_cross_attention,gated_feed_forward,resampler ;;
  linear) rooms=grouped_linear,route_groups,visual_expert ;;
  moe) rooms=moe ;;
  slices) rooms=sliced_image ;;
  *) rooms=${PART:-} ;;
esac
chosen=${rooms:+and (${rooms//,/ or })} # for pytest -k

table=""
failed=0
step() { # step <name> <command...>
  local name=$1 start=$SECONDS result=passed
  shift
  echo
  echo "== $name: $*"
  "$@" || { result=FAILED; failed=1; }
  table+=$(printf '%-12s %-7s %3d:%02d' "$name" "$result" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)))$'\n'
}

# The caching allocator hides reads past a tensor's end from the sanitizer; one small row of each room is enough for it.
sanitize() {
  local tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 0 \
      "$python" -m pytest tests/test_ops.py -k "accuracy_rule and cuda and (uneven or plain or batch) $chosen" -p no:cacheprovider
  done
}

step build env MMKERNELS_BUILD=cuda "$python" setup.py -q build_ext --inplace
step tests "$python" -m pytest tests/test_ops.py tests/rooms -k "(cuda or not cpu) $chosen"
step sanitizer sanitize
step bench "$python" -m mmkernels.cli.main bench --device cuda ${rooms:+--op "$rooms"} "$@"

printf '\n%s%-12s %-7s %3d:%02d\n' "$table" all "" $((SECONDS / 60)) $((SECONDS % 60))
exit "$failed"
