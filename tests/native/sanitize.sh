#!/usr/bin/env bash
# The native tests under the address and undefined-behaviour sanitizers, then under the thread sanitizer. Needs gcc.
# tests/native/sanitize.sh PYTHON [pytest arguments]
# KINDS=address or KINDS=thread in the environment takes one of the two builds.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$1")
bin=$(dirname "$python")
shift

library() { realpath "$(g++ -print-file-name="lib$1.so")"; }

# check SANITIZERS LIBRARY... -- ARGUMENTS
check() {
    local kinds=$1 build=build/sanitize-${1%%,*} preload=
    shift
    while [ "$1" != -- ]; do preload+=$(library "$1"):; shift; done
    shift
    "$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DEIGHTFOLD_SANITIZE="$kinds" \
        -DEIGHTFOLD_TESTS=ON -DPython_EXECUTABLE="$python" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" >"$build.log"
    "$bin/cmake" --build "$build" >>"$build.log" || { tail -40 "$build.log"; exit 1; }
    echo "== $kinds"
    # Older thread sanitizers do not find their way among random addresses.
    local plain=()
    if [ "$kinds" = thread ]; then plain=(setarch -R); fi
    # One thread for torch: its own pool is nothing that could be checked here.
    env EIGHTFOLD_TEST_CORE="$PWD/$build" LD_PRELOAD="$preload" OMP_NUM_THREADS=1 \
        ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:suppressions="$PWD/tests/native/tsan.supp" \
        "${plain[@]}" "$python" -m pytest -q -p no:cacheprovider tests/native "$@"
}

mkdir -p build
# The C++ library too: the sanitizers look for its functions when they start.
wanted=" ${KINDS:-address thread} "
if [[ $wanted == *" address "* ]]; then
    check address,undefined asan ubsan stdc++ -- "$@"
fi
if [[ $wanted == *" thread "* ]]; then
    check thread tsan stdc++ -- -k "not scalar" "$@"  # threads work alike on all instruction sets, and scalar takes long
fi
