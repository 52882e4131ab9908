"""Runs the fuzzer: `python tests/fuzz N` for N random cases, `python tests/fuzz "Case(...)"` for one.

Half of the N cases run on the default CPU kernels. The rest run on those of the other instruction sets that this CPU
has, each in its own process. The exit status is 1 if a case failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from fuzz_case import Case, check  # noqa: E402
from fuzz_strategy import cases  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402

import birnn_ext  # noqa: E402


def fuzz(count: int, last: Path) -> None:
    """Runs count random cases in this process. The file `last` names the current one, in case it kills the process."""
    done, start, isa = 0, time.monotonic(), birnn_ext.build_info()["cpu_isa"]

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case: Case) -> None:
        nonlocal done
        last.write_text(case.reproducer())
        check(case)
        done += 1
        if done % 500 == 0:
            print(f"{isa}: {done} of {count} cases, {time.monotonic() - start:.0f} s", flush=True)

    run()


def runnable(isa: str) -> bool:
    environment = {**os.environ, "BIRNN_CPU_ISA": isa}
    return not subprocess.run(
        [sys.executable, "-c", "import birnn_ext"], env=environment, capture_output=True
    ).returncode


def fuzz_isa(isa: str, count: int) -> bool:
    """Runs count random cases on one instruction set's kernels; returns whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder, "case")
        environment = {**os.environ, "BIRNN_CPU_ISA": isa, "FUZZ_LAST": str(last)}
        status = subprocess.run([sys.executable, str(HERE), str(count)], env=environment).returncode
        if status < 0:
            print(f"{isa}: killed by signal {-status}\nreproduce by: {last.read_text()}", flush=True)
    return status == 0


def main(argument: str) -> int:
    if not argument.isdigit():
        check(eval(argument, {"Case": Case}))
        print("passed")
        return 0
    if "FUZZ_LAST" in os.environ:
        fuzz(int(argument), Path(os.environ["FUZZ_LAST"]))
        return 0
    count, info = int(argument), birnn_ext.build_info()
    others = [isa for isa in info["cpu_isas"] if isa != info["cpu_isa"] and runnable(isa)]
    share = count // 2 // len(others) if others else 0
    shares = {info["cpu_isa"]: count - share * len(others), **dict.fromkeys(others if share else [], share)}
    with ThreadPoolExecutor(max_workers=2) as pool:
        passed = all(list(pool.map(fuzz_isa, shares, shares.values())))
    print(f"{count} cases passed" if passed else "a case failed")
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] == "0":
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
