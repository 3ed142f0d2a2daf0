"""fxcurv against the libraries from PyPI that can do the same work on the CPU. Writes a table and JSON.

    python -m venv peers && peers/bin/pip install torch==2.13.0 numpy jinja2 typer rich
    peers/bin/pip install -c <(echo torch==2.13.0) \
        curvlinops-for-pytorch asdfghjkl backpack-for-pytorch nngeometry singd
    peers/bin/python tests/benchmarks/peers.py [--workloads W1 W2] [--peers asdl] [--threads 1 2] [--quick]

The work is the same for all: empirical Fisher, factors every step with an exponential average, inverses every tenth
step, preconditioning every step, SGD. fxcurv covers every parameter; peers leave embeddings and norms to SGD. fxcurv
has a second line, with what a user has to ask for: weight gradients never formed where rows are fewer than the layer is
wide, and layers refreshed in turn.

Sides take turns in one process: a round runs one step of each. A time is divided by the plain step of its round, and
the median over rounds is the ratio. "refresh" has cycles of ten steps: its ratio is the mean over the places in a cycle
of the medians over cycles, and its spread is the slowest place over the median. Factors are compared before anything is
timed: fxcurv's with those from rows, a peer's with fxcurv's in its own convention; one that is wrong is not timed.

JSON: {"machine", "torch", "rows": [{workload, library, threads, phase, median_ms, ratio, p20_ms, p80_ms, p99_ms, ...}],
"memory": [...], "gate": [...], "notes": [...]}.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a checkout as it is

import torch  # noqa: E402
from peer_adapters import LIBRARIES, bare, build, gate, memory, report  # noqa: E402
from peer_adapters.side import NEVER, Cadence, Plain  # noqa: E402
from workloads import Workload, interleaved, workload  # noqa: E402

WORKLOADS = ("W1", "W2", "W2w", "W3", "W4", "W4c")
CYCLE = 10
PHASES = {
    "apply": Cadence(NEVER, NEVER),
    "statistics": Cadence(1, NEVER),
    "refresh": Cadence(1, CYCLE),
}
SAMPLED = "refresh, sampled Fisher"
ON_REQUEST = "fxcurv, on request"
REQUESTED = {"weight_gradients": False, "stagger": True}
"""No ``.grad`` of a weight between backward and step, and layers refreshed in turn: what a user has to ask for."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, ratio in plain steps; slowest: the slowest place of a cycle over p50."""

    workload: str
    library: str
    threads: int
    phase: str
    median_ms: float
    ratio: float
    p20_ms: float
    p80_ms: float
    p99_ms: float
    slowest: float | None = None


def first_line(error: BaseException) -> str:
    """The kind and the first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def sides(work: Workload, libraries: list[str]) -> dict[tuple[str, str], Callable[[], object]]:
    """(library, phase) -> one step or one run of the products."""
    net = work.build()
    found: dict[tuple[str, str], Callable[[], object]] = {("plain", "step"): Plain(work, copy.deepcopy(net)).step}
    for library in libraries:
        for phase, cadence in PHASES.items():
            found[library, phase] = build(library, work, copy.deepcopy(net), cadence).step
        if library == "fxcurv":
            found[library, SAMPLED] = build(library, work, copy.deepcopy(net), PHASES["refresh"], fisher="mc").step
            for phase, cadence in PHASES.items():
                found[ON_REQUEST, phase] = build(library, work, copy.deepcopy(net), cadence, **REQUESTED).step
    for phase, runs in bare.actions(work, net).items():
        found["bare products", phase] = bare.together(runs)
    return found


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def summarise(name: str, threads: int, times: dict[tuple[str, str], list[float]]) -> list[Row]:
    """Rows of one comparison; the refresh of bare products is a tenth, as it falls in every tenth step."""
    plain = times["plain", "step"]
    rows = []
    for (library, phase), spent in times.items():
        share = 1 / CYCLE if (library, phase) == ("bare products", "refresh") else 1.0
        ratios = [share * a / b for a, b in zip(spent, plain, strict=True)]
        ratio, slowest = quantile(ratios, 0.5), None
        if phase in ("refresh", SAMPLED) and library != "bare products":
            places = [quantile(ratios[i::CYCLE], 0.5) for i in range(min(CYCLE, len(ratios)))]
            ratio, slowest = sum(places) / len(places), max(places) / quantile(places, 0.5)
        ms = [1e3 * t for t in spent]
        low, middle, high, top = (quantile(ms, q) for q in (0.2, 0.5, 0.8, 0.99))
        rows.append(Row(name, library, threads, phase, middle, ratio, low, high, top, slowest))
    return rows


def admitted(name: str, libraries: list[str], notes: list[str]) -> tuple[list[str], list[dict[str, object]]]:
    """Libraries whose factors are right on a workload, and how exact each is; the others with their reason."""
    work = workload(name).small()
    net = work.build().double()
    ours, error = gate.check_fxcurv(work, net)
    right, record = ["fxcurv"], [{"workload": name, "library": "fxcurv", "distance": error, "reason": None}]
    for library in libraries:
        reason = None
        distance = None
        try:
            distance = gate.check_peer(library, work, net, ours)
            right.append(library)
        except ImportError as e:
            reason = f"not installed ({e})"
        except Exception as e:  # whatever a library raises is its line in the table
            reason = first_line(e)
        if reason:
            notes.append(f"{name}, {library}: {reason}")
        record.append({"workload": name, "library": library, "distance": distance, "reason": reason})
    return right, record


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    peers = [name for name in LIBRARIES if name != "fxcurv"]
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="all by default; W1 with --quick")
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, help="all by default")
    parser.add_argument("--threads", nargs="+", type=int, help="1 and 2 by default; 1 with --quick")
    parser.add_argument("--rounds", type=int, help="30 by default, three cycles of refreshes; 10 with --quick")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--json", type=Path, help="where to write the measurements")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--quick", action="store_true", help="one workload, one cycle, no memory: under a minute")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Gate, time, weigh, and write."""
    args = arguments(given)
    names = args.workloads or (["W1"] if args.quick else list(WORKLOADS))
    threads = args.threads or ([1] if args.quick else [1, 2])
    rounds = args.rounds or (CYCLE if args.quick else 3 * CYCLE)
    warnings.simplefilter("ignore")
    result: dict[str, object] = {"machine": platform.machine(), "torch": torch.__version__, "clock": args.clock}
    rows: list[Row] = []
    notes: list[str] = []
    weights: list[dict[str, object]] = []
    checks: list[dict[str, object]] = []
    for name in names:
        torch.set_num_threads(1)
        right, record = admitted(name, list(args.peers), notes)
        checks += record
        for count in threads:
            torch.set_num_threads(count)
            times = interleaved(sides(workload(name), right), rounds, warm=2, clock=CLOCKS[args.clock])
            rows += summarise(name, count, times)
            print(report.speed(rows, name, count), flush=True)
        for library in [] if args.quick else ["plain", *right]:
            peak, state = memory.in_process(name, library)
            weights.append({"workload": name, "library": library, "peak_bytes": peak, "state_bytes": state})
        print(report.weights(weights, name), flush=True)
        result |= {"rows": [asdict(r) for r in rows], "memory": weights, "gate": checks, "notes": notes}
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(report.everything(rows, weights, notes))
    print("\n".join(["not in the tables:", *notes] if notes else ["every library did every workload"]))


if __name__ == "__main__":
    main()
