"""What text can be rebuilt from what a party sees of a run: tokens, their order, and what belongs together in a note."""
