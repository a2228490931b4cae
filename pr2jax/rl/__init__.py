"""Reinforcement learning: pure functions from rollouts to a parameter update."""
