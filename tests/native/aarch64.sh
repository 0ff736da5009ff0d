#!/usr/bin/env bash
# The native tests on emulated Arm CPUs: the core is built by Debian's cross compiler, and an arm64 Python from Debian,
# unpacked into build/aarch64/root, runs them in qemu. Needs Debian, root and a minute of downloads the first time; where
# something is not at hand it says so and succeeds.
# tests/native/aarch64.sh PYTHON [pytest arguments]
# Without arguments: the tests of single kernels. With some: those, such as tests/native for all; then torch is unpacked.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$1")
bin=$(dirname "$python")
shift
all=$PWD/build/aarch64
root=$all/root

skip() { echo "aarch64: skipped: $*"; exit 0; }

[ "$(uname -m)" = x86_64 ] || skip "this machine is no x86-64"
command -v apt-get >/dev/null && command -v dpkg >/dev/null || skip "no apt-get"
mkdir -p "$all/packages"
if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    [ "$(id -u)" = 0 ] || skip "no qemu-aarch64 or no aarch64-linux-gnu-g++: apt-get install qemu-user g++-aarch64-linux-gnu"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq qemu-user g++-aarch64-linux-gnu; } \
        >"$all/apt.log" 2>&1 || skip "apt-get: $(tail -1 "$all/apt.log")"
fi

# apt with lists of its own, so that the machine's architectures stay as they are.
apt_arm() {
    local command=$1
    shift
    "$command" -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$all/apt" -o Dir::Cache="$all/cache" \
        -o Dir::State::status="$all/apt/status" -o APT::Sandbox::User=root "$@"
}
if [ ! -e "$root/.complete" ]; then
    mkdir -p "$all/apt/lists/partial" "$all/cache/archives/partial" && : >"$all/apt/status"
    apt_arm apt-get update -qq >"$all/apt.log" 2>&1 || skip "apt-get: $(tail -1 "$all/apt.log")"
    version=$(apt_arm apt-cache depends python3 | sed -n 's/.*Depends: \(python3\.[0-9]*\)$/\1/p' | head -1)
    (cd "$all/packages" && apt_arm apt-get install -y --download-only --no-install-recommends \
        "lib$version-dev" "$version" libgomp1 libstdc++6) >"$all/apt.log" 2>&1 || skip "apt-get: $(tail -1 "$all/apt.log")"
    for package in "$all"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
    echo "${version#python}" >"$root/.complete"
fi
version=$(cat "$root/.complete")

# install DIRECTORY PACKAGE...: wheels of the other machine
install() {
    local to=$1
    shift
    [ -e "$to/.complete" ] && return
    "$python" -m pip install -q --disable-pip-version-check --no-warn-conflicts --upgrade --target "$to" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --python-version "$version" --only-binary=:all: -c "${constraints:-constraints.txt}" "$@" >"$all/pip.log" 2>&1 \
        || skip "pip: $(tail -1 "$all/pip.log")"
    touch "$to/.complete"
}
install "$all/site" numpy pytest tokenizers jinja2 rich prompt-toolkit hypothesis safetensors pyyaml
if [ $# -gt 0 ]; then
    # 2.13.0 for aarch64 is built for CUDA, and does not load without it.
    constraints=/dev/null install "$all/torch" --no-deps torch==2.9.0
    install "$all/more" sympy networkx typing-extensions transformers nanobind
fi

# Python's headers, and none of the C library's beside them: the compiler has its own.
mkdir -p "$all/include/aarch64-linux-gnu"
ln -sfn "$root/usr/include/python$version" "$all/include/python$version"
ln -sfn "$root/usr/include/aarch64-linux-gnu/python$version" "$all/include/aarch64-linux-gnu/python$version"

cat >"$all/toolchain.cmake" <<'END'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
END
command -v "$bin/ninja" >/dev/null && ninja=$bin/ninja || ninja=$(command -v ninja) || skip "no ninja"
command -v "$bin/cmake" >/dev/null && cmake=$bin/cmake || cmake=$(command -v cmake) || skip "no cmake"
"$cmake" -S . -B "$all/core" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DCMAKE_TOOLCHAIN_FILE="$all/toolchain.cmake" \
    -DEIGHTFOLD_TESTS=ON -DEIGHTFOLD_WERROR=ON -DPython_EXECUTABLE="$python" \
    -DPython_INCLUDE_DIR="$all/include/python$version" -DCMAKE_CXX_FLAGS="-I$all/include" \
    -DSKBUILD_SOABI="cpython-${version/./}-aarch64-linux-gnu" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" \
    >"$all/core.log"
"$cmake" --build "$all/core" >>"$all/core.log" || { tail -40 "$all/core.log"; exit 1; }

# on CPU ARGUMENTS...: the emulated Python
on() {
    local cpu=$1
    shift
    qemu-aarch64 -cpu "$cpu" -L "$root" -E PYTHONPATH="$PWD/src:$PWD:$all/site:$all/torch:$all/more" \
        -E EIGHTFOLD_TEST_CORE="$all/core" -E OMP_NUM_THREADS=1 "$root/usr/bin/python$version" "$@"
}

# What each kind of CPU takes, and what is said where it lacks what EIGHTFOLD_ISA names.
chosen=$'from tests.native import KERNELS\nfrom eightfold.model import native\nprint(native.choose_isa())'
for pair in cortex-a57:neon neoverse-n1:dotprod max:i8mm; do
    found=$(on "${pair%:*}" -c "$chosen")
    [ "$found" = "${pair#*:}" ] || { echo "${pair%:*} takes $found, not ${pair#*:}"; exit 1; }
    echo "aarch64: ${pair%:*} takes $found"
done
refused=$(EIGHTFOLD_ISA=i8mm on neoverse-n1 -c "$chosen" 2>&1 | tail -1) || true  # it has to fail
[[ $refused == *"got i8mm, expected scalar or neon or dotprod, which this CPU has"* ]] || { echo "said: $refused"; exit 1; }

if [ $# -gt 0 ]; then
    on max -m pytest -q -p no:cacheprovider "$@"
else
    # Without tests/conftest.py, which loads torch. The scalar kernels are those of every machine.
    on max -m pytest -q -p no:cacheprovider --noconftest -k "neon or dotprod or i8mm" tests/native/test_kernels.py \
        tests/native/test_packed_products.py tests/native/test_attend.py
fi
