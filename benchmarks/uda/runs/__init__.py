"""Runs on digits: which there are, how they are trained, what is kept of them."""
