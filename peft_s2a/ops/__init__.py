"""Operators: one file each, an autograd function and a plain function that takes a codec."""
