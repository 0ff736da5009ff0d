"""Exports to the formats of other engines."""
