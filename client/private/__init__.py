"""`example-dp` at the client: DP-SGD whose every part is here, so that nothing of the data leaves but through its noise."""
