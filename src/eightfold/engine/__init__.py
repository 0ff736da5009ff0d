"""Many sequences on one native model: a paged cache, continuous batching, sampling, text."""
