"""What is to be done for what the studio says: acts, read without a socket, a clock or a thread."""

from __future__ import annotations

import json
from typing import Any

import pytest

from studio_worker.jobs import ImageTask, Job
from studio_worker.models import ModelSource
from studio_worker.report.logs import ShippingBuffer
from studio_worker.studio.session.exchange import (
    Act,
    Answered,
    AwaitUpload,
    Exchange,
    Hand,
    Judge,
    Opened,
    Redeliver,
    Send,
)
from studio_worker.studio.session.offers import AlreadyOurs, Impossible, OnItsWay, Refuse, Take
from studio_worker.studio.session.protocol import Offered, SessionProtocol
from studio_worker.studio.session.shipping import Shipping
from tests.lab.frames import CAPABILITIES, CLAIM


def hear(exchange: Exchange, **frame: Any) -> list[Act]:
    return exchange.receive(json.dumps(frame), 1.0)


def offer(exchange: Exchange, job_id: str) -> list[Act]:
    return hear(exchange, type="offer", claim={**CLAIM, "jobId": job_id})


def offered(acts: list[Act]) -> Offered:
    """The one offer that is to be judged now."""
    (judge,) = [act for act in acts if isinstance(act, Judge)]
    return judge.offer


def in_short(acts: list[Act]) -> list[str]:
    """Frames by their type and the others by their name, in order."""
    return [
        json.loads(act.frame.to_json())["type"] if isinstance(act, Send) else type(act).__name__
        for act in acts
    ]


def job(job_id: str) -> Job:
    return Job(job_id, "m", ImageTask(prompt="a castle"), ModelSource(engine="synthetic"))


@pytest.fixture
def exchange() -> Exchange:
    """A conversation after the studio's welcome."""
    exchange = Exchange(SessionProtocol(0.0), Shipping(ShippingBuffer()))
    assert in_short(exchange.begin("token", CAPABILITIES)) == ["hello"]
    assert hear(exchange, type="welcome", workerId="w1", serverTime="now") == [Opened()]
    return exchange


def test_job_is_accepted_before_it_is_handed_over(exchange: Exchange) -> None:
    """No job begins that the studio could not know to be taken, and the next offer is judged after that."""
    first = offered(offer(exchange, "j1"))
    assert offer(exchange, "j2") == [], "judged beside the one before it"
    acts = exchange.judged(first, Take(job("j1")))
    assert in_short(acts) == ["accept", "Hand", "Answered", "Judge"]
    assert acts[1] == Hand(job("j1"))
    assert offered(acts).claim["jobId"] == "j2"


def test_refusal_and_impossibility_are_said_in_the_protocols_order(exchange: Exchange) -> None:
    """What may pass is rejected; what no worker could do is accepted first, for only then may it fail."""
    refusal = Refuse("j1", "the worker has a job in hand", "busy")
    acts = exchange.judged(offered(offer(exchange, "j1")), refusal)
    assert in_short(acts) == ["reject", "Answered"]
    assert acts[1] == Answered(refusal, CLAIM["model"])
    acts = exchange.judged(offered(offer(exchange, "j2")), Impossible("j2", "malformed"))
    assert in_short(acts) == ["accept", "fail", "Answered"]


def test_offer_of_what_is_being_uploaded_is_answered_after_the_upload(exchange: Exchange) -> None:
    """Nothing is said until the upload has ended, and then the offer is judged anew, once."""
    again = offered(offer(exchange, "j1"))
    acts = exchange.judged(again, OnItsWay("j1"))
    assert in_short(acts) == ["AwaitUpload", "Answered"]
    assert acts[0] == AwaitUpload("j1")
    assert exchange.has_postponed("j1")
    assert exchange.settle("j1") == [Judge(again)]
    assert exchange.settle("j1") == []
    acts = exchange.judged(again, AlreadyOurs("j1"))
    assert in_short(acts) == ["accept", "Redeliver", "Answered"]
    assert acts[1] == Redeliver("j1")


def test_failure_of_a_job_that_is_not_held_is_not_said(exchange: Exchange) -> None:
    """Failing a job of an earlier connection, or twice, is a violation of the protocol: there is no act."""
    assert exchange.fail("j1", "late", retryable=True) == []
    exchange.judged(offered(offer(exchange, "j1")), Take(job("j1")))
    assert in_short(exchange.fail("j1", "out of memory", retryable=True)) == ["fail"]
    assert exchange.fail("j1", "out of memory", retryable=True) == []


def test_judgement_that_comes_after_the_connection_has_ended_does_nothing(exchange: Exchange) -> None:
    """The studio has put the job back: it is neither accepted over a later connection nor made."""
    first = offered(offer(exchange, "j1"))
    exchange.end()
    assert exchange.judged(first, Take(job("j1"))) == []
