"""Differential privacy that both sides must agree on: what a mechanism is, what it costs, and where its noise comes from."""
