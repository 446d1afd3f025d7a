"""python -m vitdet: the command line; `torchrun -m vitdet train ...` for several processes."""

from vitdet.cli import main

if __name__ == "__main__":
    main()
