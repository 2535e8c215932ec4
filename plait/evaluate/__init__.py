"""What a model is worth and whether it keeps its word: perplexity, speed, and the laws behind `plait selfcheck`."""
