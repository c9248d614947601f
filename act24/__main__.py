"""`python -m act24` and `torchrun -m act24`: the command line."""

from act24.tools.commands.cli import main

if __name__ == "__main__":
    main()
