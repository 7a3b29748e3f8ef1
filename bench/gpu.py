"""Everything that wants a GPU, in one command: `python -m bench.gpu --out DIR`.

    tests       pytest -m gpu, and the Triton tests on the GPU in place of the interpreter
    sanitizer   some of these tests under compute-sanitizer, where that is installed
    kernels     python -m bench.kernels --compile
    training    python -m bench.training
    sampling    python -m bench.sampling

Each part is a process of its own with a time limit, so that one that fails or hangs leaves the others; together they
take less than ten minutes. DIR gets each part's JSON and text, and gpu.json: which parts ran, their exit status and
seconds. Exit status 1 if any part failed. No Hydra is needed.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from report import environment

TESTS = ["tests/test_gpu.py", "tests/test_triton.py"]


def parts(out: Path) -> dict[str, tuple[list[str], int]]:
    """name → command, seconds that it may take."""
    python, here = sys.executable, ["--device", "cuda", "--out", str(out)]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    small = [*pytest, "tests/test_triton.py", "-k", "scan and b3 or convolution and (3 or 2)"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool", "memcheck"]
    work = {
        "tests": ([*pytest, *TESTS], 130),
        "kernels": ([python, "-m", "bench.kernels", "--compile", *here], 120),
        "training": ([python, "-m", "bench.training", *here], 110),
        "sampling": ([python, "-m", "bench.sampling", "--repeats", "2", *here], 170),
    }
    if shutil.which(sanitizer[0]):
        work["sanitizer"] = [*sanitizer, *small], 60
    return work


def run(name: str, command: list[str], limit: int, out: Path) -> dict:
    """Run one part, its text going to DIR/name.txt."""
    start = time.perf_counter()
    with (out / f"{name}.txt").open("w") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = None
    seconds = time.perf_counter() - start
    print(f"{name}: {'too long' if status is None else f'status {status}'}, {seconds:.0f} s", flush=True)
    text = shlex.join(["python", *command[1:]] if command[0] == sys.executable else command).replace(str(out), "DIR")
    return {"part": name, "command": text, "status": status, "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    options.add_argument("--out", default="bench/results", type=Path, metavar="DIR", help="folder (%(default)s)")
    options.add_argument("--only", metavar="PARTS", help="some parts, with commas between")
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        options.error("torch finds no GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    work = parts(args.out)
    chosen = args.only.split(",") if args.only else list(work)
    for name in chosen:
        if name not in work:
            options.error(f"--only: {name!r} is not allowed: {', '.join(work)} are")
    rows = [run(name, *work[name], args.out) for name in chosen]
    result = {"command": "python -m bench.gpu", **environment(torch.device("cuda")), "rows": rows}
    (args.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["status"] != 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
