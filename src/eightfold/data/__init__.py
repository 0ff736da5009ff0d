"""Texts that ship with the package: for calibration and for evaluation."""
