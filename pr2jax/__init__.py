"""pr2jax: reinforcement learning of Mixture-of-Experts language models, in pure-functional JAX."""

__version__ = "0.1.0"
