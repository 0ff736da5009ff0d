"""Float checkpoint in, int8 checkpoint out."""
