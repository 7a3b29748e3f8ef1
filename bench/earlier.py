"""Is `python sample.py` as quick as it was? `python -m bench.earlier COMMIT` times it here and at an earlier commit.

Whole processes, which take turns: at that commit; here, by somebody who never drew an image (an empty home folder, so
nothing compiled is kept on the disk); and here once more. All draw from one run, which the earlier commit trains for a
few steps on the digits. Run it on a CPU.
"""

import os
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.measure import Results, interleave, parse, parser, spread, table, whole

ROOT = Path(__file__).resolve().parent.parent
BEFORE, COLD, WARM = STARTS = ("before", "cold", "warm")
TRAINED = ("steps=2", "evaluate_every=2", "save_every=2", "sample_every=0")


def run(*command: str | Path, home: Path | None = None) -> None:
    """Run a command of this Python silently; CalledProcessError where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {} if home is None else {"HOME": str(home)}
    subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=True)


def starts(name: str, before: Path, folder: Path, args) -> list[dict]:
    """A row for each of `STARTS`: the time of a process, and its ratio to that of the earlier commit."""
    run(before / "train.py", f"model={name}", *TRAINED, f"hydra.run.dir={folder / name}")
    homes = count()

    def start(code: str) -> None:
        home = folder / f"home-{name}-{next(homes) if code == COLD else BEFORE}"
        home.mkdir(exist_ok=True)
        script = (before if code == BEFORE else ROOT) / "sample.py"
        run(script, f"checkpoint={folder / name}", f"out={folder / 'samples.png'}", home=home)

    things = {code: whole(partial(start, code)) for code in STARTS}
    times = interleave(things, args.device, args.repeats, warmup=1)
    ms = {code: spread(times[code]["total"]) for code in STARTS}
    ratios = {code: ms[code]["median"] / ms[BEFORE]["median"] for code in STARTS}
    return [{"model": name, "start": c, "ms": ms[c], "ratio": ratios[c], "ratio_to": args.commit} for c in STARTS]


def main(argv: list[str] | None = None) -> int:
    options = parser("earlier", "Time python sample.py here and at an earlier commit.", repeats=9)
    options.add_argument("commit", help="the earlier commit")
    args = parse(options, argv)
    results = Results(args, ("model", "start", "ms", "ratio"))
    git = ["git", "-C", str(ROOT), "worktree"]
    with TemporaryDirectory() as place:
        before = Path(place) / "before"
        subprocess.run([*git, "add", "--detach", "--quiet", str(before), args.commit], check=True)
        try:
            for name in args.names:
                results.case({"model": name}, lambda name=name: starts(name, before, Path(place), args))
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    table(f"python sample.py, beside {args.commit}", results.rows, ("model", "start", "ms", "ratio"))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
