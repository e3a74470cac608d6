"""What malformed requests, overload, an end under traffic and killed processes do to a server's good requests.

    python benchmarks/serving_faults.py [--only malformed overload soak kills] [--seconds 60]

A ResNet-18 at 224 px on the processor, served by ``mio serve`` of this checkout. Clients and server share the machine;
for the overload each has half of its cores, as what ten times too many clients need is not the server's to give.
Half of the clients ask over HTTP, half over gRPC, with files and with pixels. Fails, after all is stored, where a bound
is missed.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from functools import partial
from pathlib import Path

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).parent))

from attacks import Attacker
from fault_clients import (
    Answer,
    GrpcClient,
    HttpClient,
    Item,
    clients_of,
    drive,
    endless,
    is_right,
    items_of,
    kinds,
    learn,
    outcome,
)
from served import MAX_BATCH, SIZE, Running, growth, make_bundle, photographs, serving, watched

CHECKS = ("malformed", "overload", "soak", "kills")
CLIENTS = 8
NUM_GOOD, GOOD_A_BAD = 900, 9
OVERLOAD_S, OVERLOAD_WAIT_S, MOST_S, TIMES = 20.0, 2.0, 8.0, 10
SLACK_S = 0.5
"""Beyond the server's limit and the batch that a request is in: the way there and back, with no core to spare."""
SMALL = (256, 192)
READY_S = 5.0
SLOW_S = 5
"""The server's limit for slow senders, ``--timeout-seconds``."""


async def malformed(server: Running, items: list[Item]) -> tuple[dict[str, object], dict[str, bool]]:
    """900 good requests, alone and among 100 malformed ones."""
    await learn(server, items)
    clean: list[float] = []
    good: list[tuple[bool, float]] = []
    wanted = [items[index % len(items)] for index in range(NUM_GOOD)]
    with Attacker(server.name, server.http_port, items[0].image, MAX_BATCH) as attacker:
        await drive(clients_of(server, CLIENTS), iter(wanted[:100]), lambda *_: None)
        await drive(clients_of(server, CLIENTS), iter(wanted), lambda _, answer: clean.append(answer.seconds))

        def count(item: Item, answer: Answer) -> None:
            good.append((is_right(item, answer), answer.seconds))
            if len(good) % GOOD_A_BAD == 0:
                attacker.start(attacker.kinds[len(good) // GOOD_A_BAD % len(attacker.kinds)])

        async with watched(server) as seen:
            await drive(clients_of(server, CLIENTS), iter(wanted), count)
            outcomes = await asyncio.to_thread(attacker.end)
    p99 = [1000 * float(np.percentile(seconds, 99)) for seconds in (clean, [seconds for _, seconds in good])]
    problems = Counter(problem for outcome in outcomes if (problem := outcome.problem()))
    said = {each.kind: f"{each.status} {each.text}"[:120] for each in outcomes}
    slowest = {each.kind: max(other.seconds for other in outcomes if other.kind == each.kind) for each in outcomes}
    result = {"good": len(good), "bad": len(outcomes), "right": sum(right for right, _ in good), "p99_ms": p99}
    result |= {"ready": np.mean(seen["ready"]), "growth": growth(seen["bytes"]), "problems": problems}
    return result | {"said": said, "slowest_s": slowest}, {
        "every good request is answered rightly": all(right for right, _ in good),
        "every bad request is answered for itself": not problems,
        "p99 within 1.5 of a clean run": p99[1] <= 1.5 * p99[0],
        "ready throughout": all(seen["ready"]),
        "memory flat": growth(seen["bytes"]) <= 1.1,
    }


async def most_of(server: Running, items: list[Item]) -> float:
    """Return how many good answers a second clients get that wait for each answer."""
    start, done = time.monotonic(), Counter[str]()
    clients = clients_of(server, 2 * CLIENTS)
    supply = endless(items, lambda: time.monotonic() > start + MOST_S)
    await drive(clients, supply, lambda _, answer: done.update([answer.status]))
    return done["ok"] / (time.monotonic() - start)


async def overload(server: Running, items: list[Item]) -> tuple[dict[str, object], dict[str, bool]]:
    """Ten times the requests that 16 clients get answered before and after; small files, which cost clients little."""
    items = [item for item in items if item.model == server.models["files"]]
    await learn(server, items)
    before = await most_of(server, items)
    idle: dict[type, deque[HttpClient | GrpcClient]] = {HttpClient: deque(), GrpcClient: deque()}
    answers: list[tuple[float, bool, Answer]] = []

    async def ask(item: Item, client: HttpClient | GrpcClient) -> None:
        answer = await client.ask(item)
        answers.append((time.monotonic(), isinstance(client, GrpcClient), answer))
        idle[type(client)].append(client)

    start, number, tasks, used = time.monotonic(), 0, [], time.process_time()
    while (passed := time.monotonic() - start) < OVERLOAD_S:
        while number < passed * TIMES * before:
            fresh = clients_of(server, 2)[number % 2]
            waiting = idle[type(fresh)]
            client = waiting.popleft() if waiting else fresh
            tasks.append(asyncio.ensure_future(ask(items[number % len(items)], client)))
            number += 1
        await asyncio.sleep(0.002)
    used = (time.process_time() - used) / OVERLOAD_S
    await asyncio.gather(*tasks)
    after = await most_of(server, items)
    most = (before + after) / 2
    window = (start + OVERLOAD_WAIT_S, start + OVERLOAD_S)
    goodput = sum(a.status == "ok" for at, _, a in answers if window[0] <= at <= window[1]) / (window[1] - window[0])
    statuses = {
        name: Counter(a.status for _, rpc, a in answers if rpc == (name == "grpc")) for name in ("http", "grpc")
    }
    others = Counter(f"{a.status}: {a.reason[:120]}" for *_, a in answers if a.status not in ("ok", *_BUSY))
    longest = {
        name: max(a.seconds for *_, a in answers if a.status == name) for name in {a.status for *_, a in answers}
    }
    allowed = OVERLOAD_WAIT_S + MAX_BATCH / most + SLACK_S
    refused = [a for *_, a in answers if a.status in _BUSY]
    result = {
        "most_per_s": [before, after],
        "sent_per_s": number / OVERLOAD_S,
        "goodput_per_s": goodput,
        "longest_s": longest,
    }
    result |= {"allowed_s": allowed, "others": others}
    result["refusal_p99_ms"] = 1000 * float(np.percentile([a.seconds for a in refused], 99)) if refused else None
    return result | {"statuses": statuses, "limit_s": OVERLOAD_WAIT_S, "client_cores": used}, {
        "goodput of 90 % of the most": goodput >= 0.9 * most,
        "no request waits beyond its limit": max(longest.values()) <= allowed,
        "refused ones are told to come again": bool(refused) and all(a.retry_after for a in refused),
        "nothing but answers and refusals": all(set(found) <= {"ok", *_BUSY} for found in statuses.values()),
        "sent at ten times the most": number / OVERLOAD_S >= 0.9 * TIMES * before,
    }


async def soak(server: Running, items: list[Item], seconds: float) -> tuple[dict[str, object], dict[str, bool]]:
    """A minute of traffic, and SIGTERM in the middle of it."""
    await learn(server, items)
    answers, late, ended = Counter[str](), Counter[str](), [False]

    def count(item: Item, answer: Answer) -> None:
        (late if ended[0] else answers).update([outcome(item, answer)])

    traffic = asyncio.ensure_future(
        drive(clients_of(server, CLIENTS), endless(items, lambda: server.process.poll() is not None), count)
    )
    async with watched(server) as seen:
        await asyncio.sleep(seconds)
    ended[0] = True
    server.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    status = await asyncio.to_thread(server.process.wait, 60)
    took = time.monotonic() - start
    await traffic
    result = {"answers": answers, "after SIGTERM": late, "end_s": took, "status": status}
    return result | {"growth": growth(seen["bytes"]), "said": server.log.read_text()[-200:]}, {
        "every request is answered rightly": kinds(answers) == {"ok"},
        "no request is cut": kinds(late) <= {"ok", "unreachable", "not ready"},
        "status 0": status == 0,
        "memory flat": growth(seen["bytes"]) <= 1.1,
    }


async def kills(server: Running, items: list[Item]) -> tuple[dict[str, object], dict[str, bool]]:
    """Kill a decoding process, three times, and a worker, under traffic."""
    await learn(server, items)
    answers, over = Counter[str](), [False]

    def count(item: Item, answer: Answer) -> None:
        answers.update([outcome(item, answer)])

    traffic = asyncio.ensure_future(drive(clients_of(server, CLIENTS), endless(items, lambda: over[0]), count))
    found: list[dict[str, object]] = []
    for kind in ("decoder", "decoder", "decoder", "worker"):
        await asyncio.sleep(2)
        answers.clear()
        workers = [pid for pid, parent in server.pids().items() if parent == server.process.pid]
        decoders = [pid for pid, parent in server.pids().items() if parent in workers]
        os.kill((workers if kind == "worker" else decoders)[0], signal.SIGKILL)
        start = time.monotonic()
        await asyncio.sleep(0.1)
        ready = False
        while not ready and time.monotonic() - start < 30:
            ready = await asyncio.to_thread(server.get, "/v2/health/ready") is not None
        row = {"killed": kind, "ready_s": time.monotonic() - start}
        await asyncio.sleep(2)
        found.append(row | {"answers": answers.copy()})
    over[0] = True
    await traffic
    return {"kills": found}, {
        "no answered request is wrong": all(kinds(each["answers"]) <= {"ok", *_GONE} for each in found),
        "a killed decoder costs no request": all(kinds(each["answers"]) == {"ok"} for each in found[:-1]),
        "ready again in time": all(each["ready_s"] <= READY_S for each in found),
    }


_BUSY = ("busy", "timed out")
_GONE = ("cut", "unreachable", "not ready")


def main() -> None:
    """Measure, store, hold to the bounds."""
    from machine import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the soak")
    options = parser.parse_args()
    checks = {
        "malformed": malformed,
        "overload": overload,
        "soak": partial(soak, seconds=options.seconds),
        "kills": kills,
    }
    results, missed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "resnet18.mio", "resnet18", side=224)
        for name in options.only:
            flags, cores, mine = [], None, os.sched_getaffinity(0)
            if name == "overload":
                flags, ordered = ["--max-wait-seconds", str(OVERLOAD_WAIT_S)], sorted(mine)
                cores, others = ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]
                os.sched_setaffinity(0, others)
            with serving(bundle, "--timeout-seconds", str(SLOW_S), *flags, cores=cores) as server:
                size = SMALL if name == "overload" else SIZE
                items = items_of(server.models, photographs(8, seed=1, size=size), side=224)

                result, bounds = uvloop.run(checks[name](server, items))
            os.sched_setaffinity(0, mine)
            results[name] = result | {"bounds": bounds}
            missed += [f"{name}: {bound}" for bound, is_held in bounds.items() if not is_held]
            print(name, json.dumps(results[name]), flush=True)
    if set(options.only) == set(CHECKS):
        save("serving_faults", {"bounds missed": missed, **results})
    if missed:
        raise SystemExit("\n".join(["bounds missed:", *missed]))


if __name__ == "__main__":
    main()
