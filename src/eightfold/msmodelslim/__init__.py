"""`msmodelslim quant`, the command of Huawei's documents, done by `eightfold quantize`.

    python -m eightfold.msmodelslim quant --model_path FLOAT --save_path OUT --model_type Qwen2.5-7B-Instruct \\
        --quant_type w8a8 --device npu --trust_remote_code True

Sources: the command line, the processors and the recommended settings of msModelSlim 26.1.0 (Mulan PSL v2), of which
facts are used and no text. What its processors compute is what `quantize` has under the same names.
"""
