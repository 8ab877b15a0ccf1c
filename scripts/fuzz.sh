#!/usr/bin/env bash
# Fuzzes the readers of files and flags (tests/fuzz/fuzz_targets.py) with atheris, which it installs into .venv if it is
# not there, one target after the other.
#
#   scripts/fuzz.sh [SECONDS [TARGET ...]]     600 seconds of each target by default
#   scripts/fuzz.sh native [SECONDS]           the extension's formats and routing, with libFuzzer and sanitizers: needs
#                                              clang (Debian: clang-14 libclang-rt-14-dev), CXX=clang++-14
#
# New inputs and crashes are collected in build/fuzz/TARGET. A crash belongs into tests/fuzz/corpus/TARGET.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = native ]; then
  found=build/fuzz/native
  mkdir -p "$found/inputs"
  "${CXX:-clang++}" -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -ffp-contract=off \
    -Icsrc -o "$found/formats_fuzzer" tests/fuzz/formats_fuzzer.cc csrc/moe/routing.cc csrc/formats/*.cc \
    csrc/formats/*/*.cc
  exec nice -n 15 "$found/formats_fuzzer" -max_total_time="${2:-600}" -max_len=4096 -timeout=25 -print_final_stats=1 \
    -artifact_prefix="$found/" "$found/inputs"
fi

seconds=${1:-600}
targets=("${@:2}")
[ ${#targets[@]} -gt 0 ] || targets=(safetensors index config gguf flags)
python=${KT_FUZZ_PYTHON:-.venv/bin/python}
"$python" -c "import atheris" 2>/dev/null || "$python" -m pip install --quiet "atheris==3.0.0"

failed=0
for target in "${targets[@]}"; do
  found=build/fuzz/$target
  mkdir -p "$found/inputs"
  end=$((SECONDS + seconds))
  # A crash ends the fuzzer: then it begins again, with what is left of the time.
  while [ $SECONDS -lt $end ]; do
    nice -n 15 "$python" tests/fuzz/run_fuzzer.py "$target" -max_total_time=$((end - SECONDS)) -rss_limit_mb=4096 \
      -timeout=25 -max_len=8192 -print_final_stats=1 -artifact_prefix="$found/" "$found/inputs" \
      >"$found/log" 2>&1 || { failed=1; grep -E "^(Assertion|[A-Za-z.]+Error)|ERROR" "$found/log" | tail -3 || true; }
    # One that never began would not begin the next time either.
    grep -E "stat::number_of_executed_units|cov:" "$found/log" | tail -2 || break
  done
  echo "$target: $(find "$found" -maxdepth 1 -name 'crash-*' -o -name 'timeout-*' -o -name 'oom-*' | wc -l) crashes"
done
exit $failed
