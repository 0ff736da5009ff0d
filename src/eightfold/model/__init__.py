"""A decoder in two ways: in torch as the oracle, and in the compiled core."""
