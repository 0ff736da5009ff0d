#!/usr/bin/env bash
# Ask a model "What's deep learning?".
#
#   bash examples/models/llama3/run_pa.sh MODEL [MAX_OUTPUT_LENGTH] [further flags of examples.run_pa]
#
# EIGHTFOLD_WORLD_SIZE (1) is how many processes share the model. ASCEND_RT_VISIBLE_DEVICES names NPUs and is left alone.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)
if [[ -z ${1:-} ]]; then
    echo "run_pa.sh: the model directory is missing. Usage: run_pa.sh MODEL [MAX_OUTPUT_LENGTH]" >&2
    exit 1
fi
model=$1
max_output_length=${2:-20}
shift $(($# < 2 ? $# : 2))

world_size=${EIGHTFOLD_WORLD_SIZE:-1}
if [[ ! $world_size =~ ^[1-9][0-9]*$ ]]; then
    echo "run_pa.sh: EIGHTFOLD_WORLD_SIZE: got $world_size, expected a number of processes." >&2
    exit 1
fi
command=(-m examples.run_pa --model_path "$model" --max_output_length "$max_output_length" "$@")

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if ((world_size > 1)); then
    exec torchrun --nproc_per_node "$world_size" --master_port "${MASTER_PORT:-20030}" "${command[@]}"
fi
python=$(command -v python || command -v python3) || { echo "run_pa.sh: no python on PATH." >&2 && exit 1; }
exec "$python" "${command[@]}"
