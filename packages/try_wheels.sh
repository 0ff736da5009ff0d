#!/usr/bin/env bash
# Wheels of aarch64 on emulated Arm CPUs: each core loads, and chooses the same tokens as this machine's build.
# packages/try_wheels.sh PYTHON MODEL WHEEL
# PYTHON has Eightfold for this machine. The emulated Python and its packages are those of `make aarch64`, whose version the
# wheel has to fit. The tokens are greedy: floats of two machines need not be equal to the last bit.
set -euo pipefail
python=$(realpath -s "$1") model=$(realpath "$2") wheel=$(realpath "$3")
cd "$(dirname "$0")/.."
all=$PWD/build/aarch64
[ -e "$all/root/.complete" ] && [ -e "$all/site/.complete" ] || { echo "try_wheels: no emulated Python: make aarch64 first"; exit 1; }
installed=$(mktemp -d)
trap 'rm -r "$installed"' EXIT
"$python" -m zipfile -e "$wheel" "$installed"

# on CPU ARGUMENTS...: the emulated Python, with the wheel
on() {
    local cpu=$1
    shift
    qemu-aarch64 -cpu "$cpu" -L "$all/root" -E PYTHONPATH="$installed:$all/site" "$all/root/usr/bin/python$(cat "$all/root/.complete")" "$@"
}

# tokens COMMAND...: the ids of the answer's tokens
tokens() {
    "$@" -m eightfold run "$model" --prompt "The sun rises" --max-new-tokens "${TOKENS:-16}" --ignore-eos --temperature 0 --threads 2 --json \
        | "$python" -c 'import json, sys; print(json.loads(sys.stdin.read().splitlines()[-1])["token_ids"])'
}

expected=$(tokens "$python")
for pair in cortex-a57:neon neoverse-n1:dotprod max:i8mm; do
    cpu=${pair%:*}
    found=$(cd "$installed" && on "$cpu" -c 'from eightfold.model import native; print(native.extension.__file__, native.choose_isa())')
    [ "$found" = "$(echo "$installed"/eightfold/model/native/_core.*.so) ${pair#*:}" ] || { echo "$cpu: loaded $found"; exit 1; }
    found=$(cd "$installed" && tokens on "$cpu")
    [ "$found" = "$expected" ] || { echo "$cpu: got $found, expected $expected"; exit 1; }
    echo "$(basename "$wheel"): $cpu takes ${pair#*:} and chooses the same tokens"
done
