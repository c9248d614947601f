"""Linears whose three products are in e4m3."""
