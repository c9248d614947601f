"""`python -m act24.run_c4` and `torchrun -m act24.run_c4`: a command of run_c4.py, as it was typed."""

from act24.tools.commands.run_c4 import main

if __name__ == "__main__":
    main()
