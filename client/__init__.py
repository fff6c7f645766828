"""A site: its model, data, local training and evaluation. Knows the coordinator only by its messages."""
