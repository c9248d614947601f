"""The shell: everything that touches the world."""

if __name__ != "act24.tools":
    raise ImportError("import act24.tools: the folder `tools` is a part of the package act24")
