"""Was this row in the training data? Scores of examples for whoever holds an adapter and the public base."""
