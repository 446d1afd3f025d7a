"""Run the command line as `python -m vitdet`, or with several processes `torchrun -m vitdet`."""

from vitdet.cli import main

if __name__ == "__main__":
    main()
