"""How good a checkpoint is: perplexity, and how far it is from its float original."""
