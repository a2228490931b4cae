"""Scaling laws and their fits, as functions of numbers."""
