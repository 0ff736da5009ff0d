#!/usr/bin/env bash
# Wheels for manylinux_2_28, x86-64 and aarch64, cross-compiled by zig's C++ compiler, which brings the C library of any age
# and its own C++ library, for Python 3.11. Elsewhere pip builds from source.
# packages/wheels.sh PYTHON DIRECTORY
# PYTHON is a 3.11 that has scikit-build-core, nanobind, cmake, ninja, wheel, ziglang and auditwheel; gcc is at hand. Python's headers come
# from Debian's packages.
# ARCHS="aarch64 x86_64" takes a part.
set -euo pipefail
out=$(realpath -m "$2")
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
bin=$(dirname "$python")
work=$PWD/build/wheels
mkdir -p "$out" "$work"

# headers ARCH RELEASE: unpacks Python's headers of a Debian release, and says where they are
headers() {
    local arch=$1 release=$2 to=$work/headers-$1-$2 apt=$work/apt-$1-$2
    local options=(-o APT::Architecture="$arch" -o APT::Architectures="$arch" -o Dir::State="$apt" -o Dir::Cache="$apt/cache"
        -o Dir::State::status="$apt/status" -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=root)
    if [ ! -e "$to/.complete" ]; then
        mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$to" && : >"$apt/status"
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main" >"$apt/sources.list"
        apt-get "${options[@]}" update -qq
        local version
        version=$(apt-cache "${options[@]}" depends python3 | sed -n 's/.*Depends: \(python3\.[0-9]*\)$/\1/p' | head -1)
        (cd "$apt" && apt-get "${options[@]}" download -qq "lib$version-dev")
        dpkg -x "$apt"/*.deb "$to"
        touch "$to/.complete"
    fi >&2
    echo "$to/usr/include"
}

# zig takes no -march with the features of Arm, but names them after a CPU. On x86-64 it forbids vectors of 512 bits, even in
# functions and files that are compiled for AVX-512, unless they are allowed to all.
cat >"$work/c++" <<END
#!/usr/bin/env bash
arguments=()
[[ \$ZIG_TARGET != x86_64* ]] || arguments+=(-mevex512)
for argument in "\$@"; do
    case \$argument in
        -march=armv8.2-a+*) arguments+=("-mcpu=generic+\${argument#-march=armv8.2-a+}") ;;
        *) arguments+=("\$argument") ;;
    esac
done
exec "$python" -m ziglang c++ -target "\$ZIG_TARGET" "\${arguments[@]}"
END
chmod +x "$work/c++"

# What __builtin_cpu_supports reads on x86-64 is filled in by gcc's library; zig's has no such part.
(cd "$work" && ar x "$(gcc -print-libgcc-file-name)" cpuinfo.o)

# build ARCH DEBIAN_ARCH RELEASE INTERPRETER SUFFIX PYTHON_TAG ABI_TAG [CMAKE ARGUMENT...]: a wheel in DIRECTORY
build() {
    local arch=$1 interpreter=$4 suffix=$5 core=$work/$1-$6-$7 include native wheel
    include=$(headers "$2" "$3")
    cat >"$work/$arch.cmake" <<END
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $arch)
set(CMAKE_CXX_COMPILER "$work/c++")
END
    export ZIG_TARGET=$arch-linux-gnu.2.28
    # From inside build/: zig takes the -o - with which cmake asks for a preprocessed file as the name of one.
    (cd "$work" && "$bin/cmake" -S ../.. -B "$core" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_TOOLCHAIN_FILE="$work/$arch.cmake" \
        -DPython_EXECUTABLE="$interpreter" -DPython_INCLUDE_DIR="$(echo "$include"/python3.*)" -DSKBUILD_SOABI="x-$suffix-x" \
        -DCMAKE_CXX_FLAGS="-I$include" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" "${@:8}") >"$core.log"
    "$bin/cmake" --build "$core" >>"$core.log" || { tail -40 "$core.log"; exit 1; }
    rm -rf "$work/unpacked"
    "$python" -m wheel unpack -d "$work/unpacked" "$work"/pure/*.whl >/dev/null
    native=$(echo "$work"/unpacked/*/eightfold/model/native)
    cp "$core"/_core.*.so "$native/_core.$suffix.so"
    sed -i 's/^Root-Is-Purelib: true/Root-Is-Purelib: false/' "$work"/unpacked/*/*.dist-info/WHEEL
    mkdir -p "$work/packed" && rm -f "$work"/packed/*
    "$python" -m wheel pack -d "$work/packed" "$work"/unpacked/* >/dev/null
    "$python" -m wheel tags --remove --python-tag "$6" --abi-tag "$7" --platform-tag "manylinux_2_28_$arch" "$work"/packed/*.whl >/dev/null
    wheel=$(echo "$work"/packed/*.whl)
    # It has to find nothing newer than its name says.
    "$python" -m auditwheel show "$wheel" >"$work/audit.txt" 2>&1 || { cat "$work/audit.txt"; exit 1; }
    tr '\n' ' ' <"$work/audit.txt" | grep -q "manylinux_2_\(17\|2[0-8]\)_$arch" || { cat "$work/audit.txt"; exit 1; }
    mv "$wheel" "$out"
    echo "$out/$(basename "$wheel")"
}

# Everything but the core, in a wheel of its own to begin with.
rm -rf "$work/pure" && mkdir "$work/pure"
"$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -C wheel.cmake=false -w "$work/pure" .

for arch in ${ARCHS:-aarch64 x86_64}; do
    case $arch in
        aarch64) debian=arm64 more=() ;;
        *) debian=amd64 more=(-DCMAKE_MODULE_LINKER_FLAGS="$work/cpuinfo.o") ;;
    esac
    build "$arch" "$debian" bookworm "$python" "cpython-311-$arch-linux-gnu" cp311 cp311 "${more[@]}"
done
