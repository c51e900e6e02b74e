"""Prompts and texts: shipped, made, of a file, or of a data set from a folder or the Hub. No torch."""

from forerun.workload.prompts import Prompt, follow, load
from forerun.workload.records import DEMO, Line, Row, Source, read, rows, source, texts

__all__ = ["DEMO", "Line", "Prompt", "Row", "Source", "follow", "load", "read", "rows", "source", "texts"]
