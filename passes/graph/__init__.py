"""The machinery of the passes: tracing, normal form, regions, selectors, hooks, and the sites of a graph."""
