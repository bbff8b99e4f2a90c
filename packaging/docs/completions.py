"""Completions for bash, zsh and fish."""

from __future__ import annotations

import re
from typing import Any

from tree import NAME, commands, options, root, takes_value, value_name


class Completions:
    """The same tree of commands and options for three shells; static, so that TAB starts no Python."""

    def __init__(self) -> None:
        program = root()
        self.groups = {"": program.commands} | {
            name: command.commands
            for name, command in program.commands.items()
            if hasattr(command, "commands")
        }
        self.commands = dict(commands(program))
        self.taking = {
            option: value_name(param)
            for command in self.commands.values()
            for param in options(command)
            if takes_value(param)
            for option in param.opts
        }

    def bash(self) -> str:
        """See "Programmable Completion" in bash(1)."""
        paths = "|".join(f'" {name}"' for name in [*self.groups[""], *self.commands] if name)
        lines = [
            f"# bash completion of {NAME}; written by make docs",
            "_studio_worker() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local path="" word choices=""',
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            f'        case "$path $word" in {paths}) path="$path $word" ;; esac',
            "    done",
            '    case "$previous" in',
            f'        {self.options_for("DIR")}) COMPREPLY=($(compgen -d -- "$current")); return ;;',
            f"        {self.options_for(None)}) return ;;",
            "    esac",
            '    case "$path" in',
        ]
        for group, names in self.groups.items():
            if group not in self.commands:
                lines.append(
                    f'        "{" " + group if group else ""}") choices="{" ".join(names)} --help" ;;'
                )
        for path, command in self.commands.items():
            names = [*self.groups.get(path, ())]
            names += [name for param in options(command) for name in (*param.opts, *param.secondary_opts)]
            lines.append(f'        " {path}") choices="{" ".join([*names, "--help"])}" ;;')
        lines += [
            "    esac",
            '    COMPREPLY=($(compgen -W "$choices" -- "$current"))',
            "}",
            f"complete -o default -F _studio_worker {NAME}",
        ]
        return "\n".join(lines) + "\n"

    def options_for(self, name: str | None) -> str:
        """The options with a folder, or those with any other value, as a pattern of bash."""
        return "|".join(
            option for option, value in self.taking.items() if (value == "DIR") == (name == "DIR")
        )

    def zsh(self) -> str:
        """See zshcompsys(1)."""
        lines = [f"#compdef {NAME}", "# written by make docs", "_studio_worker() {", "    local line state"]
        lines += ["    _arguments -C '(-h --help)'{-h,--help}'[Show help]' '1: :->command' '*:: :->rest'"]
        lines += ["    case $state in", "        command)", "            local -a commands=("]
        lines += self._zsh_choices(self.groups[""], "                ")
        lines += ["            )", "            _describe command commands ;;", "        rest)"]
        lines += ["            case $line[1] in"]
        for name, command in self.groups[""].items():
            if name not in self.groups:
                lines.append(f"                {name}) _arguments {self._zsh_options(command)} ;;")
                continue
            lines += [
                f"                {name})",
                f"                    _arguments -C {self._own_options(name)}'1: :->sub' '*:: :->subrest'",
            ]
            lines += ["                    case $state in", "                        sub)"]
            lines += ["                            local -a subs=("]
            lines += self._zsh_choices(self.groups[name], "                                ")
            lines += [
                "                            )",
                "                            _describe command subs ;;",
            ]
            lines += ["                        subrest)", "                            case $line[1] in"]
            lines += [
                f"                                {sub}) _arguments {self._zsh_options(each)} ;;"
                for sub, each in self.groups[name].items()
            ]
            lines += ["                            esac ;;", "                    esac ;;"]
        lines += ["            esac ;;", "    esac", "}", '_studio_worker "$@"']
        return "\n".join(lines) + "\n"

    def _zsh_choices(self, names: dict[str, Any], indent: str) -> list[str]:
        return [f"{indent}{quoted(f'{name}:{short(command)}')}" for name, command in names.items()]

    def _zsh_options(self, command: Any) -> str:
        specs = []
        for param in options(command):
            for name in (*param.opts, *param.secondary_opts):
                text = (param.help or "").replace("[", "(").replace("]", ")").replace(":", ",")
                value = ""
                if takes_value(param):
                    action = {"DIR": "_files -/", "FILE": "_files"}.get(value_name(param), " ")
                    message = re.sub(r"\W+", " ", value_name(param).lower()).strip()
                    value = f":{message}:{action}"
                specs.append(quoted(f"{name}[{text}]{value}"))
        return " ".join([*specs, "'*:file:_files'"])

    def _own_options(self, group: str) -> str:
        """Those of a group that does something itself."""
        if group not in self.commands:
            return ""
        return self._zsh_options(self.commands[group]).removesuffix("'*:file:_files'")

    def fish(self) -> str:
        """See complete(1) of fish."""
        begin = f"complete -c {NAME}"
        lines = [
            f"# fish completion of {NAME}; written by make docs",
            f"{begin} -f -s h -l help -d 'Show help'",
        ]
        for group, names in self.groups.items():
            seen = f"__fish_seen_subcommand_from {group}; and " if group else ""
            where = quoted(f"{seen}not __fish_seen_subcommand_from {' '.join(names)}")
            for name, command in names.items():
                lines.append(f"{begin} -n {where} -f -a {name} -d {quoted(short(command))}")
        for path, command in self.commands.items():
            where = quoted("; and ".join(f"__fish_seen_subcommand_from {word}" for word in path.split()))
            for param in options(command):
                takes = " -r" if takes_value(param) else ""
                if takes and value_name(param) == "DIR":
                    takes += " -a '(__fish_complete_directories)'"
                for name in (*param.opts, *param.secondary_opts):
                    spelled = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                    lines.append(f"{begin} -n {where} {spelled}{takes} -d {quoted(param.help or '')}")
        return "\n".join(lines) + "\n"


def short(command: Any) -> str:
    """The first clause of a command's help."""
    return re.split(r"[.;:]", " ".join((command.help or "").split()))[0]


def quoted(text: str) -> str:
    """``text`` for all three shells, in single quotes."""
    return "'" + text.replace("'", "\u2019") + "'"
