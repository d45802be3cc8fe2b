"""Compares the results of PostgreSQL's own suites with tensor_block to those with heap: scripts/pg-regress runs them.

    pg_regress.py HOME SUITE[,SUITE] [TEST...]      HOME/results/ACCESS_METHOD/SUITE and HOME/results/ACCESS_METHOD/server.log

A test passes if pg_regress found its output to be the expected one, or if it is what it was with heap. Other outputs are
compared with heap's by `diff -w -U3`, and each hunk has to be in pg_test/regress/SUITE/TEST.diff, where it is given with
its reason:

    # the reason, in one line or several
    @@
     context
    -with heap
    +with tensor_block

A crash or a failed assertion fails the run, whatever the tests say. Hunks that are not allowed are written to
HOME/unexpected/SUITE/TEST.diff, in the same form.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ALLOWED = Path(__file__).resolve().parent.parent / "pg_test" / "regress"
OUTCOME = re.compile(r"^(?:test|    ) (\S+)\s+\.\.\. (ok|FAILED|failed \(ignored\))", re.M)
CRASH = re.compile(r"TRAP:|PANIC:  |terminated by (signal|exception)|server process .* exited with exit code (?!1\b)")
# What differs from run to run in a line of a hunk.
VARIABLE = [(re.compile(r"pg_toast_\d+"), "pg_toast_OID")]


@dataclass
class Hunk:
    reason: str
    lines: list[str]
    seen: bool = False


def hunks_of(text: str) -> list[Hunk]:
    """The hunks of a unified diff, without line numbers; `# ` lines in front of one are its reason."""
    hunks, reason = [], []
    inside = False
    for line in text.splitlines():
        if line.startswith("@@"):
            hunks.append(Hunk(" ".join(reason), []))
            reason, inside = [], True
        elif line.startswith("#"):
            reason.append(line.lstrip("# "))
            inside = False
        elif inside and line[:1] in " -+":
            for pattern, name in VARIABLE:
                line = pattern.sub(name, line)
            hunks[-1].lines.append(line.rstrip())
    return hunks


def difference(heap: Path, ours: Path) -> list[Hunk]:
    diff = subprocess.run(["diff", "-w", "-U3", str(heap), str(ours)], capture_output=True, text=True, errors="replace")
    return hunks_of("\n".join(diff.stdout.splitlines()[2:]))


def outcomes(results: Path) -> dict[str, str]:
    summary = (results / "summary.txt").read_text()
    if not re.search(r"^ (All \d+ tests passed|\d+ of \d+ tests)", summary, re.M):
        raise SystemExit(f"{results.name} with {results.parent.name} did not come to its end: {results}/summary.txt")
    return dict(OUTCOME.findall(summary))


def compare(home: Path, suite: str, only: list[str]) -> tuple[int, int]:
    """Prints what became of each test, or of those in `only`; returns how many passed and how many failed."""
    heap, ours = (home / "results" / method / suite for method in ("heap", "tensor_block"))
    before, after = outcomes(heap), outcomes(ours)
    unexpected = home / "unexpected" / suite
    unexpected.mkdir(parents=True, exist_ok=True)
    same, allowed, failed = [], [], {}
    for test in only or {**before, **after}:
        file = f"results/{test}.out"
        found = difference(heap / file, ours / file) if test in before and after.get(test, "ok") != "ok" else []
        listed = ALLOWED / suite / f"{test}.diff"
        permitted = hunks_of(listed.read_text()) if listed.exists() else []
        other = []
        for hunk in found:
            match = next((known for known in permitted if known.lines == hunk.lines and known.reason), None)
            if match:
                match.seen = True
            else:
                other.append(hunk)
        if test not in after or test not in before:
            failed[test] = f"did not run with {'heap' if test in after else 'tensor_block'}"
        elif other:
            failed[test] = f"{len(other)} of {len(found)} differences are not allowed"
            text = "".join("# \n@@\n" + "\n".join(hunk.lines) + "\n" for hunk in other)
            (unexpected / f"{test}.diff").write_text(text)
        elif found:
            allowed.append(test)
        else:
            same.append(test)
        for hunk in permitted:
            if not hunk.reason:
                print(f"  {test}: a hunk of {listed.name} has no reason")
            elif not hunk.seen:
                print(f"  {test}: an allowed difference was not there: {hunk.reason}")
    for test, reason in failed.items():
        print(f"  {test}: {reason}")
    heap_failed = [test for test, outcome in before.items() if outcome != "ok"]
    print(f"{suite} with heap: {len(before)} tests, {len(heap_failed)} differ from what PostgreSQL expects {heap_failed or ''}")
    print(f"{suite} with tensor_block: {len(same)} the same, {len(allowed)} differ for an allowed reason, {len(failed)} differ otherwise")
    return len(same) + len(allowed), len(failed)


def crashes(log: Path) -> list[str]:
    """The lines of the server's log that tell of a crash, each with those that follow it: backtrace and statement."""
    lines = log.read_text(errors="replace").splitlines()
    return ["\n".join(lines[at : at + 15]) for at, line in enumerate(lines) if CRASH.search(line)]


def main() -> int:
    home, suites, only = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    shutil.rmtree(home / "unexpected", ignore_errors=True)
    passed = failed = 0
    for suite in suites:
        good, bad = compare(home, suite, only)
        passed, failed = passed + good, failed + bad
    for method in ("heap", "tensor_block"):
        found = crashes(home / "results" / method / "server.log")
        for text in found:
            print(f"--- {method}\n{text}")
        print(f"crashes and failed assertions with {method}: {len(found)}")
        failed += len(found)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
