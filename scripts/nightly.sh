#!/usr/bin/env bash
# What is too long for every change: soak runs and fuzzing. Ends with status 1 if one of them found something; all run.
#
#   scripts/nightly.sh [MINUTES]     of each soak run and of each fuzzed target; 15 by default
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=${1:-15}
failed=0
.venv/bin/python bench/soak.py --minutes "$minutes" || failed=1
.venv/bin/python bench/soak.py --minutes "$minutes" --hybrid || failed=1
scripts/fuzz.sh $((60 * minutes)) || failed=1
if command -v "${CXX:-clang++}" >/dev/null; then
  scripts/fuzz.sh native $((60 * minutes)) || failed=1
fi
exit $failed
