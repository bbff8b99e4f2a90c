"""Whether vulnerabilities are known of what goes into the packages: pip-audit asks, this reads its answer.

Its own words are not enough: it says "No known vulnerabilities found", and ends with 0, also where the
database knows none of the names, as behind an index that has no vulnerabilities to tell.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

LIMIT_S = 600.0


class Unreached(Exception):
    """Some were not looked up; the text says why."""


def known(pinned: Mapping[str, str], accepted: Path, pip_audit: Path) -> list[str]:
    """One line for each vulnerability of ``pinned`` that is known and not accepted.

    Args:
        accepted: a file with one identifier a line, then the reason why a release may have it.

    Raises:
        Unreached: the database did not answer for all of them, and of the others nothing is known.
    """
    lines = [line.split() for line in accepted.read_text().splitlines() if not line.startswith("#")]
    ignored = [word for words in lines if words for word in ("--ignore-vuln", words[0])]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.writelines(f"{name}=={version}\n" for name, version in sorted(pinned.items()))
        wanted.flush()
        command = [str(pip_audit), "--format=json", "--progress-spinner=off", "--no-deps", "--disable-pip"]
        command += [*ignored, "--requirement", wanted.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise Unreached(f"no answer within {LIMIT_S:g} s") from error
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        said = done.stderr.strip().splitlines() or ["pip-audit says nothing"]
        raise Unreached(said[-1]) from error
    found = [
        f"{answer['name']} {answer['version']}: {each['id']}, mended in {each['fix_versions'] or 'none'}"
        for answer in answers
        for each in answer.get("vulns", ())
    ]
    looked_up = {answer["name"] for answer in answers if "skip_reason" not in answer}
    if not found and (missing := pinned.keys() - looked_up):
        reasons = sorted(answer["skip_reason"] for answer in answers if "skip_reason" in answer)
        raise Unreached(f"{len(missing)} of {len(pinned)} libraries; the first: {(reasons or ['?'])[0]}")
    return found
