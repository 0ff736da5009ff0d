"""Bytes on disk <-> arrays. No arithmetic here."""
