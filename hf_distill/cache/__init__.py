"""Soft labels on disk: a teacher is run once, and distilled from anywhere."""
