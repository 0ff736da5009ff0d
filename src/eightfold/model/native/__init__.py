"""The compiled core behind typed functions; no torch."""
