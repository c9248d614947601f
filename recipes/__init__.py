"""What to run, as data: TOML files, their schema, and the loader."""

if __name__ != "act24.recipes":
    raise ImportError("import act24.recipes: the folder `recipes` is a part of the package act24")
