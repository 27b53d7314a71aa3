#!/usr/bin/env bash
# The core's own test program under sanitizers: tools/sanitize.sh [address,undefined | thread] ...
# Builds without optimization into a temporary folder; about a minute of CPU each.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ $# -gt 0 ] || set -- address,undefined thread
for sanitizers in "$@"; do
  cmake -S "$root" -B "$folder/$sanitizers" -DCMAKE_BUILD_TYPE=Debug -DEM_BUILD_TESTS=ON \
    -DEM_SANITIZE="$sanitizers" >"$folder/log"
  cmake --build "$folder/$sanitizers" -j --target edgemoe_core_tests >>"$folder/log" ||
    { tail -n 40 "$folder/log" >&2; exit 1; }
  echo "$sanitizers:"
  UBSAN_OPTIONS=print_stacktrace=1 "$folder/$sanitizers/tests/native/edgemoe_core_tests"
done
