"""The people of a farm: who queues what when, from a seed, and the pictures they get."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fakes.machine import SOURCE
from tests.farm.calls import NoAnswer, send_json
from tests.farm.judge import Account

MODELS = ("z-image", "sdxl", "flux", "chroma", "qwen-image")
_MODEL_WEIGHTS = (10, 6, 4, 2, 1)
_PRIORITIES = (0, 5, -5)
_PRIORITY_WEIGHTS = (80, 12, 8)
_BATCH = 40
_QUEUED_AHEAD = 0.5
"""A batch comes once this share of all before it is done: jobs come while others are made, and some wait."""


@dataclass(frozen=True)
class Wish:
    """A job that somebody will queue."""

    submitter: str
    model: str
    priority: int


def plan(seed: int, jobs: int, people: int, *, impossible: int = 0) -> list[list[Wish]]:
    """Batches in the order in which they come, each of one person; the same for the same arguments.

    The first person has half of all jobs, the others the other half in very different shares.
    """
    chance = random.Random(f"people {seed} {jobs} {people}")
    shares = [float(people - 1), *(1.0 / rank for rank in range(1, people))]
    shares[0] = sum(shares[1:])
    names = [f"person {number:02}" for number in range(people)]
    wishes: dict[str, list[Wish]] = {name: [] for name in names}
    for name in [*names, *chance.choices(names, shares, k=jobs - people - impossible)]:
        model = chance.choices(MODELS, _MODEL_WEIGHTS)[0]
        wishes[name].append(Wish(name, model, chance.choices(_PRIORITIES, _PRIORITY_WEIGHTS)[0]))
    batches = [
        each[begin : begin + _BATCH] for each in wishes.values() for begin in range(0, len(each), _BATCH)
    ]
    chance.shuffle(batches)
    batches[0] += [Wish(names[0], "impossible", 0)] * impossible
    return batches


async def queue_all(
    batches: Sequence[Sequence[Wish]], account: Account, port_of: Callable[[], int], ended: Callable[[], int]
) -> None:
    """Queue everything by the API, several people at a time.

    Args:
        ended: how many jobs have come to an end so far.
    """
    before = 0
    async with asyncio.TaskGroup() as tasks:
        for batch in batches:
            while ended() < before * _QUEUED_AHEAD:
                await asyncio.sleep(0.1)
            tasks.create_task(_queue(batch, account, port_of))
            before += len(batch)


async def queue_steadily(
    batches: Sequence[Sequence[Wish]], account: Account, port_of: Callable[[], int], per_s: float
) -> None:
    """Queue everything by the API, one job after the other, so many a second."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as tasks:
        for number, wish in enumerate(wish for batch in batches for wish in batch):
            await asyncio.sleep(began + number / per_s - loop.time())
            tasks.create_task(_queue([wish], account, port_of))


async def _queue(batch: Sequence[Wish], account: Account, port_of: Callable[[], int]) -> None:
    for wish in batch:
        while not await _is_taken(wish, account, port_of()):
            await asyncio.sleep(1.0)


async def _is_taken(wish: Wish, account: Account, port: int) -> bool:
    body = {
        "model": wish.model,
        "task": {"prompt": "a red potion", "width": 64, "height": 64, "ext": "png"},
        "modelSource": SOURCE,
        "priority": wish.priority,
        "submitter": wish.submitter,
        "maxAttempts": 100,
    }
    try:
        status, answer = await send_json(port, "POST", "/api/jobs", body)
    except NoAnswer as error:
        account.unanswered += error.was_sent
        return False
    if status != 201:
        account.unanswered += 1  # it may have been queued, and the answer be about something after that
        return False
    account.taken.add(answer["jobId"])
    return True


def picture(job_id: str) -> bytes:
    """A valid PNG of 24 pixels a side and about 1.8 kB, of noise that belongs to this job."""
    pixels = hashlib.shake_128(job_id.encode()).digest(24 * 24 * 3)
    rows = b"".join(b"\0" + pixels[begin : begin + 72] for begin in range(0, len(pixels), 72))
    header = struct.pack(">IIBBBBB", 24, 24, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
