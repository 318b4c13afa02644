"""Experiments with `ghopt`; not part of the installed package."""
