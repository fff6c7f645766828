"""The coordinator's side of the network: who may call, what the methods do, and the mailbox to the round loop."""
