"""`studio-worker register`, as an operator types it: who each lane is, and how one of them is forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from studio_worker.box.state_lock import state_lock
from studio_worker.jobs import Picture
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.http.identity import Identity, IdentityFile, Standing, identity_name
from tests.cli.test_app import command, mistake
from tests.lab.spooled import job

Configured = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path) -> Configured:
    """A configuration with so many lanes, and its state folder, called so."""

    def configured(lanes: int = 1, state: str = "state") -> Path:
        (tmp_path / "etc" / "models.d").mkdir(parents=True, exist_ok=True)
        (tmp_path / state).mkdir(exist_ok=True)
        (tmp_path / "etc" / "config.toml").write_text(
            f'[models]\nroot = "{tmp_path}/models"\n[state]\ndir = "{tmp_path}/{state}"\n'
            f"[worker]\nlanes = {lanes}\n"
        )
        return tmp_path / "etc"

    return configured


def known(state: Path, lane: int = 1, **facts: str) -> Path:
    """The identity file of an approved lane, or with these facts."""
    facts = facts or {"worker_id": f"w{lane}", "auth_token": f"token-of-w{lane}"}
    IdentityFile(state / identity_name(lane)).save(Identity(f"i{lane}", **facts))
    return state / identity_name(lane)


def finished(state: Path, lane: int = 1, job_id: str = "job-1") -> None:
    """A picture that this lane has not delivered yet."""
    Outbox(state / "outbox").add(job(job_id=job_id), Picture(b"picture", "webp", {}), {}, lane)


def waiting(state: Path) -> set[str]:
    return {delivery.job_id for delivery in Outbox(state / "outbox").oldest()}


# --- pictures that wait ---


def test_reset_with_pictures_that_wait_is_refused(site: Configured, tmp_path: Path) -> None:
    """No finished picture is lost by --reset: it says how many wait and what delivers them, status 75."""
    etc, state = site(), tmp_path / "state"
    identity = known(state)
    finished(state)
    finished(state, job_id="job-2")
    said = mistake("register", "--reset", "--config", etc, status=75)
    assert "2 pictures wait for delivery under this identity" in said
    assert "start the service to deliver them, or give --drop-pictures" in said
    assert identity.exists()
    assert waiting(state) == {"job-1", "job-2"}


def test_reset_drops_pictures_where_told_so(site: Configured, tmp_path: Path) -> None:
    """--drop-pictures forgets all the same, says how many went, and leaves nothing for the next start."""
    etc, state = site(), tmp_path / "state"
    identity = known(state)
    finished(state)
    done = command("register", "--reset", "--drop-pictures", "--config", etc)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 picture(s) dropped" in done.stdout
    assert not identity.exists()
    assert waiting(state) == set()


@pytest.mark.parametrize(
    ("content", "cure"),
    [('{"install_id": "i", "rejected": "no"}', "under no other one"), ("{", "from a backup")],
    ids=["rejected", "damaged"],
)
def test_reset_asks_also_where_the_identity_is_of_no_use(
    site: Configured, tmp_path: Path, content: str, cure: str
) -> None:
    """Of a rejected or damaged identity the same is asked, and nobody is sent to start a service in vain."""
    etc, state = site(), tmp_path / "state"
    (state / "identity.json").write_text(content)
    (state / "identity.json").chmod(0o600)
    finished(state)
    said = mistake("register", "--reset", "--config", etc, status=75)
    assert "1 picture waits" in said
    assert cure in said
    assert "--drop-pictures" in said
    assert "start the service" not in said
    assert command("register", "--reset", "--drop-pictures", "--config", etc).returncode == 0
    assert not (state / "identity.json").exists()


def test_reset_of_a_lane_asks_about_its_own_pictures(site: Configured, tmp_path: Path) -> None:
    """What waits for one lane holds up the forgetting of that lane, and of no other."""
    etc, state = site(3), tmp_path / "state"
    for lane in (1, 2, 3):
        known(state, lane)
    finished(state, 2)
    assert command("register", "--reset", "--lane", "3", "--config", etc).returncode == 0
    assert "1 picture waits" in mistake("register", "--reset", "--lane", "2", "--config", etc, status=75)
    assert waiting(state) == {"job-1"}


def test_reset_says_how_pictures_of_a_lane_that_does_not_run_are_delivered(
    site: Configured, tmp_path: Path
) -> None:
    """What a lane made that does not run any more is delivered by running it, and the cure says so."""
    etc, state = site(1), tmp_path / "state"
    for lane in (1, 2):
        known(state, lane)
    finished(state, 2)
    said = mistake("register", "--reset", "--config", etc, status=75)
    assert "set [worker] lanes = 2 and start the service to deliver them, or" in said


def test_reset_leaves_pictures_whose_identity_is_not_here(site: Configured, tmp_path: Path) -> None:
    """What the first lane delivers by systemd credentials does not go with another lane's identity."""
    etc, state = site(2), tmp_path / "state"
    known(state, 2)
    finished(state)
    assert command("register", "--reset", "--drop-pictures", "--config", etc).returncode == 0
    assert waiting(state) == {"job-1"}


# --- lanes ---


@pytest.mark.parametrize("lane", [1, 2])
def test_reset_of_one_lane_leaves_the_others(site: Configured, tmp_path: Path, lane: int) -> None:
    """--reset --lane N forgets that lane alone: who was approved beside it stays so."""
    etc, state = site(2), tmp_path / "state"
    gone, kept = known(state, lane), known(state, 3 - lane)
    before = kept.read_bytes()
    done = command("register", "--reset", "--lane", f"{lane}", "--config", etc)
    assert done.stdout.startswith(f"identity of lane {lane} forgotten; ")
    assert kept.read_bytes() == before
    left = IdentityFile(gone).found()
    assert left is None or left.standing is Standing.PRISTINE
    assert f"approved as worker w{3 - lane}" in command("register", "--config", etc).stdout


def test_reset_without_a_lane_forgets_all(site: Configured, tmp_path: Path) -> None:
    """--reset alone forgets every lane, also where the first one's identity is missing."""
    etc, state = site(2), tmp_path / "state"
    known(state, 2)
    assert command("register", "--reset", "--config", etc).stdout.startswith("identity forgotten; ")
    assert not (state / "identity-2.json").exists()


def test_lane_that_is_not_there_is_told(site: Configured, tmp_path: Path) -> None:
    """A lane that nobody has is a mistake of the command line, and forgets nothing; so is --lane alone."""
    etc, identity = site(2), known(tmp_path / "state")
    assert "no lane 3" in command("register", "--reset", "--lane", "3", "--config", etc).stderr
    assert command("register", "--lane", "1", "--config", etc).returncode == 2
    assert identity.exists()


def test_identities_of_further_lanes_are_shown_without_the_first(site: Configured, tmp_path: Path) -> None:
    """Where the first lane's identity is missing, register still shows the others'."""
    etc = site(2)
    known(tmp_path / "state", 2)
    shown = command("register", "--config", etc).stdout
    assert shown == "lane 1: not registered\nlane 2: approved as worker w2\n"


def test_lanes_beyond_the_configured_ones_are_marked(site: Configured, tmp_path: Path) -> None:
    """Of a lane that does not run any more register says so, and why."""
    etc = site(1)
    known(tmp_path / "state")
    known(tmp_path / "state", 2)
    assert (
        "lane 2: approved as worker w2 (not in use: [worker] lanes = 1)"
        in command("register", "--config", etc).stdout
    )


@pytest.mark.parametrize(
    ("state", "lanes", "damaged", "cure"),
    [
        ("state", (1,), 1, "`studio-worker register --reset`"),
        ("state", (1, 2), 1, "`studio-worker register --reset --lane 1`"),
        ("state", (1, 2), 2, "`studio-worker register --reset --lane 2`"),
        ("instance-1", (1, 2), 2, "`studio-worker register --reset --lane 2 --instance 1`"),
    ],
    ids=["alone", "first of two", "second of two", "of an instance"],
)
def test_cure_of_a_damaged_identity_costs_no_other_lane(
    site: Configured, tmp_path: Path, state: str, lanes: tuple[int, ...], damaged: int, cure: str
) -> None:
    """The command that a damaged identity's message names forgets that lane, of that service, alone."""
    etc = site(len(lanes), state)
    for lane in lanes:
        known(tmp_path / state, lane)
    (tmp_path / state / identity_name(damaged)).write_text("{")
    assert cure in command("register", "--config", etc).stderr


def test_doctor_names_the_lane_and_its_cure(site: Configured, tmp_path: Path) -> None:
    """Of three lanes of which one is rejected, doctor's cure says which, and forgets no other."""
    etc = site(3)
    known(tmp_path / "state")
    known(tmp_path / "state", 2, rejected="no")
    known(tmp_path / "state", 3)
    found = json.loads(command("doctor", "--json", "--config", etc).stdout)["findings"]
    (registration,) = (each for each in found if each["check"] == "registration")
    assert registration["level"] == "failure"
    assert registration["cure"] == (
        "lane 2: talk to whoever runs the studio, then: studio-worker register --reset --lane 2"
    )


def test_doctor_tells_what_helps_a_lane_beside_one_that_is_worse_off(
    site: Configured, tmp_path: Path
) -> None:
    """A lane that waits for its approval has its cure also beside a rejected one, which comes first."""
    etc = site(2)
    known(tmp_path / "state", 1, secret="s" * 20, request_id="r1")
    known(tmp_path / "state", 2, rejected="no")
    found = json.loads(command("doctor", "--json", "--config", etc).stdout)["findings"]
    (registration,) = (each for each in found if each["check"] == "registration")
    assert registration["level"] == "failure"
    assert registration["cure"] == (
        "lane 2: talk to whoever runs the studio, then: studio-worker register --reset --lane 2; "
        "lane 1: approve this worker on the studio's page"
    )


# --- another machine, another service ---


def test_nothing_to_adopt_is_an_exit_status(site: Configured, tmp_path: Path) -> None:
    """A script can tell that nothing was adopted: status 1 and one sentence, registered or not."""
    etc = site()
    assert mistake("register", "--adopt", "--config", etc, status=1) == "nothing here is another machine's\n"
    known(tmp_path / "state")
    assert mistake("register", "--adopt", "--config", etc, status=1) == "nothing here is another machine's\n"


def test_running_instance_is_stopped_by_its_own_name(site: Configured, tmp_path: Path) -> None:
    """While a service of one GPU runs, --reset names the command that stops that one, and no other way."""
    etc, state = site(state="instance-1"), tmp_path / "instance-1"
    known(state)
    with state_lock(state):
        said = mistake("register", "--reset", "--config", etc, status=75)
    assert said.endswith("; stop it first: systemctl stop studio-worker@1\n")
