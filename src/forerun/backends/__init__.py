"""Backends beside our own engine; each optional library is imported in the one file named after it."""
