"""The operation `activation24`: linear → relu² → 2:4 → linear, its options, its reference and its forms."""
