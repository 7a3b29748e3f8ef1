"""Random kills of two-process runs: `python -m tests.kills N [SEED]`. Each must go on and end like a run never killed.

At a random moment all processes are killed, or one of them, or first torchrun, or torchrun is asked to stop; then two
processes go on with the run. Before that, N short runs must end by themselves, with exit status 0 and an empty stderr.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.commands import process
from tests.test_parallel import RUN, assert_alike, finished, started, wait_for

STEPS = "steps=300"
LONGEST = 8.0  # seconds from the first checkpoint to the kill


def killed(run: Path, random: Random) -> str:
    """Start a run and kill it; return how."""
    parent = started(2, *RUN, STEPS, f"hydra.run.dir={run}")
    wait_for(run, 5)
    time.sleep(random.uniform(0, LONGEST))
    found = subprocess.run(["pgrep", "-f", f"hydra.run.dir={run}"], capture_output=True, text=True).stdout.split()
    children = [int(pid) for pid in found if int(pid) != parent.pid]
    how = random.choice(("all", "one", "torchrun", "asked"))
    victims = {"all": [parent.pid, *children], "one": [random.choice(children or [parent.pid])]}
    for pid in victims.get(how, [parent.pid]):
        if parent.poll() is None:
            os.kill(pid, signal.SIGTERM if how == "asked" else signal.SIGKILL)
    if how == "torchrun":
        subprocess.run(["pkill", "-KILL", "-f", f"hydra.run.dir={run}"])
    parent.communicate(timeout=120)
    return how


def main(argv: list[str]) -> int:
    n, random = int(argv[0]), Random(int(argv[1]) if argv[1:] else 0)
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    alone = folder / "alone"
    process("train.py", *RUN, STEPS, f"hydra.run.dir={alone}", check=True)
    for k in range(n):
        finished(started(2, *RUN, "steps=10", f"hydra.run.dir={folder}/clean{k}"))
    print(f"{n} of {n} exits were clean", flush=True)
    for k in range(n):
        run = folder / f"run{k}"
        how = killed(run, random)
        ended = (run / "summary.json").exists()
        if not ended:
            finished(started(2, f"resume={run}"))
        assert_alike(run, alone, 1e-4, "val_nats")
        print(f"{k}: {how}, {'it had ended' if ended else 'resumed'}", flush=True)
    print(f"{n} of {n} runs ended like one that was never killed; seed {argv[1:] or [0]}, {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
