"""Peak memory of a library's training step, in a process of its own: the highest resident set from the kernel's books.

    python -m peer_adapters.memory WORKLOAD LIBRARY    (in tests/benchmarks; prints two numbers, bytes)

``tracemalloc`` sees nothing of PyTorch. The baseline is taken when the library is imported and the batch is there but
no model yet; the peak is over the steps after it, first refresh included. "plain" is the step without curvature.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STEPS = 4


def resident(line: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process (Linux)."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {line}")


def measure(name: str, library: str) -> tuple[int, int]:
    """Bytes of the highest resident set beyond the baseline, and of the state that is kept between steps."""
    import torch
    from workloads import workload

    import peer_adapters
    from peer_adapters.side import Cadence, Plain

    torch.set_num_threads(1)
    work = workload(name)
    if library != "plain":
        peer_adapters.import_library(library)
    base = resident("VmRSS")
    net = work.build()
    side = Plain(work, net) if library == "plain" else peer_adapters.build(library, work, net, Cadence())
    for _ in range(STEPS):
        side.step()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in side.state()}
    return resident("VmHWM") - base, sum(held.values())


def in_process(name: str, library: str) -> tuple[int, int]:
    """:func:`measure` in a fresh process; raises :class:`RuntimeError` with the last line of its error."""
    here = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-W", "ignore", "-m", "peer_adapters.memory", name, library]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    peak, state = done.stdout.split()[-2:]
    return int(peak), int(state)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    print(*measure(sys.argv[1], sys.argv[2]))
