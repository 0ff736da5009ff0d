"""The `eightfold` command."""
