#!/usr/bin/env bash
# One command for the style of the whole tree: clang-format, ruff format, ruff lint.
#
#   scripts/format.sh           rewrite files; fails if lint findings remain that ruff cannot fix
#   scripts/format.sh --check   change nothing; fails and lists what is not as it should be (CI)
#
# The tools are the pinned wheels of tests/requirements.lock, from .venv when there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  "") clang_mode=(-i) ruff_format_mode=() ruff_lint_mode=(--fix) ;;
  --check) clang_mode=(--dry-run --Werror) ruff_format_mode=(--check) ruff_lint_mode=() ;;
  *) sed -n '2,5p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac

[ -d .venv/bin ] && PATH="$PWD/.venv/bin:$PATH"
for tool in ruff clang-format; do
  command -v "$tool" >/dev/null || {
    echo "scripts/format.sh: $tool is missing: pip install --no-deps -r tests/requirements.lock" >&2
    exit 1
  }
done

failed=0
sources=()
while IFS= read -r -d '' file; do sources+=("$file"); done < <(
  find csrc bench tests third_party -type f \
    \( -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.c' -o -name '*.cu' \) -print0 2>/dev/null || true)
if [ ${#sources[@]} -gt 0 ]; then
  clang-format --style=file "${clang_mode[@]}" "${sources[@]}" || failed=1
fi
ruff format "${ruff_format_mode[@]}" . || failed=1
ruff check "${ruff_lint_mode[@]}" . || failed=1
exit $failed
