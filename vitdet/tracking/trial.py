"""The trial of a packaged model: a new process loads it and runs it on its input example.

The process imports this package from the wheel in the model only, as a server of the model does; the
other packages are those that are installed here. Pickles are refused.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TIMEOUT_SECONDS = 900.0  # imports from a network file system take minutes
PROGRAM = """
import sys
wheel, path = sys.argv[1:]
sys.path.insert(0, wheel)
import mlflow.pyfunc
loaded = mlflow.pyfunc.load_model(path)
found = loaded.predict(loaded.input_example, params={"threshold": 0.0})
modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "vitdet"]
outside = [module.__file__ for module in modules if not module.__file__.startswith(wheel)]
if outside or not modules:
    raise ImportError(f"the package is not imported from the wheel of the model, but {outside}")
expected = [column.name for column in loaded.metadata.get_output_schema()]
if list(found.columns) != expected:
    raise ValueError(f"the answer has the columns {list(found.columns)}, the signature {expected}")
"""


def try_model(model: Path, wheel: Path) -> None:
    """Load a packed model in a new process and let it detect. Raises ValueError if it does not answer.

    model: the folder of the model. wheel: this package, as it is in the model.
    """
    with tempfile.TemporaryDirectory(prefix="vitdet-trial-") as work:
        site = Path(work).resolve() / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", PROGRAM, str(site), str(model)],
                cwd=work,
                env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"the packaged model did not answer within {TIMEOUT_SECONDS:.0f} s in a new process; "
                "it is not registered"
            ) from error
    if done.returncode:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), f"exit {done.returncode}")
        raise ValueError(
            f"the packaged model does not answer in a new process ({reason[:300]}); it is not registered"
        )
