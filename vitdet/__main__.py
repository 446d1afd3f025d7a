"""The command line: `python -m vitdet`, or `torchrun -m vitdet` with several processes."""

from vitdet.cli import main

if __name__ == "__main__":
    main()
