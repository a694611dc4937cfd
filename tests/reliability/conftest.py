"""Fixtures of the tests of reliability: note what was tried and seen, for docs/reliability.md; run a fuzzer."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.reliability import table


@pytest.fixture
def record():
    """Function (part, kind, outcomes, exact=True, timed=False): a row of docs/reliability.md, written or held to it.

    `outcomes` counts how often each was seen, as {"read right": 12, "refused with a reason": 30}. Where numbers differ
    from one version of a library to another, `exact` is False, and another run must see the same outcomes in as many
    cases, but each as often as it likes. Where a clock decides, or the number of files there are, `timed` says so as
    well, and another run must see none but these outcomes.
    """

    def note(part, kind, outcomes, exact=True, timed=False):
        assert part in table.PARTS, f"{part!r} is no part; known are {', '.join(table.PARTS)}"
        one = table.Record(part, kind, {name: int(count) for name, count in outcomes.items() if count}, exact)
        assert one.cases, f"nothing was tried of {kind!r}"
        folder = os.environ.get("KERASMED_RELIABILITY")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(f"{part} {kind}".encode()).hexdigest()[:16]
            (Path(folder) / f"{name}.json").write_text(json.dumps(one._asdict()), encoding="utf-8")
            return
        rows = [row for row in table.stated(part) if row.startswith(f"| {kind} | ")]
        assert rows, f"docs/reliability.md has no row {kind!r} under {part!r}; write it with `make reliability`"
        wrong = table.differences(one, rows[0], timed=timed)
        assert not wrong, f"docs/reliability.md says something else: {wrong}; look why, then `make reliability`"

    return note


@pytest.fixture
def fuzz(tmp_path):
    """Function (command, runs, seconds, **options): fuzz by libFuzzer until either is reached; return what it told.

    Its limit of memory counts the peak, which a process begins with that of the one it was forked from: this one may
    have been larger than the limit. So a shell, which is small, forks it (and `exit` keeps the shell from becoming it).
    """
    pytest.importorskip("atheris", reason="atheris is not installed: hypothesis alone draws files and tables")

    def run(command, runs, seconds, **options):
        options = {"runs": runs, "max_total_time": seconds, "artifact_prefix": f"{tmp_path}/", **options}
        written = [f"-{name}={value}" for name, value in options.items()]
        done = subprocess.run(["sh", "-c", '"$@"; exit', "sh", *command, *written], capture_output=True, timeout=240)
        told = done.stderr.decode(errors="replace")
        assert done.returncode == 0, told[-5000:]
        return told

    return run
