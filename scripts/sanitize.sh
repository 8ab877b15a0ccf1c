#!/usr/bin/env bash
# Builds the extension with sanitizers of GCC into build/ and runs the tests that suit them.
#
#   scripts/sanitize.sh address,undefined [PYTEST OPTIONS]   memory errors, undefined behaviour: arithmetic, arguments
#   scripts/sanitize.sh thread [PYTEST OPTIONS]              data races: queues, pools, calls from several threads
#
# The installed extension stays as it is. The first build takes about ten minutes of both of two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  address,undefined) runtime=libasan.so ;;
  thread) runtime=libtsan.so ;;
  *) sed -n '2,7p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
sanitizers=$1
shift
[ -x .venv/bin/pytest ] || { echo "scripts/sanitize.sh: first ./install.sh check" >&2; exit 1; }

build="$PWD/build/sanitize-${sanitizers//,/-}"
mkdir -p "$build"
# The compute threads by themselves first, as a program: a minute.
"${CXX:-c++}" -std=c++17 -O1 -g "-fsanitize=$sanitizers" -fno-sanitize-recover=all -pthread -Icsrc -o "$build/scenes" \
  tests/kernels/thread_pools.cc csrc/core/thread_pool.cc csrc/core/worker_placement.cc csrc/core/fault.cc
for scene in every_piece_once threads_stopped_anywhere late_workers exceptions call_from_a_piece; do
  echo "thread_pools.cc: $scene"
  "$build/scenes" "$scene"
done

PATH="$PWD/.venv/bin:$PATH"
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG" \
  "-DKT_SANITIZE=$sanitizers" \
  "-DPython_EXECUTABLE=$PWD/.venv/bin/python" "-Dpybind11_DIR=$(python -m pybind11 --cmakedir)" >/dev/null
ninja -C "$build"

# Left out: tests that crash on purpose, or load another extension.
if [ "$sanitizers" = thread ]; then
  # The scenes have run above; a compiler does not start under TSan's runtime.
  tests=(--deselect tests/kernels/test_thread_pools.py::test_jobs_end_when_their_pieces_do)
  tests+=(test_queue.py test_thread_pools.py test_engine_stats.py test_mailbox.py test_graph_lifetimes.py
    test_write_expert.py test_result_depends_on_the_token_alone.py test_training.py)
else
  tests=(test_exact_on_integers.py test_every_code_and_scale.py test_error_is_small.py test_integer_sums.py
    test_special_values.py test_swiglu.py test_gguf_panels.py test_gguf_blocks.py test_write_expert.py
    test_bad_arguments.py test_bad_weights.py test_training.py test_queue.py test_device_stream.py)
fi
extension=$(echo "$build"/kt_kernel_ext.*.so)
export KT_TEST_EXTENSION="$extension" KT_TEST_SWEEP=small
# Python itself is not instrumented: it keeps memory until it ends, and its races are its own.
export ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
export LD_PRELOAD
LD_PRELOAD="$("${CXX:-c++}" -print-file-name=$runtime)"
cd tests/kernels
exec python -m pytest -q -p no:cacheprovider "${tests[@]}" "$@"
