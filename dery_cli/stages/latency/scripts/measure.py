"""Measure the parts in this folder on this machine, and write latency.json.

It needs numpy and onnxruntime alone, and Python 3.8 or later:

    pip install onnxruntime
    python measure.py [--threads 4] [--provider CPUExecutionProvider] [--low-memory]

Then, where the zoo is: dery assemble --latency-from latency.json --max-latency 8ms
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
SCHEMA = "dery/latency/1"


def parse() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.path.join(HERE, "latency.json"))
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them that do not")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to onnxruntime")
    parser.add_argument(
        "--provider",
        default="CPUExecutionProvider",
        help="of onnxruntime; copies to and from the device count with each part",
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="one part after the other instead of in turns: a drift of the machine then shows",
    )
    args = parser.parse_args()
    if args.repeats < 1 or args.warmup < 0 or args.threads < 0:
        parser.error("--repeats is at least 1, --warmup and --threads at least 0")
    return args


def call_of(
    runtime: Any, entry: Mapping[str, Any], args: argparse.Namespace
) -> Callable[[], object]:
    """A function that runs one part on random numbers."""
    import numpy

    options = runtime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = runtime.InferenceSession(
        os.path.join(HERE, entry["file"]), options, providers=[args.provider]
    )
    x = numpy.random.default_rng(0).standard_normal(entry["shape"]).astype(numpy.float32)
    return lambda: session.run(None, {"x": x})


def timed(call: Callable[[], object]) -> int:
    """Nanoseconds of one call."""
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def in_turns(
    runtime: Any, entries: Mapping[Any, Mapping[str, Any]], args: argparse.Namespace
) -> dict[Any, int]:
    """Median nanoseconds of each; every round runs each of them once."""
    calls: dict[Any, Callable[[], object]] = {
        key: call_of(runtime, entry, args) for key, entry in entries.items()
    }
    spans: dict[Any, list[int]] = {key: [] for key in calls}
    rounds = args.warmup + args.repeats
    for number in range(rounds):
        for key, call in calls.items():
            span = timed(call)
            if number >= args.warmup:
                spans[key].append(span)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {key: median(found) for key, found in spans.items()}


def one_by_one(
    runtime: Any, entries: Mapping[Any, Mapping[str, Any]], args: argparse.Namespace
) -> dict[Any, int]:
    """The same, one part in memory at a time."""
    found = {}
    for place, (key, entry) in enumerate(entries.items()):
        call = call_of(runtime, entry, args)
        for _ in range(args.warmup):
            call()
        found[key] = median([timed(call) for _ in range(args.repeats)])
        if place % 50 == 0:
            print(f"part {place + 1} of {len(entries)}", file=sys.stderr)
    return found


def median(spans: Sequence[int]) -> int:
    """At least one nanosecond."""
    return max(1, round(statistics.median(spans)))


def machine(runtime: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the times are of."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": processor(),
        "onnxruntime": runtime.__version__,
        "provider": args.provider,
        "threads": args.threads,
        "low_memory": args.low_memory,
    }


def processor() -> str:
    """Its name, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Hardware", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show(networks: Mapping[str, Mapping[str, Any]], times: Mapping[Any, int]) -> None:
    """Print whole networks beside the sums of their parts."""
    for name, found in networks.items():
        total = sum(times[key] for key in found["parts"])
        whole = found["whole_ns"]
        print(
            f"{name}: whole {whole / 1e6:.3f} ms, the sum of its parts {total / 1e6:.3f} ms "
            f"({total / whole - 1:+.1%})"
        )


def main() -> None:
    """Measure all there is in the pack."""
    args = parse()
    try:
        import numpy  # noqa: F401 - asked for here, used where parts are run
        import onnxruntime as runtime
    except ImportError as error:
        sys.exit(f"error: {error}: pip install onnxruntime numpy")
    if args.provider not in runtime.get_available_providers():
        sys.exit(
            f"error: no provider {args.provider}: there are "
            f"{', '.join(runtime.get_available_providers())}"
        )
    runtime.set_default_logger_severity(3)
    with open(os.path.join(HERE, "pack.json"), encoding="utf-8") as file:
        pack = json.load(file)
    entries = dict(pack["parts"])
    entries.update({("whole", name): found for name, found in pack["networks"].items()})
    missing = [e["file"] for e in entries.values() if not os.path.isfile(_path(e))]
    if missing:
        sys.exit(f"error: {missing[0]} is missing, and {len(missing) - 1} more: copy all files")
    found = (one_by_one if args.low_memory else in_turns)(runtime, entries, args)
    networks = {
        name: {"whole_ns": found[("whole", name)], "parts": entry["parts"]}
        for name, entry in pack["networks"].items()
    }
    times = {key: found[key] for key in pack["parts"]}
    result = {
        "schema": SCHEMA,
        "for": pack["for"],
        "measured_on": machine(runtime, args),
        "repeats": args.repeats,
        "warmup": args.warmup,
        "times_ns": times,
        "networks": networks,
    }
    partial = args.out + ".part"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(partial, args.out)
    show(networks, times)
    print(f"{len(times)} parts measured; written to {args.out}")


def _path(entry: Mapping[str, Any]) -> str:
    return os.path.join(HERE, entry["file"])


if __name__ == "__main__":
    main()
