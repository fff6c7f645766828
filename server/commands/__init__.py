"""The commands of the coordinator's side, a file each."""
