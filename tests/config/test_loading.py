"""The configuration: what it says, what wins, and every way of being wrong as one line with its cure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker import config
from studio_worker.config.required import ENGINES
from studio_worker.config.settings import ENV_PREFIX, Settings
from studio_worker.engine import default_router
from studio_worker.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "packaging" / "config.toml"
SHA = "ab" * 32
PASSWORD = "hunter2-hunter2"
NOBODY = 65534


@pytest.fixture(autouse=True)
def no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid configuration whose own folders lie below ``tmp_path``."""
    directory = tmp_path / "etc"
    (directory / "conf.d").mkdir(parents=True)
    (directory / "models.d").mkdir()
    (directory / "config.toml").write_text(
        f'[models]\nroot = "{tmp_path}/models"\n\n[state]\ndir = "{tmp_path}/state"\n'
    )
    return directory


def fault(directory: Path) -> ConfigError:
    """The one fault of a configuration, checked for what every fault must be."""
    with pytest.raises(ConfigError) as caught:
        config.load(directory)
    error = caught.value
    assert error.exit_status == 78
    assert error.problem
    assert error.cure
    assert len(str(error).splitlines()) == 1
    return error


def site(directory: Path, text: str, name: str = "50-site.toml") -> Path:
    path = directory / "conf.d" / name
    path.write_text(text)
    return path


def model(**changes: Any) -> dict[str, Any]:
    """A valid entry of models.d; ``changes`` are for its only file."""
    file = {
        "role": "model",
        "url": "https://models.example/a.safetensors",
        "filename": "a.safetensors",
        "approxBytes": 1000,
        "sha256": SHA,
    } | changes
    return {
        "id": "sd15",
        "engine": "sd-cpp",
        "files": [{k: v for k, v in file.items() if v is not None}],
        "cliDefaults": {"steps": 20},
    }


def required(directory: Path, entry: object, name: str = "sd15.json") -> Path:
    path = directory / "models.d" / name
    path.write_text(json.dumps(entry, indent=1))
    return path


def command(directory: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studio_worker", "check-config", "--config", str(directory), *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


# --- the real command ---


def test_check_config_says_that_a_valid_configuration_is_valid(folder: Path) -> None:
    """A valid configuration ends with status 0 and names the models and the studio."""
    required(folder, model())
    done = command(folder)
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout
    assert "1 required model" in done.stdout
    assert "https://studio.minis.gg" in done.stdout


def test_check_config_prints_every_setting_as_json(folder: Path) -> None:
    """With --json the settings in force come out as one JSON document."""
    site(folder, '[worker]\ndevice = "cpu"\n')
    done = command(folder, "--json")
    assert json.loads(done.stdout)["worker"]["device"] == "cpu"


def test_check_config_as_json_tells_no_secret(folder: Path) -> None:
    """Passwords and tokens in any address, a mirror's on either side too, are not printed by --json."""
    site(
        folder,
        f"[studio]\napi_base_url = 'https://studio.example/a?key={PASSWORD}'\n"
        f"[models]\nproxy = 'http://me:{PASSWORD}@proxy.example:3128'\n"
        f"mirrors = {{ 'https://a.example/' = 'https://me:{PASSWORD}@b.example/x', "
        f"'https://c.example/?t={PASSWORD}' = 'https://d.example/' }}\n",
    )
    done = command(folder, "--json")
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stdout
    shown = json.loads(done.stdout)
    assert shown["studio"]["api_base_url"] == "https://studio.example/a"
    assert shown["models"]["mirrors"]["https://a.example/"] == "https://b.example/x"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[models]\non_demand = true\n[worker]\n[models]\nroot = '/x'\n", "[models] stands there already"),
        ("[studio]\napi_base_url = 'studio.example:8765'\n", "begin it with https://"),
        ("[studio]\napi_base_url = 'studio.example'\n", "begin it with https://"),
        ("[models]\nmirrors = 'https://a.example'\n", "must be a table of names and values"),
        ("[worker]\ndevice = 0\n", "must be text, in quotes"),
        ("[metrics]\nlisten = 9464\n", "must be text, in quotes"),
        ("[models]\nmax_connections = 'many'\n", "must be a whole number"),
        ("[models]\nmax_connections = 2.5\n", "must be a whole number"),
        ("[models]\non_demand = 'perhaps'\n", "must be true or false"),
        ("[models]\nroot = 3\n", "must be a path, in quotes"),
        ("[models]\nbudget_gb = -1\n", "must be greater than 0"),
        ("[log]\nlevel = 'loud'\n", "must be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_mistakes_are_told_in_an_operators_words(folder: Path, text: str, said: str) -> None:
    """What is wrong is said of the file as it is written, in no words of the library's."""
    site(folder, text)
    with pytest.raises(ConfigError) as caught:
        config.load(folder)
    assert said in str(caught.value)
    for theirs in ("Input", "dictionary", "valid string", "instance"):
        assert theirs not in str(caught.value)


def test_level_may_be_written_in_capitals(folder: Path) -> None:
    """``level = "INFO"`` means info."""
    site(folder, '[log]\nlevel = "INFO"\nformat = "JSON"\n')
    assert config.load(folder).settings.log.level == "info"


def test_table_in_the_environment_that_is_no_json_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table given by environment is JSON; what is none is a mistake with the variable's name."""
    monkeypatch.setenv("STUDIO_WORKER_MODELS__MIRRORS", "{https://a")
    with pytest.raises(ConfigError, match="STUDIO_WORKER_MODELS__MIRRORS: is not valid JSON"):
        config.load(folder)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[worker]\ndevise = 'cpu'\n", (":2:", "worker.devise", "did you mean device?")),
        ("[worker]\ndevice = cpu\n", (":2:", "not valid TOML", "quotes")),
        (
            f"[studio]\napi_base_url = 'https://op:{PASSWORD}@studio.example'\n",
            (":2:", "studio.api_base_url", "password"),
        ),
    ],
)
def test_check_config_ends_with_78_and_one_line(folder: Path, text: str, parts: tuple[str, ...]) -> None:
    """A mistake ends with status 78 and one line on stderr that names file, line, key and cure."""
    path = site(folder, text)
    done = command(folder)
    assert done.returncode == 78
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    for part in (str(path), *parts):
        assert part in done.stderr
    assert PASSWORD not in done.stderr


def test_check_config_names_the_folder_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    """A state folder that cannot be made is a configuration error naming the folder and its key."""
    (tmp_path / "occupied").write_text("")
    site(folder, f'[state]\ndir = "{tmp_path}/occupied/state"\n')
    done = command(folder)
    assert done.returncode == 78
    assert "state.dir" in done.stderr
    assert f"{tmp_path}/occupied/state" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A configuration that any user can reach (pytest's own folders are closed to others)."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "config.toml").write_text(
            f'[models]\nroot = "{name}/m"\n\n[state]\ndir = "{name}/s"\n', encoding="utf-8"
        )
        for below in ("conf.d", "models.d"):
            (directory / below).mkdir()
        yield directory


@pytest.mark.parametrize("closed", ["", "config.toml", "conf.d", "conf.d/50-site.toml", "models.d"])
def test_check_config_names_what_this_user_may_not_read(open_folder: Path, closed: str) -> None:
    """A file or folder that the service's user may not read is an error, never silently left out."""
    site(open_folder, '[log]\nlevel = "debug"\n')
    (open_folder / closed).chmod(0)
    # Permission bits do not bind root: then the command runs as nobody.
    unprivileged: dict[str, Any] = {}
    if os.geteuid() == 0:
        unprivileged = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        done = command(open_folder, **unprivileged)
    except PermissionError:
        pytest.skip("this Python cannot be started by another user")
    finally:
        (open_folder / closed).chmod(0o755)
    assert done.returncode == 78, done.stderr
    named = open_folder / (closed or "config.toml")
    assert f"{named}: cannot be read: Permission denied" in done.stderr
    assert "access" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_config_by_a_person_names_whose_folder_it_is(open_folder: Path) -> None:
    """Who asks with a user of their own is not told to open the service's folders, but to use sudo."""
    if os.geteuid() != 0:
        pytest.skip("only root can ask as two users")
    state = open_folder / "the-state"
    state.mkdir(mode=0o700)
    os.chown(state, 1, 1)  # daemon, on every Debian
    site(open_folder, f'[state]\ndir = "{state}"\n')
    try:
        done = command(open_folder, user=NOBODY, group=NOBODY, extra_groups=[])
    except PermissionError:
        pytest.skip("this Python cannot be started by another user")
    assert done.returncode == 75, done.stderr
    assert "it belongs to user daemon: run the command with sudo, or give user" in done.stderr


def test_volume_of_another_owner_is_told_in_a_containers_words(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container there is no sudo and nothing passes by waiting: 78, and how a volume is given away."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    state = open_folder / "the-state"
    state.mkdir(mode=0o700)
    site(open_folder, f'[state]\ndir = "{state}"\n')
    monkeypatch.setenv("container", "oci")
    try:
        done = command(open_folder, user=NOBODY, group=NOBODY, extra_groups=[])
    except PermissionError:
        pytest.skip("this Python cannot be started by another user")
    assert done.returncode == 78, done.stderr
    assert f"mount a volume at {state} that user 65534 may write to (" in done.stderr
    assert "fsGroup: 65534" in done.stderr
    assert "sudo" not in done.stderr


def test_read_only_volume_is_told_in_a_containers_words(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container no unit is to be edited: what is read-only there wants a volume."""
    monkeypatch.setenv("container", "oci")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    site(folder, f'[models]\nroot = "{small_disk}/models"\n')
    with pytest.raises(ConfigError, match=rf"read-only; mount a volume at {small_disk}/models ") as caught:
        config.check_folders(config.load(folder).settings)
    assert "systemctl" not in str(caught.value)


def test_folder_that_the_unit_does_not_let_in_names_the_unit(folder: Path, small_disk: Path) -> None:
    """Models on another disk: a unit that sees it read-only is what is named, not the folder's owner."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for root in (small_disk, small_disk / "models"):  # there, and yet to be made
        site(folder, f'[models]\nroot = "{root}"\n')
        with pytest.raises(ConfigError, match=rf"read-only; .*\[Service\], ReadWritePaths={root}\)"):
            config.check_folders(config.load(folder).settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("models.root", "~/models"),
        ("models.root", "models"),
        ("models.token_dir", "tokens"),
        ("models.ca_bundle", "~/ca.pem"),
        ("state.dir", "./state"),
        ("state.runtime_dir", "run"),
        ("metrics.textfile", "worker.prom"),
    ],
)
def test_path_that_depends_on_who_starts_it_is_refused(folder: Path, key: str, value: str) -> None:
    """A service is in no folder and has no home: every path in its configuration is absolute."""
    section, _, name = key.partition(".")
    site(folder, f'[{section}]\n{name} = "{value}"\n')
    with pytest.raises(ConfigError, match="must be an absolute path") as caught:
        config.load(folder)
    assert (caught.value.key, caught.value.line) == (key, 2)


@pytest.mark.parametrize(
    ("entry", "key", "says"),
    [
        ({"engine": "sdcpp"}, "engine", "unknown engine 'sdcpp'; known are onnx, sd-cpp, synthetic"),
        ({"engine": "llama-cpp", "kind": "llm"}, "kind", "'llm' is not served here"),
        ({"engine": "sd-cpp", "files": []}, "files", "no file of role model or diffusion-model"),
        ({"engine": "onnx"}, "files", "no file of role model"),
        (
            {
                "engine": "sd-cpp",
                "files": [
                    {"role": "vae", "url": "https://h/v", "filename": "v.safetensors", "sha256": "0" * 64}
                ],
            },
            "files",
            "no file of role model or diffusion-model",
        ),
    ],
    ids=["engine", "kind", "no files", "no graph", "only a part"],
)
def test_required_model_that_cannot_be_is_refused(
    folder: Path, entry: dict[str, Any], key: str, says: str
) -> None:
    """A required model that this worker could never serve is told before READY promises it."""
    (folder / "models.d" / "m.json").write_text(json.dumps({"id": "m", **entry}))
    with pytest.raises(ConfigError, match=says) as caught:
        config.load(folder)
    assert caught.value.key == key
    assert caught.value.source.endswith("m.json")


def test_required_models_may_be_of_every_engine_that_there_is() -> None:
    """What a job may name, a required model may too."""
    assert default_router("cpu").names() | {"onnx"} == ENGINES


def test_missing_folder_of_the_textfile_is_told_by_check_config(folder: Path, tmp_path: Path) -> None:
    """What would end the start is found by the check before it, with its key."""
    site(folder, f'[metrics]\ntextfile = "{tmp_path}/none/worker.prom"\n')
    done = command(folder)
    assert done.returncode == 78
    assert f"metrics.textfile: {tmp_path}/none is not there; make it and " in done.stderr


# --- what it says and what wins ---


def test_load_reads_conf_d_in_name_order(folder: Path) -> None:
    """A later file of conf.d wins over an earlier one and over config.toml, key by key."""
    site(folder, '[log]\nlevel = "debug"\nformat = "text"\n', "10-first.toml")
    site(folder, '[log]\nlevel = "error"\n', "20-second.toml")
    settings = config.load(folder).settings
    assert (settings.log.level, settings.log.format) == ("error", "text")


def test_load_leaves_other_and_hidden_files_of_conf_d_alone(folder: Path) -> None:
    """Backups and an editor's hidden files in conf.d are not configuration."""
    for name in ("old.toml.dpkg-old", ".#site.toml", "README"):
        site(folder, "not = [valid", name)
    assert config.load(folder).settings.log.level == "info"


def test_load_lets_the_environment_win(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting in the environment wins over every file."""
    site(folder, "[worker]\nstep_timeout_s = 10\n")
    monkeypatch.setenv("STUDIO_WORKER_WORKER__STEP_TIMEOUT_S", "20")
    assert config.load(folder).settings.worker.step_timeout_s == 20.0


def test_load_needs_neither_conf_d_nor_models_d(tmp_path: Path) -> None:
    """An empty config.toml alone is a complete configuration with all defaults."""
    (tmp_path / "config.toml").write_text("")
    loaded = config.load(tmp_path)
    assert loaded.settings == Settings()
    assert loaded.required == ()


def test_load_accepts_a_byte_order_mark(folder: Path) -> None:
    """A file saved with a byte order mark is read as if it had none."""
    (folder / "conf.d" / "bom.toml").write_bytes(b'\xef\xbb\xbf[log]\nlevel = "debug"\n')
    assert config.load(folder).settings.log.level == "debug"


def test_load_reads_required_models_in_both_formats(folder: Path) -> None:
    """A model file may be JSON or TOML, and unknown fields of a registry entry are ignored."""
    required(folder, model() | {"displayName": "SD 1.5", "vramGbEstimate": 4})
    (folder / "models.d" / "other.toml").write_text(
        'id = "other"\nengine = "sd-cpp"\n[[files]]\nrole = "model"\n'
        f'url = "https://models.example/b"\nfilename = "b.gguf"\nsha256 = "{SHA.upper()}"\n'
    )
    first, second = sorted(config.load(folder).required, key=lambda entry: entry.id)
    assert (first.id, first.files[0].sha256) == ("other", SHA)
    assert (second.vram_gb_estimate, second.cli_defaults.steps) == (4.0, 20)


def test_load_allows_plain_http_for_a_studio(folder: Path) -> None:
    """A studio of one's own on the local network may be spoken to over plain http."""
    site(folder, '[studio]\napi_base_url = "http://studio.lan:8765/custom"\n')
    assert config.load(folder).settings.studio.api_base_url == "http://studio.lan:8765/custom"


def test_load_allows_http_models_where_the_operator_says_so(folder: Path) -> None:
    """allow_insecure_urls = true lets a required model come over plain http."""
    required(folder, model(url="http://mirror.lan/a.safetensors"))
    site(folder, "[models]\nallow_insecure_urls = true\n")
    assert config.load(folder).required[0].files[0].url == "http://mirror.lan/a.safetensors"


def test_check_folders_makes_the_state_folder_private(folder: Path, tmp_path: Path) -> None:
    """The state folder, which holds the identity, is made for this user alone."""
    config.check_folders(config.load(folder).settings)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "models").is_dir()


# --- the shipped file ---


def defaults() -> dict[str, dict[str, Any]]:
    dumped = Settings().model_dump(mode="json")
    assert all(isinstance(section, dict) for section in dumped.values())
    return dumped


def test_shipped_config_is_valid_and_equals_the_defaults(tmp_path: Path) -> None:
    """The shipped config.toml changes nothing: with it and without it the settings are the same."""
    (tmp_path / "config.toml").write_text(SHIPPED.read_text())
    assert config.load(tmp_path).settings == Settings()


def test_shipped_config_shows_each_value_as_its_default() -> None:
    """Every value written in the shipped config.toml is the one that holds without it."""
    for section, values in tomllib.loads(SHIPPED.read_text()).items():
        assert values == {key: defaults()[section][key] for key in values}


def test_shipped_config_explains_every_key() -> None:
    """Every key there is stands in its section of the shipped config.toml, with a comment above it."""
    shown: dict[str, set[str]] = {}
    section, before = "", ""
    for line in SHIPPED.read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif key := re.match(r"#?(\w+) = ", line):
            assert before.startswith("# "), f"{section}.{key[1]} has no explanation"
            shown.setdefault(section, set()).add(key[1])
        before = line
    assert shown == {section: set(values) for section, values in defaults().items()}


# --- unknown names ---


@pytest.mark.parametrize(
    ("text", "line", "key", "cure"),
    [
        ("[worker]\n\ndevise = 'cpu'\n", 3, "worker.devise", "did you mean device?"),
        ("[worker]\nlevel = 'info'\n", 2, "worker.level", "it belongs under [log]"),
        ("# first\n[wroker]\ndevice = 'cpu'\n", 2, "wroker", "did you mean [worker]?"),
        ("device = 'cpu'\n", 1, "device", "it belongs under [worker]"),
        ("log.levl = 'info'\n", 1, "log.levl", "did you mean level?"),
        ("log = { levl = 'info' }\n", 1, "log.levl", "did you mean level?"),
        ("[log.sub]\nlevel = 'info'\n", 1, "log.sub", "known here: format, level"),
        ("zzz.qqq = 1\n", 1, "zzz", "known here: [studio]"),
        ("\n[[log]]\nlevel = 'info'\n", 2, "log", "write [log]"),
        ("log = 3\n", 1, "log", "write [log]"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    folder: Path, text: str, line: int, key: str, cure: str
) -> None:
    """An unknown key or section names file, line and key, and what was probably meant."""
    path = site(folder, text)
    error = fault(folder)
    assert (error.source, error.line, error.key) == (str(path), line, key)
    assert cure in error.cure


def test_unknown_key_with_a_line_end_stays_one_line(folder: Path) -> None:
    """Even a key that holds a line end is reported in one line."""
    site(folder, '[log]\n"le\\nvel" = "info"\n')
    assert "le vel" in str(fault(folder))


@pytest.mark.parametrize("name", ["STUDIO_WORKER_LOG__LEVLE", "studio_worker_log__levle"])
def test_unknown_environment_name_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mistyped environment variable is an error that names it and the nearest known one."""
    monkeypatch.setenv(name, "debug")
    error = fault(folder)
    assert name in error.source
    assert "STUDIO_WORKER_LOG__LEVEL?" in error.cure


def test_environment_name_of_a_whole_section_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section cannot be given as one environment variable, so that keys are never hidden in JSON."""
    monkeypatch.setenv("STUDIO_WORKER_LOG", '{"level": "debug"}')
    assert "STUDIO_WORKER_LOG" in fault(folder).source


# --- wrong values ---


@pytest.mark.parametrize(
    ("section", "assignment"),
    [
        ("studio", "reconnect_attempts = 'often'"),
        ("studio", "reconnect_attempts = -1"),
        ("studio", "api_base_url = 7"),
        ("studio", "api_base_url = 'studio.minis.gg'"),
        ("studio", "api_base_url = 'ftp://studio.minis.gg'"),
        ("studio", "api_base_url = 'https://'"),
        ("studio", "api_base_url = 'https://studio.minis.gg:port'"),
        ("worker", "device = 'gpu'"),
        ("worker", "device = 'cuda:'"),
        ("worker", "device = 'cuda:one'"),
        ("worker", "device = ''"),
        ("worker", "vram_threshold_gb = 0"),
        ("worker", "step_timeout_s = nan"),
        ("worker", "step_timeout_s = inf"),
        ("worker", "stop_timeout_s = 1e300"),
        ("worker", "stop_timeout_s = []"),
        ("worker", "stop_timeout_s = true"),
        ("worker", "vram_threshold_gb = true"),
        ("worker", "lanes = true"),
        ("models", "on_demand = 'perhaps'"),
        ("models", "root = 1"),
        ("log", "level = 'verbose'"),
        ("log", "format = 'xml'"),
    ],
)
def test_wrong_values_name_their_line_and_default(folder: Path, section: str, assignment: str) -> None:
    """A value that cannot be used names its file, line and key, and the default as a cure."""
    path = site(folder, f"# a comment\n[{section}]\n{assignment}\n")
    error = fault(folder)
    assert (error.source, error.line) == (str(path), 3)
    assert error.key == f"{section}.{assignment.split()[0]}"
    assert "default" in error.cure


def test_wrong_value_names_the_file_that_set_it_last(folder: Path) -> None:
    """Where two files set a key, the fault is the later file's."""
    site(folder, '[log]\nlevel = "loud"\n', "10.toml")
    last = site(folder, '[log]\nlevel = "louder"\n', "20.toml")
    error = fault(folder)
    assert error.source == str(last)
    assert "louder" in error.problem


def test_wrong_value_in_the_environment_names_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong value that comes from the environment names the variable, not a file."""
    monkeypatch.setenv("STUDIO_WORKER_WORKER__DEVICE", "gpu")
    error = fault(folder)
    assert error.source == "environment variable STUDIO_WORKER_WORKER__DEVICE"
    assert error.line is None


@pytest.mark.parametrize(
    "address",
    [
        f"https://op:{PASSWORD}@studio.example",
        f"ftp://op:{PASSWORD}@studio.example",
        f"op:{PASSWORD}@studio.example",
        f"https://op:{PASSWORD}@studio.example:port/",
        f"ftp://studio.example/?token={PASSWORD}",
    ],
)
def test_studio_address_never_shows_its_secret(folder: Path, address: str) -> None:
    """A refused studio address is reported without the password or token in it."""
    site(folder, f"[studio]\napi_base_url = '{address}'\n")
    error = fault(folder)
    assert error.key == "studio.api_base_url"
    assert PASSWORD not in str(error)


# --- files that cannot be used ---


def test_missing_folder_names_the_file_it_looked_for(tmp_path: Path) -> None:
    """Without a config.toml the operator learns which file was looked for and how to name another folder."""
    error = fault(tmp_path / "nowhere")
    assert error.source == str(tmp_path / "nowhere" / "config.toml")
    assert "--config" in error.cure


def test_config_that_is_a_file_is_refused(folder: Path) -> None:
    """--config given the file instead of its folder is an error that asks for the folder."""
    assert "folder" in fault(folder / "config.toml").cure


@pytest.mark.parametrize("name", ["conf.d", "models.d"])
def test_file_in_place_of_a_folder_is_refused(folder: Path, name: str) -> None:
    """A file where conf.d or models.d should be is an error: what it was to hold would be lost silently."""
    (folder / name).rmdir()
    (folder / name).write_text("")
    error = fault(folder)
    assert error.source == str(folder / name)
    assert "folder" in error.cure


@pytest.mark.parametrize("name", ["config.toml", "conf.d/site.toml", "models.d/sd15.json"])
def test_folder_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    """A folder where a file should be is an error that names it."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    error = fault(folder)
    assert error.source == str(folder / name)
    assert "file" in error.cure


def test_broken_link_in_conf_d_is_refused(folder: Path) -> None:
    """A link in conf.d that leads nowhere is an error, not a file that is not there."""
    (folder / "conf.d" / "site.toml").symlink_to(folder / "gone.toml")
    assert fault(folder).problem == "no such file"


@pytest.mark.parametrize("name", ["config.toml", "conf.d/site.toml", "models.d/a.json", "models.d/a.toml"])
def test_text_that_is_not_utf8_is_refused(folder: Path, name: str) -> None:
    """A file in another encoding than UTF-8 is named, with UTF-8 as its cure."""
    (folder / name).write_bytes(b'x = "caf\xe9"\n')
    error = fault(folder)
    assert error.source == str(folder / name)
    assert "UTF-8" in error.cure


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[log]\nlevel = debug\n", 2),
        ("[log]\nlevel = 'info'\nlevel = 'debug'\n", 3),
        ("[log]\n\n[log]\n", 3),
        ('[log]\nlevel = """', 2),
        ("x = " + "9" * 5000 + "\n", None),
    ],
)
def test_invalid_toml_names_its_line(folder: Path, text: str, line: int | None) -> None:
    """A syntax error in TOML names the file and, where the reader tells it, the line."""
    path = site(folder, text)
    error = fault(folder)
    assert (error.source, error.line) == (str(path), line)


# --- required models ---


def test_model_in_invalid_json_names_its_line(folder: Path) -> None:
    """A syntax error in a model's JSON names file and line."""
    path = folder / "models.d" / "sd15.json"
    path.write_text('{\n "id": "sd15",\n "engine": diffusion\n}\n')
    error = fault(folder)
    assert (error.source, error.line) == (str(path), 3)
    assert "JSON" in error.problem


@pytest.mark.parametrize("entry", [[model()], "sd15", None, 3])
def test_model_that_is_no_object_is_refused(folder: Path, entry: object) -> None:
    """A model file that holds anything but one object is refused with the shape it should have."""
    required(folder, entry)
    assert "one model a file" in fault(folder).cure


@pytest.mark.parametrize(
    ("changes", "key", "on_line"),
    [
        ({"sha256": None}, "files.0.sha256", "filename"),
        ({"sha256": "abc"}, "files.0.sha256", "sha256"),
        ({"url": "http://mirror.lan/a.safetensors"}, "files.0.url", '"url"'),
        ({"url": "file:///etc/passwd"}, "files.0.url", '"url"'),
        ({"url": None}, "files.0.url", "filename"),
        ({"filename": "../a.safetensors"}, "files.0.filename", "filename"),
        ({"filename": "/etc/passwd"}, "files.0.filename", "filename"),
        ({"filename": None}, "files.0.filename", '"url"'),
        ({"role": "unet"}, "files.0.role", '"role"'),
        ({"approxBytes": "many"}, "files.0.approxBytes", "approxBytes"),
    ],
)
def test_model_file_that_cannot_be_used_is_refused(
    folder: Path, changes: dict[str, Any], key: str, on_line: str
) -> None:
    """A model's file without hash, with an unsafe name or address, or of no known role is named by line."""
    path = required(folder, model(**changes))
    error = fault(folder)
    assert (error.source, error.key) == (str(path), key)
    assert error.line is not None
    assert on_line in path.read_text().splitlines()[error.line - 1]


def test_model_fault_names_the_line_of_the_faulty_file(folder: Path) -> None:
    """Where a model has several files, the line is that of the file at fault, not of the first."""
    entry = model()
    entry["files"].append(model(filename="b.safetensors", url="http://mirror.lan/b")["files"][0])
    path = required(folder, entry)
    error = fault(folder)
    assert error.key == "files.1.url"
    assert error.line is not None
    assert "mirror.lan/b" in path.read_text().splitlines()[error.line - 1]


def test_model_address_never_shows_its_secret(folder: Path) -> None:
    """A refused model address is reported without user info or token."""
    required(folder, model(url=f"http://op:{PASSWORD}@mirror.lan/a?token={PASSWORD}"))
    assert PASSWORD not in str(fault(folder))


@pytest.mark.parametrize("missing", ["id", "engine"])
def test_model_without_id_or_engine_is_refused(folder: Path, missing: str) -> None:
    """A model must say its id and its engine."""
    entry = model()
    del entry[missing]
    required(folder, entry)
    assert fault(folder).key == missing


def test_duplicate_model_ids_name_both_files(folder: Path) -> None:
    """Two files with the same model id are refused, and the message names both."""
    first = required(folder, model(), "a.json")
    second = required(folder, model(), "b.json")
    error = fault(folder)
    assert error.source == str(second)
    assert error.line == 2
    assert str(first) in error.problem
