"""Command line: `python -m vitdet`, or `torchrun -m vitdet train ...` for several processes."""

from vitdet.cli import main

if __name__ == "__main__":
    main()
