"""Runs in, figures and claims out: computes no run, imports no jax.

A module here that has ``EXPERIMENT`` and ``draw`` is a figure; ``python -m paper_figures`` finds
it. ``draw(run, folder, *, name)`` writes the figure of one run and returns ``(paths, claims)``.
"""
