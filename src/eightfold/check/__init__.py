"""Whether a loader on the NPU host would take a directory, and what it would do with it."""
