"""What several operators use: their definition, sort keys of 16-bit values, random draws."""
