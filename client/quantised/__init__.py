"""Bases in number formats of fewer bits: what trains where, how they are loaded, copied and checked."""
