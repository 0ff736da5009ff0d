"""Random float checkpoints in the shapes of well-known models: for planning and for tests."""
