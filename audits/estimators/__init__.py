"""What can be concluded from scores and counts: pure functions of numpy arrays, which know nothing of models or runs."""
