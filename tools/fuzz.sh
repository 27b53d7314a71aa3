#!/usr/bin/env bash
# Fuzz the index and the store reader with libFuzzer (clang): tools/fuzz.sh [seconds] [folder]
# What was found stays in the folder, as do the inputs that reached something new.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
seconds=${1:-60}
folder=${2:-$(mktemp -d)}
mkdir -p "$folder/corpus"
cmake -S "$root" -B "$folder/build" -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS=-O1 -DEM_BUILD_TESTS=ON -DEM_BUILD_FUZZER=ON \
  -DEM_SANITIZE=address,undefined >"$folder/log"
cmake --build "$folder/build" -j --target edgemoe_fuzz_store >>"$folder/log" ||
  { tail -n 40 "$folder/log" >&2; exit 1; }
program=$folder/build/tests/native/edgemoe_fuzz_store
EM_FUZZ_SEEDS=$folder/seeds "$program"
cd "$folder"
"$program" -max_total_time="$seconds" -max_len=32768 -timeout=20 -print_final_stats=1 corpus seeds
