"""Where the scripts and the tests find what set-up made; scripts/common.sh says what lies where."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
MODELS = TARGET / "models"
EXPECTED = MODELS / "expected"
NODE_TESTS = TARGET / "node"
