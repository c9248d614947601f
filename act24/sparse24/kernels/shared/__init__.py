"""What several operators use: definition, check on first use, sort keys of 16-bit values, random draws."""
