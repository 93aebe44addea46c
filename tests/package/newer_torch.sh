#!/usr/bin/env bash
# One build for every later torch: builds a wheel against one torch, installs it beside a newer one, runs the tests there.
#   [WORK=folder that is kept] tests/package/newer_torch.sh [built-against=2.13.0] [run-on=2.14.1]
set -euo pipefail
cd "$(dirname "$0")/../.."
built=${1:-2.13.0} newer=${2:-2.14.1}
work=${WORK:-$(mktemp -d)}
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/build"
"$work/build/bin/pip" install -q "torch==$built"
"$work/build/bin/pip" wheel -q --no-deps -w "$work/wheel" .

python3 -m venv "$work/run"
"$work/run/bin/pip" install -q "torch==$newer"
"$work/run/bin/pip" install -q "$work"/wheel/*.whl pytest
"$work/run/bin/python" -m pydistill.info
"$work/run/bin/pytest" tests/ops tests/trajectory tests/package/test_info.py
