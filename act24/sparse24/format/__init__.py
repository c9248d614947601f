"""How a 2:4 matrix lies in memory, cuSPARSELt's products with it, and the choice between 2:4 and dense."""
