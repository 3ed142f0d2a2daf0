"""How many models of public libraries fxcurv takes, and how much of them: a table with one row a model.

    python tests/benchmarks/coverage.py [--zoo torchvision,timm] [--only 'swin*'] [--model timm/resnet26] [--jobs 2]
        [--json FILE] [--markdown FILE]

Libraries that are not installed are said and left out; nothing is downloaded, weights are random, sizes small. Each
model is measured in a process of its own with limits on time and memory, in float64 where it runs in that, and passes
if it is captured, its tapped outputs and all gradients equal the plain model's to rounding in train and eval mode, and
one K-FAC step (``max_factor_dim`` 256) is finite with no layer left out. ``--model ZOO/NAME`` measures a model that no
list has: any name that the library itself knows. The exit code is 1 if a model fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # so that the script runs from a checkout as it is

from zoo import ZOOS  # noqa: E402
from zoo.table import causes, cells, complete, markdown, summary, why  # noqa: E402

GIB = 2**30


def _child(pipe: Any, zoo: str, name: str, options: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(options["memory"] * GIB),) * 2)
    from zoo.measure import measure

    pipe.send(measure(zoo, name, options))


def run(tasks: Iterable[tuple[str, str]], options: dict[str, Any], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows as they are finished, at most ``jobs`` at a time; a crash or a limit is a row's problem."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    waiting, running = list(tasks), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, *task, options), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (process, task, time.monotonic() + options["seconds"])
        ready = wait(list(running), timeout=1.0)
        for pipe, (process, (zoo, name), until) in list(running.items()):
            row: dict[str, Any] = {"zoo": zoo, "model": name, "passed": False}
            if pipe in ready:
                try:
                    row = pipe.recv()
                except EOFError:
                    process.join()
                    row["problem"] = f"the process ended with exit code {process.exitcode}."
            elif time.monotonic() > until:
                row["problem"] = f"not finished within {options['seconds']:.0f} s."
            else:
                continue
            process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            yield row


def _tasks(zoos: list[str], only: str | None, extra: list[str]) -> list[tuple[str, str]]:
    """The models to measure; a missing library is said on stderr."""
    found = []
    importlib.import_module("zoo.measure").warm()
    for zoo in zoos:
        module = importlib.import_module(f"zoo.{ZOOS[zoo]}")
        try:
            if module.LIBRARY:
                importlib.import_module(module.LIBRARY)
        except ImportError as error:
            print(f"{zoo}: left out, {module.LIBRARY} cannot be imported ({error})", file=sys.stderr)
            continue
        named = [name for other, _, name in (entry.partition("/") for entry in extra) if other == zoo]
        listed = [] if extra else [name for name in module.names() if only is None or fnmatch.fnmatch(name, only)]
        found += [(zoo, name) for name in (*listed, *named)]
    return found


def versions() -> str:
    """Versions of Python and of the libraries that are loaded."""
    loaded = ("torch", "torchvision", "timm", "transformers", "torch_geometric")
    texts = [f"{name} {sys.modules[name].__version__}" for name in loaded if name in sys.modules]
    return (
        f"Python {platform.python_version()}, {', '.join(texts)}; {platform.system()} {platform.machine()}, one thread"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run; print rows as they come, then the summary and what is not covered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=",".join(ZOOS), help="comma-separated: " + ", ".join(ZOOS))
    parser.add_argument("--only", help="pattern on model names")
    parser.add_argument("--model", action="append", default=[], metavar="ZOO/NAME", help="only this model; repeatable")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240.0, help="limit for a model")
    parser.add_argument("--memory", type=float, default=8.0, help="limit for a model in GiB")
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--frontend", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    chosen = parser.parse_args(arguments)
    zoos = [name.partition("/")[0] for name in chosen.model] or chosen.zoo.split(",")
    unknown = [zoo for zoo in zoos if zoo not in ZOOS]
    if unknown:
        parser.error(f"there is no zoo '{unknown[0]}'; there are {', '.join(ZOOS)}")
    options = {key: getattr(chosen, key) for key in ("seconds", "memory", "method", "frontend")}
    tasks = _tasks(list(dict.fromkeys(zoos)), chosen.only, chosen.model)
    rows = []
    for row in run(tasks, options, max(1, chosen.jobs)):
        rows.append(row)
        mark = "ok  " if complete(row) else "part" if row.get("passed") else "FAIL"
        note = "" if complete(row) else why(row)
        print(f"{mark} {row['zoo']}/{' '.join(cells(row)[:-1])}  {note}", flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1, default=str))
    order = {task: i for i, task in enumerate(tasks)}
    rows.sort(key=lambda row: order[row["zoo"], row["model"]])
    if chosen.json:
        chosen.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1, default=str))
    if chosen.markdown:
        command = f"python tests/benchmarks/coverage.py {' '.join(arguments or sys.argv[1:])}"
        chosen.markdown.write_text(markdown(rows, versions(), command))
    print(f"\n{versions()}")
    for cells_ in summary(rows):
        print("{}: {} models, {} passed, {} with > 95 % covered, {} % of all elements covered".format(*cells_[:5]))
    for reason, elements, models in causes(rows)[:15]:
        print(f"  {elements:>10,} elements: {reason} ({models})")
    return 0 if rows and all(row.get("passed") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
