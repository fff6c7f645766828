"""What outlives the process: run directory, checkpoints, the deployment's database, blobs and event log."""
