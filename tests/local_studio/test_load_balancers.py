"""The shipped examples of load balancers in front of a studio, each where its program is installed."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import requests

from studio_worker.local_studio import Door, LocalStudio
from tests.fakes.certificates import certificate
from tests.fakes.machine import PICTURE, Machine, queue
from tests.fakes.servers import free_port
from tests.lab.balancers import RECIPES, WAIT_S, Recipe, running

TOKEN = "a token of sufficient length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_worker_is_served_through_a_load_balancer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """Session, offer with the balancer's addresses, a large upload and the login go through, while
    the second studio of the example is away.
    """
    shown = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    port, away = free_port(), free_port()
    door = Door(token=TOKEN, proxies=("127.0.0.1",))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door, auto_approve=True) as studio:
        command = recipe(tmp_path, shown, port, [f"127.0.0.1:{studio.port}", f"127.0.0.1:{away}"])
        with running(command, port, tmp_path / "log"):
            front = f"https://127.0.0.1:{port}"
            monkeypatch.setattr(LocalStudio, "base_url", front)
            for _ in range(3):  # also when it is the other one's turn
                state = requests.get(f"{front}/api/state", headers=BEARER, timeout=WAIT_S)
                assert state.json()["baseUrl"] == front
            login = requests.post(
                f"{front}/login",
                data={"token": TOKEN},
                headers={"Origin": front},
                timeout=WAIT_S,
                allow_redirects=False,
            )
            assert "Secure" in login.headers["Set-Cookie"]
            machine = Machine(studio, approve=False)
            machine.fetch_token()
            machine.connect(tls=ssl.create_default_context(cafile=shown.authority))
            job_id = queue(studio, task={"initImageUrl": "/files/x"})
            assert machine.take()["task"]["initImageUrl"] == f"{front}/files/x"
            content = PICTURE + bytes(5_000_000)
            assert machine.upload(job_id, content).status_code == 200
            assert studio.result(job_id) == content
            machine.hang_up()
