"""Eightfold as a model of EleutherAI's lm-evaluation-harness.

lm-eval knows models only by its own table, so `python -m eightfold.lm_eval` is its command line with one more model:

    python -m eightfold.lm_eval run --model eightfold --model_args pretrained=OUT --tasks hellaswag
"""
