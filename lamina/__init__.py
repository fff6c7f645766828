"""Lamina: federated LoRA fine-tuning of language models with exact aggregation of unequal ranks.

The parts live in the checkout's top-level folders and are linked here: `protos` (what both sides agree on),
`strategies` (server maths), `server` (the coordinator), `client` (a site), `simulations` (many clients on one
machine) and `audits` (what a run reveals). See docs/architecture.md.
"""

__version__ = "0.1.0"
