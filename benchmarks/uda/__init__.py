"""Unsupervised domain adaptation on digits, with and without gradient harmonization.

Run ``python -m benchmarks.uda`` from the project's root.
"""
