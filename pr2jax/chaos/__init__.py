"""Faults put to a run again and again, and whether it ends as one that was left alone."""
