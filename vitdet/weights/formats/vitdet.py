"""Our own names: checkpoints, the packaged pre-training, and converted files."""

from __future__ import annotations

from vitdet.weights.formats.mae import FRESH
from vitdet.weights.formats.table import Format, Row

VITDET = Format(rows=(Row("{*}", "{*}"),), wrappers=("model",), fresh=FRESH)
