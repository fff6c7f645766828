"""The commands of a site, a file each."""
