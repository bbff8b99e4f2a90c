"""A process that plays what rows can do to theirs: it speaks the protocol of ``gpu_check.child``."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time


def answer(**found: object) -> None:
    say(found={"state": "ok", "error": "", "trace": "", "is_usable": True, **found})


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def hang_in_the_driver() -> None:
    time.sleep(600)


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    say(ready=True)
    for line in sys.stdin:
        row = json.loads(line)
        say(figure=["process", os.getpid()])
        match row["work"]:
            case "hang":
                hang_in_the_driver()
            case "crash":
                print("the driver said something", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "leave":
                sys.exit(3)
            case "fail":
                answer(state="failed", error="Missed: too slow")
            case "lose the device":
                answer(state="failed", error="DeviceError: lost", is_usable=False)
            case "skip":
                answer(state="skipped", error="no room")
            case _:
                answer()


if __name__ == "__main__":
    main()
