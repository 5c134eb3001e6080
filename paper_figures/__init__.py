"""Runs in, figures and claims out: computes no run, imports no jax.

A module here that has ``EXPERIMENT`` and ``draw`` is a figure; ``python -m paper_figures`` finds
it. Its ``PRESET`` is the preset that makes its runs, its ``STUDY`` the kind of ``study`` in their
configs (without one, any run of the experiment), and ``TOGETHER`` the top-level fields of the
config in which the runs of one figure may differ. ``draw(runs, folder, *, name)`` writes the figure
of a list of runs, in the order of those fields, and returns ``(paths, claims)``;
``measure(runs, *, figure)`` returns the claims alone.
"""
