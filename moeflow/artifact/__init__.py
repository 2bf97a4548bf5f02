"""Checkpoints in, packed models out, and packed models in again."""
