"""Timings and qualities that are measured, not tested."""
