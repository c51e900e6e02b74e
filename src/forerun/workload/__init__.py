"""Prompts and texts: shipped, made, of a file, or of a data set from a folder or the Hub. No torch."""

from forerun.workload.prompts import Line, Prompt, load, read

__all__ = ["Line", "Prompt", "load", "read"]
