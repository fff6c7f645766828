"""Many clients on one machine: corpora, partitions, the in-process engine and its command line."""
