"""Research on the training dynamics of neural networks, in JAX.

Nothing is imported here: ``dynamics.record`` and ``dynamics.statistics`` work without jax.
"""
