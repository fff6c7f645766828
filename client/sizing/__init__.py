"""What training will take and what this machine gives: a model of memory, a planner, a probe, and where ranks matter."""
