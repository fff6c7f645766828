"""What a run reveals: attacks and estimators against a release or a run directory."""
