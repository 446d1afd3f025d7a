"""python -m pipeline: the command line of the experiment pipeline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.remote_verbs import add_verbs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on stderr and exit code 1 (2 for the command line itself)."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="The experiment as a Kubeflow pipeline.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_verbs(verbs)
    given = parser.parse_args(arguments)
    try:
        code = given.run(given)
    except (ValueError, OSError, RuntimeError) as error:
        print("pipeline:", *str(error).splitlines(), file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
