"""All faults at random against the worker as it is deployed, for minutes; then every answer is checked.

One seed is one order of faults; when exactly each one strikes depends on the machine. What must hold is in `history`.
"""

import base64
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from tests import zoo
from tests.chaos.history import History, violations
from tests.chaos.world import BUCKETS, World, a_world, pick
from tests.figures import Count, Figure
from tests.servers.fault_proxy import FAULTS
from tests.servers.runpod_server import Fault
from tests.servers.swift import Swift
from tests.soak.small_jobs import CANARY, endless, failing, good

pytest_plugins = ["tests.servers.s3_fixtures", "tests.figures"]

TICK_S = 0.1
LAST_JOB_S = 1.0
"""An idle worker listens for 1.5 s after SIGTERM; a job queued as it stops listening may be lost on the wire."""

OUTAGE = {"", "delivery_failed"}
"""How a good job may end while the store has outages that are longer than the worker's patience."""

EVERY_S = {"store": 2.0, "outage": 40.0, "progress": 5.0, "result": 15.0, "twice": 6.0, "term": 75.0, "kill": 60.0}
"""How often each kind of fault strikes, on average."""

SPECIMENS = [specimen for specimen in zoo.zoo() if len(specimen.data) < 200_000]


@dataclass
class Chaos:
    """Does one random thing after another to a world."""

    world: World
    random: Random
    stops: dict[str, float] = field(default_factory=dict)
    """Endless jobs, and how long after its hand-out each is stopped."""
    outage_ends: float | None = None
    told_at: float = 0.0

    def go_on(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.tick()
            self.strike()
            time.sleep(TICK_S)

    def tick(self) -> None:
        """What happens by itself: workers are replaced, outages pass, stops are due, clients ask."""
        world = self.world
        if world.worker is None or world.notice_end():
            world.start()
        if self.outage_ends is not None and time.monotonic() > self.outage_ends:
            world.proxy.open()
            self.outage_ends = None
        for job_id, after_s in list(self.stops.items()):
            handed = world.server.of("hand_out", job_id)
            if handed and time.monotonic() > handed[0].at + after_s:
                world.stop(job_id)
                del self.stops[job_id]
        is_listening = not world.is_leaving or time.monotonic() < self.told_at + LAST_JOB_S
        if is_listening and len(world.waiting()) + len(self.stops) < 4:
            self.ask()

    def ask(self) -> None:
        world, random = self.world, self.random
        number = len(world.asked)
        kind = pick(random, {"good": 8, "url": 3, "zoo": 3, "failing": 3, "guest": 1, "endless": 1})
        world.counts[f"{kind} jobs"] += 1
        job_id = f"job{number}"
        if kind == "good":
            world.ask(job_id, good(random.choice(("image", "video", "svi_endframe")), number).payload, OUTAGE)
        elif kind == "url":
            peer = random.choice(list(world.peers))
            codes = {"good": OUTAGE, "not a picture": {"invalid_media"}}.get(peer, {"fetch_failed"})
            url = f"{world.peers[peer].url('/a.png')}?X-Amz-Signature={CANARY}"
            world.ask(job_id, good("video", number).payload | {"image_url": url}, codes)
        elif kind == "zoo":
            specimen = random.choice(SPECIMENS)
            picture = base64.b64encode(specimen.data).decode()
            # A picture of one colour may become a video of one colour, which is refused.
            codes = OUTAGE | {"bad_output"} if specimen.verdict is None else {"invalid_media", "invalid_input"}
            world.ask(job_id, good("video", number).payload | {"image_url": picture}, codes)
        elif kind == "failing":
            job = failing(random.randrange(5), world.swift, world.peers["broken"].url("/b.png"))
            world.ask(job_id, job.payload, {job.code}, **dict(job.top_level))
        elif kind == "guest":
            config = {"accessId": world.swift.access_key, "accessSecret": world.swift.secret_key,
                      "bucketName": BUCKETS[1], "endpointUrl": world.swift.endpoint}  # fmt: skip
            world.ask(job_id, good("image", number).payload, {""}, s3Config=config)
        else:
            self.stops[job_id] = random.uniform(0.1, 1.5)
            # One that is handed out again, its worker killed after the stop, comes to its end.
            world.ask(job_id, endless(number).payload, OUTAGE)

    def strike(self) -> None:
        """Once in a while, a fault."""
        world, random = self.world, self.random
        for what, every_s in EVERY_S.items():
            if random.random() >= TICK_S / every_s:
                continue
            if what == "store" and world.proxy.pending_faults < 4:
                fault = pick(random, dict.fromkeys((*FAULTS, "flip"), 1.0) | {"hang": 0.1})
                # Only an answer to a write may be an error under status 200; a HEAD has no document at all.
                matching = "^(PUT|POST)" if fault == "ok-error" else ""
                world.proxy.inject(fault, random.randint(1, 3), matching=matching)
                world.counts[f"store: {fault}"] += 1
            elif what == "outage" and self.outage_ends is None:
                world.proxy.close()
                self.outage_ends = time.monotonic() + random.uniform(0.5, 10.0)
                world.counts["store: outage"] += 1
            elif what in ("progress", "result"):
                faults = world.server.progress_faults if what == "progress" else world.server.result_faults
                if len(faults) < 2:  # a heap of them would only make the worker wait
                    faults.append(Fault(random.choice((503, 0)), random.uniform(0.0, 0.5)))
                    world.counts[f"{what} refused"] += 1
            elif what == "twice" and world.asked:
                world.counts["delivered twice"] += self.deliver_again()
            elif what == "term" and world.worker and not world.is_leaving:
                world.terminate()
                self.told_at = time.monotonic()
            elif what == "kill" and world.worker and world.worker.process.poll() is None:
                world.kill()

    def deliver_again(self) -> bool:
        """Queue one of the last jobs once more, whatever has become of it."""
        world = self.world
        recent = [job_id for job_id in list(world.asked)[-20:] if world.expected[job_id]]
        if world.is_leaving or not recent:
            return False
        world.deliver(self.random.choice(recent))
        return True

    def settle(self) -> None:
        """End every fault, let the last answers come, and let two workers leave: the second one sweeps the outbox."""
        world = self.world
        if self.outage_ends is not None:
            world.proxy.open()
            self.outage_ends = None
        world.heal()
        self.until(lambda: not world.waiting() and not world.unanswered() and not self.stops)
        world.terminate()
        self.until(world.notice_end, replace=False)
        world.start()
        outbox = world.folder / "outbox"
        self.until(lambda: not any(not place.name.startswith(".") for place in outbox.iterdir()))
        world.terminate()
        self.until(world.notice_end, replace=False)

    def until(self, holds, timeout_s: float = 120.0, *, replace: bool = True) -> None:
        """Wait; if it never comes to hold, the history will say what is wrong."""
        ends = time.monotonic() + timeout_s
        while not holds() and time.monotonic() < ends:
            if replace and (self.world.worker is None or self.world.notice_end()):
                self.world.start()
            for job_id in list(self.stops):
                if self.world.server.of("hand_out", job_id):
                    self.world.stop(job_id)
                    del self.stops[job_id]
            time.sleep(TICK_S)


def logged(history: History, violation: str) -> list[str]:
    """What the workers wrote about the job that a violation names: their logs are gone when somebody reads of it."""
    named = re.search(r"\bjob\d+\b", violation)
    lines = (line for end in history.ends for line in end.log.splitlines())
    return [line for line in lines if named and f'"{named[0]}"' in line]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nothing_is_lost_and_nothing_is_false_in_chaos(
    swift: Swift, tmp_path: Path, figure: Figure, request: pytest.FixtureRequest
) -> None:
    seed = request.config.getoption("--chaos-seed", 1)
    minutes = request.config.getoption("--chaos-minutes", 20.0)
    with a_world(swift, tmp_path) as world:
        chaos = Chaos(world, Random(seed))
        chaos.go_on(60 * minutes)
        chaos.settle()
        history = world.history()
    found = violations(history)
    answers = [answer for job_id in history.expected for answer in history.answers(job_id)]
    codes = Counter(answer.get("output", {}).get("code", "success") for answer in answers)
    figure("chaos", f"{minutes:g} min, seed {seed}, {len(history.expected)} jobs, {len(history.ends)} workers")
    figure("chaos: faults", ", ".join(f"{count} {what}" for what, count in world.counts.most_common()))
    figure("chaos: answers", ", ".join(f"{count} {code}" for code, count in codes.most_common()))
    figure(
        "chaos: successes that are true",
        Count(codes["success"] - len([f for f in found if "success" in f]), codes["success"]),
    )
    figure("chaos: violations", str(len(found)))
    assert not found, "\n".join([*found, *(line for each in found for line in logged(history, each))])
    assert codes["success"] > 5 * minutes
    assert world.counts["SIGTERM"]
    assert world.counts["SIGKILL"]
