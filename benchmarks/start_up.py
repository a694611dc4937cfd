"""How long the package and its command take to start.

Whole processes, from their start to their end: `python -c "import kerasmed"`, the interpreter included, and the
installed command `kerasmed --help`. By turns with `python -c pass`, which is what of both is not ours; its median is
told in what was checked. Sources are compiled already, as after any first use.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import measure

COMMANDS = {
    "pass": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import kerasmed"],
    "help": [str(Path(sys.executable).with_name("kerasmed")), "--help"],
}


def output(name: str) -> str:
    return subprocess.run(COMMANDS[name], check=True, capture_output=True, text=True).stdout


def run():
    shown = output("help")
    told = subprocess.run(
        [sys.executable, "-c", "import kerasmed; print(kerasmed.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    commands = ("run", "sweep", "collect", "predict", "app", "data")
    if not told or any(f"  {name} " not in shown for name in commands):
        raise RuntimeError(f"Version {told!r}, or --help lists not all of {commands}:\n{shown}")
    seconds = measure.rounds({name: lambda name=name: output(name) for name in COMMANDS}, count=21, warm=2)
    bare = f"a bare interpreter takes {statistics.median(seconds['pass']):.3f} s of it"
    yield measure.value(
        "import kerasmed, fresh process",
        seconds["import"],
        unit="s",
        at_most=0.15,
        checked=f"imports version {told}; {bare}",
    )
    yield measure.value(
        "kerasmed --help", seconds["help"], unit="s", at_most=0.5, checked=f"lists all commands; {bare}"
    )


if __name__ == "__main__":
    measure.main(run)
