"""Builds the whole workspace's tests in one call, and runs those of the crates that know no PostgreSQL.

One call, because cargo unites the features of what it builds together: `cargo test -p inference` alone would compile
tract a second time, with other features of its dependencies than the extension's. `cargo pgrx test` then finds all built.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    command = ["cargo", "test", "--workspace", "--features", "pg_test", "--no-run", "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        return built.returncode
    failed = tests = 0
    for line in built.stdout.splitlines():
        artifact = json.loads(line)
        folder = Path(artifact.get("manifest_path", ROOT)).parent
        if artifact.get("executable") and artifact["profile"]["test"] and folder.parent.name == "crates":
            print(f"     Running {artifact['target']['name']} of {folder.name}", flush=True)
            failed |= subprocess.run([artifact["executable"]], cwd=folder).returncode
            tests += 1
    return failed if tests else 1


if __name__ == "__main__":
    sys.exit(main())
