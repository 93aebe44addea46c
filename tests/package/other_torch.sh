#!/usr/bin/env bash
# Another torch, Triton and Python: an environment that has them, a wheel built there, and what they can break: Triton's
# kernels in the interpreter and compiled ahead of time for every GPU, operators, trajectories, and the stand-in devices
# where that torch has none of its own.
#   [WORK=folder that is kept] [WHEEL=one that was built against another torch] \
#       tests/package/other_torch.sh TORCH TRITON PYTHON [OTHER REQUIREMENT ...]
#   tests/package/other_torch.sh 2.11.0 3.6.0 python3.12 "numpy<2.4"   # with later ones 3.6's interpreter does not run
set -euo pipefail
cd "$(dirname "$0")/../.."
torch=$1 triton=$2 python=$3
shift 3
work=${WORK:-$(mktemp -d)}
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
source "$work/env/bin/activate"
pip install -q "torch==$torch" "triton==$triton" "$@"
wheel=${WHEEL:-}
if [ -z "$wheel" ]; then
  pip wheel -q --no-deps -w "$work/wheel" .
  wheel=$(ls "$work"/wheel/pydistill-*.whl)
fi
pip install -q "pydistill[test] @ file://$(realpath "$wheel")" "$@"
(cd "$work" && python -m pydistill.info)  # the one that is installed, not the folder here
pytest -m '' tests/kernels/test_*_triton.py tests/kernels/test_triton_launch.py
pytest tests/ops tests/trajectory tests/stand_in tests/package/test_info.py
