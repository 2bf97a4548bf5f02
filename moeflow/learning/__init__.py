"""A predictor learned from a text that goes through the model: guesses of coming layers, and of coming reuse."""
