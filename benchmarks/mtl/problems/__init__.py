"""The problems, one file each, and what only they need."""
