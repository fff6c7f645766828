"""The coordinator: selects cohorts, admits updates, steps the strategy, stores every round. Loads no model."""
