"""Folders from which a run goes on bit for bit: what is in them, and how they are written."""
