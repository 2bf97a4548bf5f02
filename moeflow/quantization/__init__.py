"""Backends that turn a matrix into codes, scales and zeros. How these are packed is not their business."""
