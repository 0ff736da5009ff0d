#!/usr/bin/env bash
# Quantize a Llama 3 model with the settings that MindIE uses for it.
#
#   bash examples/models/llama3/generate_quant_weight.sh -src FLOAT -dst OUT -type llama3.1_8b_w8a8
#
# The layers that stay float are counted by the model's own config.json.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)
types="llama3.1_8b_w8a8, llama3.1_70b_instruct_fp16_w8a8, llama3.1_70b_instruct_bf16_w8a8, llama3_70b_w8a16"
usage="Usage: generate_quant_weight.sh -src FLOAT -dst OUT -type TYPE [-use_kvcache_quant True|False]
       [-use_fa_quant True|False] [-trust_remote_code]
Types: $types"

fail() {
    echo "generate_quant_weight.sh: $1" >&2
    exit 1
}

# Module names of the first $1 layers, for each of the linears that follow.
names_of() {
    local layers=$1 layer linear
    shift
    for ((layer = 0; layer < layers; layer++)); do
        for linear in "$@"; do
            echo "model.layers.$layer.$linear"
        done
    done
}

# num_hidden_layers of the source; nothing where config.json does not say.
count_layers() {
    "$python" -c '
import json, pathlib, sys
try:
    print(int(json.loads(pathlib.Path(sys.argv[1], "config.json").read_bytes())["num_hidden_layers"]))
except (OSError, ValueError, KeyError, TypeError):
    pass' "$src"
}

src="" dst="" type="" use_kvcache_quant=False use_fa_quant=False flags=()
while (($#)); do
    case $1 in
        -src | -dst | -type | -use_kvcache_quant | -use_fa_quant)
            (($# > 1)) || fail "$1 needs a value."
            printf -v "${1#-}" %s "$2"
            shift 2
            ;;
        -trust_remote_code)
            flags+=(--trust_remote_code)
            shift
            ;;
        -h | -help | --help)
            echo "$usage"
            exit 0
            ;;
        *) fail "unknown argument $1. Try: generate_quant_weight.sh --help" ;;
    esac
done
for name in src dst type; do
    [[ -n ${!name} ]] || fail "-$name is missing. Try: generate_quant_weight.sh --help"
done

down=mlp.down_proj
others=(self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj)
# usual: how many layers such a model has; down_layers, other_layers: how many of them stay float.
case $type in
    llama3.1_8b_w8a8)
        usual=32 down_layers=all other_layers=0
        settings=(--anti_method m1 --act_method 1 --disable_level L0)
        ;;
    llama3.1_70b_instruct_fp16_w8a8)
        usual=80 down_layers=all other_layers=5
        settings=(--anti_method m4 --act_method 3 --disable_level L0)
        ;;
    llama3.1_70b_instruct_bf16_w8a8)
        usual=80 down_layers=all other_layers=0
        settings=(--anti_method m3 --act_method 3 --disable_level L5 --fa_amp 0)
        ;;
    llama3_70b_w8a16)
        usual=80 down_layers=5 other_layers=5
        settings=(--anti_method m3 --act_method 3 --a_bit 16 --w_sym False --mm_tensor False)
        ;;
    *) fail "-type: got $type, expected one of $types." ;;
esac

python=$(command -v python || command -v python3) || fail "no python on PATH."
layers=$(count_layers)
if [[ -z $layers ]]; then
    layers=$usual # the quantizer says what is wrong with the source
elif ((layers != usual)); then
    echo "note: config.json says $layers layers, $type usually has $usual: the layers of config.json are taken." >&2
fi
[[ $down_layers != all ]] || down_layers=$layers
((down_layers <= layers)) || down_layers=$layers
((other_layers <= layers)) || other_layers=$layers
mapfile -t disable_names < <(names_of "$down_layers" "$down" && names_of "$other_layers" "${others[@]}" && echo lm_head)

export PYTORCH_NPU_ALLOC_CONF=expandable_segments:False
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m examples.convert.model_slim.quantifier \
    --model_path "$src" --save_directory "$dst" --device_type npu \
    --calib_file "$root/examples/convert/model_slim/boolq.jsonl" \
    --disable_names "${disable_names[@]}" \
    --tokenizer_args '{"padding_side":"left","pad_token":"<unk>"}' \
    "${settings[@]}" --use_kvcache_quant "$use_kvcache_quant" --use_fa_quant "$use_fa_quant" \
    ${flags[@]+"${flags[@]}"}
