"""The man pages: studio-worker(1) from the program's help, studio-worker-config(5) from the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configuration import explained, sections, written
from tree import NAME, commands, root, takes_value, value_name

from studio_worker import __version__, errors

PACKAGING = Path(__file__).parents[1]

EXIT_STATUSES = (
    (0, "stopped as asked"),
    (1, "not so (status --ready, --alive), nothing to adopt (register), or as the command says"),
    (errors.ServiceNotRunning.exit_status, "the service is not running (status, pause, resume)"),
    (errors.ControlDenied.exit_status, "this user may not ask the service; use sudo"),
    (errors.DeviceError.exit_status, "device unusable"),
    (
        errors.DownloadError.exit_status,
        "models could not be provisioned, or a file not read or written",
    ),
    (
        errors.ReconnectExhausted.exit_status,
        "for now: reconnect attempts used up, the state folder in use or its disk full, no answer (submit), "
        "pictures wait for delivery (register --reset)",
    ),
    (errors.DuplicateWorker.exit_status, "another worker with this identity"),
    (
        errors.RefusedByStudio.exit_status,
        "refused by the studio: token, deletion, rejected registration",
    ),
    (errors.ConfigError.exit_status, "configuration"),
)

FILES = (
    ("/etc/studio-worker/config.toml", "every key with its default; leave it as it is"),
    ("/etc/studio-worker/conf.d/*.toml", "your own values, read in name order"),
    (
        "/etc/studio-worker/models.d/*.json, *.toml",
        "models that must be verified before the service is ready",
    ),
    ("/var/lib/studio-worker", "identity, the job in hand, finished pictures that wait for delivery"),
    ("/var/lib/studio-worker/models", "model files"),
    ("/run/studio-worker/control.sock", "where the running service is asked"),
)


def escaped(text: str) -> str:
    """``text`` for troff: hyphens that can be copied, and no line that begins with a control character."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def synopsis(command: Any) -> str:
    words = []
    for param in command.params:
        name = param.metavar or (param.name or "").upper()
        if param.param_type_name == "argument":
            words.append(name if param.required else name if name.startswith("[") else f"[{name}]")
    return " ".join(["[OPTION]...", *words])


def option_lines(command: Any) -> Iterator[str]:
    for param in command.params:
        text = getattr(param, "help", None) or ""
        if param.param_type_name == "argument":
            head = f"\\fI{escaped(param.metavar or (param.name or '').upper())}\\fR"
        else:
            names = [*param.opts, *param.secondary_opts]
            head = ", ".join(f"\\fB{escaped(name)}\\fR" for name in names)
            if takes_value(param):
                head += f" \\fI{escaped(value_name(param))}\\fR"
        default = param.default
        shown = "" if default is None or isinstance(default, bool) or callable(default) else str(default)
        if shown and param.param_type_name != "argument":
            text += f" Default: {shown}."
        yield f".TP\n{head}\n{escaped(text)}"


def program_page() -> str:
    program = root()
    lines = [
        f'.TH STUDIO\\-WORKER 1 "" "{NAME} {__version__}" "User Commands"',
        ".SH NAME",
        f"studio\\-worker \\- {escaped('makes pictures for a studio on this machine and delivers them')}",
        ".SH SYNOPSIS",
        ".B studio\\-worker",
        "\\fICOMMAND\\fR [\\fIOPTION\\fR]...",
        ".SH DESCRIPTION",
        escaped(program.help or ""),
        "The service is configured in /etc/studio\\-worker, see",
        ".BR studio\\-worker\\-config (5),",
        "started by",
        ".BR systemctl (1)",
        "and read with",
        ".BR journalctl (1).",
        "READY is told to systemd only when every required model is downloaded and verified.",
        ".SH COMMANDS",
    ]
    for path, command in commands(program):
        lines += [
            f".SS {NAME} {path} {synopsis(command)}".replace("-", "\\-"),
            escaped(" ".join((command.help or "").split())),
            *option_lines(command),
        ]
    lines += [".SH EXIT STATUS"]
    lines += [f".TP\n.B {status}\n{escaped(text)}" for status, text in EXIT_STATUSES]
    lines += [".PP", "The unit does not restart the service after 76, 77 and 78."]
    lines += [".SH SIGNALS"]
    lines += [
        ".TP\n.B SIGTERM\nFinish the job in hand, then end. A second one, or stop_timeout_s, hands it back.",
        ".TP\n.B SIGHUP\nRead the configuration again (systemctl reload); a fault in it changes nothing.",
    ]
    lines += [".SH FILES"]
    lines += [f".TP\n.I {escaped(path)}\n{escaped(text)}" for path, text in FILES]
    lines += [".SH EXAMPLES"]
    for text, command_line in recipes():
        lines += [
            escaped(text),
            ".PP",
            ".in +4n",
            ".nf",
            escaped(command_line).replace("'", "\\(aq"),
            ".fi",
            ".in",
            ".PP",
        ]
    lines += [".SH SEE ALSO", ".BR studio\\-worker\\-config (5),", ".BR journalctl (1),", ".BR systemctl (1)"]
    return "\n".join(lines) + "\n"


def recipes() -> Iterator[tuple[str, str]]:
    """What each recipe is for, and its command, from the example file."""
    text = ""
    for line in (PACKAGING / "examples" / "journal-recipes.txt").read_text().splitlines():
        if line.startswith("# "):
            text = line[2:]
        elif line:
            yield text, line


def config_page() -> str:
    lines = [
        f'.TH STUDIO\\-WORKER\\-CONFIG 5 "" "{NAME} {__version__}" "File Formats"',
        ".SH NAME",
        "studio\\-worker\\-config \\- configuration of studio\\-worker",
        ".SH SYNOPSIS",
        ".nf",
        *(escaped(path) for path, _ in FILES[:3]),
        ".fi",
        ".SH DESCRIPTION",
        "Files in TOML. A key of a later file wins, and the environment over every file:",
        f"{escaped('STUDIO_WORKER_<SECTION>__<KEY>, e.g. STUDIO_WORKER_LOG__LEVEL=debug')}.",
        "Unknown keys are errors.",
        ".B studio\\-worker check\\-config",
        "tells what is wrong, with file, line, key and cure.",
        ".PP",
        ".B systemctl reload studio\\-worker",
        "applies what has changed while the service runs, the set of required models too, except for the",
        "keys marked [restart].",
        ".PP",
        "A file of models.d holds one model as a studio's registry has it: id, engine, files (each with",
        "role, url, filename and sha256), cliDefaults. Tokens for downloads are systemd credentials or files",
        "called",
        f"{escaped('download-token.<host>')}, see token_dir.",
    ]
    for section, settings in sections():
        lines.append(f".SH [{section}]")
        for each in settings:
            default = (
                f"= {written(each.default)}"
                if each.example is None
                else f"(for example {written(each.example)})"
            )
            lines += [f".TP\n\\fB{each.name}\\fR {escaped(default)}", *map(escaped, explained(each))]
    lines += [".SH SEE ALSO", ".BR studio\\-worker (1)"]
    return "\n".join(lines) + "\n"
