"""`python -m chaos`: the real stack under faults, and what its viewers saw of them.

Seeded faults hit processes of their own on loopback, under a steady load; then all is healed, every
stream settles, and a checker reads the journals of upstream, log and viewers. Exit code 1 on any
anomaly; the folder with the output of every process is kept then.
"""

import argparse
import asyncio
import os
import pickle
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import httpx2
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from chaos.anomaly import Anomaly
from chaos.checker import check
from chaos.faults import FAULTS, Fault, Injected, inject, worst_recoveries
from chaos.journal import Sent
from chaos.load import READ_SECONDS, Load, outcomes
from chaos.stack import Stack
from relay.log import Log

SETTLE_SECONDS = 150.0
"""After the last fault: more than the longest answer, three attempts and a viewer's deadline."""
MEAN_KILL_SECONDS = 2.0
SHOWN = 20

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asks for. `kills`: of workers and of Redis, instead of a time."""

    seconds: float
    seed: int
    every: float
    faults: list[Fault]
    kills: tuple[int, int] | None


@dataclass(frozen=True)
class Result:
    """What was done and what was seen."""

    injected: list[Injected]
    load: Load
    sent: list[Sent]
    complaints: list[tuple[float, str, str]]


def main() -> int:
    plan = _plan()
    folder = Path(tempfile.mkdtemp(prefix="relay-chaos-"))
    found = 1
    try:
        result = asyncio.run(_run(plan, folder))
        journals = (result.sent, result.load.logs, result.load.viewers)
        (folder / "journals.pickle").write_bytes(pickle.dumps(journals))
        found = _report(plan, result)
    except KeyboardInterrupt:
        console.print("interrupted")
    finally:
        if found:
            console.print(f"the output of every process and the journals are in {folder}")
        else:
            shutil.rmtree(folder)
    return 1 if found else 0


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long faults are drawn")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(10**6))
    parser.add_argument("--every", type=float, default=9.0, help="seconds from fault to fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which to draw from; or none")
    parser.add_argument(
        "--kills", type=_two, help="W,R: instead, kill workers W times and Redis R times"
    )
    given = parser.parse_args()
    names = [] if given.faults == "none" else given.faults.split(",")
    if unknown := set(names) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    faults = [FAULTS[name] for name in names]
    return Plan(given.seconds, given.seed, given.every, faults, given.kills)


def _two(text: str) -> tuple[int, int]:
    """Raises ValueError, which argparse knows."""
    first, second = text.split(",")
    return int(first), int(second)


async def _run(plan: Plan, folder: Path) -> Result:
    timeout = httpx2.Timeout(READ_SECONDS, connect=5)
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as http:
        stack = Stack(folder)
        async with stack.running(http) as redis:
            log = Log(redis, open_ms=0, retention_ms=0, queue_limit=0)
            load = Load(stack.urls, http, log, Random(plan.seed + 1))  # noqa: S311
            loading = asyncio.create_task(load.run())
            injected = await _disturb(plan, stack, redis, loading)
            await stack.heal(redis)
            load.enough.set()
            await _settle(load, loading)
            sent = await _sent(http, stack.upstream_url)
        return Result(injected, load, sent, stack.complaints)


async def _disturb(
    plan: Plan, stack: Stack, redis: Redis, loading: "asyncio.Task[None]"
) -> list[Injected]:
    """All faults of the plan, until the load breaks down, which is a mistake of ours."""
    random = Random(plan.seed)  # noqa: S311
    injected: list[Injected] = []
    kill = _kill_at_random if plan.kills else _draw
    faults = asyncio.create_task(kill(plan, stack, redis, random, injected))
    await asyncio.wait({faults, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not faults.done():
        faults.cancel()
        loading.result()
    faults.result()
    return injected


async def _draw(
    plan: Plan, stack: Stack, redis: Redis, random: Random, injected: list[Injected]
) -> None:
    """A fault every so often, or as soon as the one before is over; each kind once before any
    comes again."""
    begun = time.monotonic()
    counts: Counter[str] = Counter()
    bag: list[Fault] = []
    while (passed := time.monotonic() - begun) < plan.seconds:
        due = plan.every * (int(passed / plan.every) + 1)
        await asyncio.sleep(min(due, plan.seconds) - passed)
        if due >= plan.seconds or not plan.faults:
            continue
        if not bag:
            bag = [each for each in plan.faults if counts[each.name] != each.at_most]
            random.shuffle(bag)
        if not bag:
            continue
        fault = bag.pop()
        counts[fault.name] += 1
        done = await inject(fault, stack, redis, random)
        injected.append(done)
        console.print(f"{done.begun - begun:7.1f} s  {fault.name:16}{done.whom}")


async def _kill_at_random(
    plan: Plan, stack: Stack, redis: Redis, random: Random, injected: list[Injected]
) -> None:
    """Kills at random distances, none waited for."""
    assert plan.kills is not None  # noqa: S101
    workers, of_redis = plan.kills
    faults = [FAULTS["worker-kill"]] * workers + [FAULTS["redis-kill"]] * of_redis
    random.shuffle(faults)
    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, fault in enumerate(faults, 1):
            await asyncio.sleep(random.expovariate(1 / MEAN_KILL_SECONDS))
            tasks.append(group.create_task(inject(fault, stack, redis, random)))
            if number % 25 == 0:
                console.print(f"{time.monotonic() - begun:7.1f} s  {number} kills")
    injected += [task.result() for task in tasks]


async def _settle(load: Load, loading: "asyncio.Task[None]") -> None:
    _, late = await asyncio.wait({loading}, timeout=SETTLE_SECONDS)
    if late:
        what = f"not all streams settled within {SETTLE_SECONDS} s after the faults"
        load.anomalies.append(Anomaly("unsettled", "", "run", what))
        loading.cancel()
        await asyncio.wait({loading})
    else:
        loading.result()


async def _sent(http: httpx2.AsyncClient, upstream: str) -> list[Sent]:
    """The upstream's journal, as soon as no request is open, or after 10 s as it is."""
    journal: list[dict[str, Any]] = []
    for _ in range(100):
        journal = (await http.get(f"{upstream}/emulator/requests")).json()
        if all(entry["outcome"] for entry in journal):
            break
        await asyncio.sleep(0.1)
    return [
        Sent(
            request=entry["number"],
            key=entry["key"],
            pieces=entry["sent"],
            complete=entry["outcome"] == "completed",
            open=entry["outcome"] is None,
        )
        for entry in journal
    ]


def _report(plan: Plan, result: Result) -> int:
    """Print all; returns the number of anomalies."""
    load = result.load
    exits = [Anomaly("exited", "", name, what) for _, name, what in result.complaints]
    anomalies = [*load.anomalies, *check(result.sent, load.logs, load.viewers)]
    during = _felt(result, anomalies)
    during.update(_last_before(result.injected, at) for at, _, _ in result.complaints)
    worst = worst_recoveries(result.injected, load.waits, overlap=plan.kills is not None)
    console.print(_table(result.injected, during, worst))
    _print_totals(plan, result)
    _print_anomalies([*exits, *anomalies])
    return len(exits) + len(anomalies)


def _felt(result: Result, anomalies: Sequence[Anomaly]) -> Counter[str]:
    """Fault -> the number of anomalies of streams that were under way during such a fault."""
    counts: Counter[str] = Counter()
    for anomaly in anomalies:
        if life := result.load.lives.get(anomaly.stream_id):
            counts.update(
                {
                    each.fault.name
                    for each in result.injected
                    if each.begun < life.settled and life.begun < each.ended
                }
            )
    return counts


def _last_before(injected: list[Injected], at: float) -> str:
    names = [each.fault.name for each in injected if each.begun <= at]
    return names[-1] if names else ""


def _table(injected: list[Injected], during: Counter[str], worst: dict[str, float]) -> Table:
    table = Table("fault")
    for column in ("count", "anomalies", "worst time to recover (s)"):
        table.add_column(column, justify="right")
    for name, count in sorted(Counter(each.fault.name for each in injected).items()):
        table.add_row(name, str(count), str(during[name]), f"{worst[name]:.1f}")
    return table


def _print_totals(plan: Plan, result: Result) -> None:
    load = result.load
    visits = [visit for viewer in load.viewers for visit in viewer.visits]
    totals = {
        "streams": len(load.logs),
        **dict(sorted(outcomes(load.logs).items())),
        "viewers": len(load.viewers),
        "visits": len(visits),
        "events": sum(len(visit.received) for visit in visits),
        "upstream requests": len(result.sent),
    }
    console.print(", ".join(f"{name} {count}" for name, count in totals.items()))
    command = shlex.join(["python", "-m", "chaos", *sys.argv[1:]])
    python = f"Python {platform.python_version()}"
    console.print(
        f"seed {plan.seed}; {command}; {os.cpu_count()} cores, {platform.platform()}, {python}"
    )


def _print_anomalies(anomalies: Sequence[Anomaly]) -> None:
    if not anomalies:
        console.print("no anomalies")
        return
    kinds = Counter(anomaly.kind for anomaly in anomalies)
    console.print(f"{len(anomalies)} anomalies: {dict(kinds)}", style="bold red")
    for anomaly in anomalies[:SHOWN]:
        place = " ".join(filter(None, (anomaly.stream_id, anomaly.where)))
        console.print(f"  {anomaly.kind}  {place}: {anomaly.what}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
