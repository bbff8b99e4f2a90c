"""The ways a download may take: mirrors, tokens, proxies, and how fast."""

from __future__ import annotations

import logging
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest

from studio_worker.config.downloads import policy_from
from studio_worker.config.sections import ModelsSection
from studio_worker.config.settings import Settings
from studio_worker.download import download_file
from studio_worker.errors import ConfigError, DownloadError, DownloadRefused
from studio_worker.report.logs import facts
from studio_worker.transfer.policy import Limit, Policy
from tests.fakes.servers import FileServer, raw_server, refused_url

BODY = b"a tiny pretend model" * 1000
TOKEN = "hunter2hunter2"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def quick(**options: object) -> Policy:
    return Policy(delays_s=(0.0,), **options)  # type: ignore[arg-type]


# --- mirrors ---


def test_mirror_is_asked_first(server: FileServer, tmp_path: Path) -> None:
    """What begins with a mirrored prefix is fetched from the mirror."""
    file = server.serve("/origin/m.bin", BODY)
    mirror = server.serve("/mirror/m.bin", BODY)
    base = f"http://127.0.0.1:{server.port}"

    policy = quick(mirrors=((f"{base}/origin/", f"{base}/mirror/"),))
    assert download_file(file.url, tmp_path / "m.bin", sha256=file.sha256, policy=policy).read_bytes() == BODY

    assert (len(mirror.requests), len(file.requests)) == (1, 0)


@pytest.mark.parametrize("is_hash_known", [True, False])
@pytest.mark.parametrize("fault", ["missing", "wrong", "refused", "short"])
def test_origin_is_asked_where_the_mirror_fails(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, is_hash_known: bool
) -> None:
    """A mirror that lacks or spoils the file, or is down, costs a line in the log and nothing else."""
    caplog.set_level(logging.INFO, logger="studio_worker")
    file = server.serve("/origin/m.bin", BODY)
    base = f"http://127.0.0.1:{server.port}"
    there = f"{base}/mirror/"
    size = len(BODY)
    if fault == "wrong":
        server.serve("/mirror/m.bin", BODY[:-1])
    elif fault == "refused":
        there = refused_url("/")
    elif fault == "short":
        server.serve("/mirror/m.bin", BODY, drop_after=1000, ranges=False)

    policy = quick(mirrors=((f"{base}/origin/", there),))
    sha256 = file.sha256 if is_hash_known else None
    download_file(file.url, tmp_path / "m.bin", sha256=sha256, size=size, policy=policy)

    assert (tmp_path / "m.bin").read_bytes() == BODY
    messages = [record.getMessage() for record in caplog.records]
    said = [each for each in messages if each != "download has to wait"]  # before the mirror's other try
    assert said == ["download starting", "mirror failed", "download done"]
    assert facts(caplog.records[-1])["url"] == file.url


def test_error_is_that_of_the_address_itself(server: FileServer, tmp_path: Path) -> None:
    """Where mirror and origin both fail, the error tells of the origin, in one warning."""
    base = f"http://127.0.0.1:{server.port}"

    policy = quick(mirrors=((f"{base}/origin/", f"{base}/mirror/"),))

    with pytest.raises(DownloadError, match=r"/origin/m\.bin -> 404"):
        download_file(f"{base}/origin/m.bin", tmp_path / "m.bin", policy=policy)


# --- tokens ---


def test_token_goes_to_its_host_alone(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A host's bearer token is sent to it, not to the host it redirects to, and stands in no log line."""
    caplog.set_level(logging.DEBUG)
    file = server.serve("/m.bin", BODY)
    entry = server.serve("/entry", b"", redirect=f"http://localhost:{server.port}/m.bin")

    policy = quick(tokens={"127.0.0.1": TOKEN})
    download_file(entry.url, tmp_path / "m.bin", policy=policy)

    assert entry.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in file.requests[0].headers
    assert TOKEN not in caplog.text + repr(policy)


def test_token_wins_over_a_netrc(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configured token is not replaced by what a .netrc says of the host."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    file = server.serve("/m.bin", BODY)

    download_file(file.url, tmp_path / "m.bin", policy=quick(tokens={"127.0.0.1": TOKEN}))

    assert file.requests[0].headers["authorization"] == f"Bearer {TOKEN}"


# --- proxies, certificates ---


def test_proxy_is_not_asked_for_this_machine(server: FileServer, tmp_path: Path) -> None:
    """Loopback addresses are reached directly, whatever the proxy."""
    file = server.serve("/m.bin", BODY)

    assert download_file(file.url, tmp_path / "m.bin", policy=quick(proxy=refused_url(""))).is_file()


def test_proxy_is_asked_for_other_machines(server: FileServer, tmp_path: Path) -> None:
    """Other hosts are reached through the proxy of the configuration."""
    proxied = server.serve("http://models.example/m.bin", BODY)

    policy = quick(proxy=f"http://127.0.0.1:{server.port}", allow_insecure=True)
    assert download_file("http://models.example/m.bin", tmp_path / "m.bin", policy=policy).is_file()

    assert proxied.requests[0].headers["host"] == "models.example"


def test_proxy_that_wants_a_password_is_named(tmp_path: Path) -> None:
    """A proxy's 407 is told at once and as what it is, for a tunnel and for plain http."""
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with raw_server(answer) as proxy:
        for scheme in ("https", "http"):
            policy = quick(proxy=proxy.replace("//", "//me:secret@"), allow_insecure=True)
            with pytest.raises(DownloadRefused, match=r"407 .*NAME:PASSWORD@HOST") as failure:
                download_file(f"{scheme}://models.example/m.bin", tmp_path / "m", policy=policy)
            assert "secret" not in str(failure.value)


def test_proxy_that_reaches_nobody_is_told_with_its_answer(tmp_path: Path) -> None:
    """Another answer of the proxy is told with its number, and may pass."""
    with raw_server(b"HTTP/1.1 504 Gateway Timeout\r\n\r\n") as proxy:
        with pytest.raises(DownloadError, match="the proxy answered 504") as failure:
            download_file("https://models.example/m.bin", tmp_path / "m", policy=quick(proxy=proxy))
        assert not failure.value.is_final_here


def test_proxy_of_another_kind_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SOCKS is not spoken here, and that is said at once."""
    for variable in ("all_proxy", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5h://me:secret@127.0.0.1:9")

    with pytest.raises(DownloadRefused, match=r"kind socks5h .*https_proxy") as failure:
        download_file("https://models.example/m.bin", tmp_path / "m", policy=quick())

    assert "secret" not in str(failure.value)


def test_missing_ca_bundle_is_an_error_of_the_download(tmp_path: Path) -> None:
    """A certificate file that is not there is told as the reason, not as a crash."""
    url = refused_url().replace("http://", "https://")

    with pytest.raises(DownloadError) as failure:
        download_file(url, tmp_path / "m.bin", policy=quick(ca_bundle=tmp_path / "none.pem"))

    assert failure.value.reason == "request error"


def use_own_certificate(server: FileServer, folder: Path) -> Path:
    """Let ``server`` speak TLS with a certificate that nobody knows; gives its file."""
    pem = folder / "server.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{pem}.key", "-out", str(pem)]
    subprocess.run(make, check=True, capture_output=True)
    server.use_tls(pem, Path(f"{pem}.key"))
    return pem


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [("20900101", "20910101", "is not yet valid"), ("20100101", "20110101", "has expired")],
)
def test_certificate_of_another_time_is_told_with_the_clock(
    server: FileServer, tmp_path: Path, start: str, end: str, words: str
) -> None:
    """A certificate that has ended or not begun is told with this machine's clock, not with an authority."""
    pem = tmp_path / "server.pem"
    (tmp_path / "index").touch()
    (tmp_path / "ca.cnf").write_text(
        "[ca]\ndefault_ca=own\n[own]\ndatabase=index\nrand_serial=yes\nnew_certs_dir=.\ndefault_md=sha256\n"
        "policy=any\n[any]\ncommonName=supplied\n"
    )
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    ask = "req -newkey rsa:2048 -nodes -subj /CN=x -keyout server.pem.key -out server.csr"
    sign = "ca -batch -config ca.cnf -selfsign -keyfile server.pem.key -in server.csr -out server.pem -notext"
    times = f"-startdate {start}000000Z -enddate {end}000000Z -extfile names"
    for command in (ask, f"{sign} {times}"):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    server.use_tls(pem, Path(f"{pem}.key"))
    file = server.serve("/m.bin", BODY)

    with pytest.raises(
        DownloadRefused, match=f"certificate {words}.*clock of this machine says 2"
    ) as failure:
        download_file(file.url, tmp_path / "m", policy=quick(ca_bundle=pem))

    assert "ca_bundle" not in str(failure.value)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_variable_that_names_no_certificates_turns_no_check_off(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A variable for certificates that is set to nothing is as good as none: certificates are checked."""
    for each in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, "")
    pem = use_own_certificate(server, tmp_path)
    file = server.serve("/m.bin", b"model")

    with pytest.raises(DownloadRefused, match="certificate verify failed"):
        download_file(file.url, tmp_path / "m", policy=quick())
    if variable != "SSL_CERT_FILE":  # and does not hide the one that names some
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        download_file(file.url, tmp_path / "m", policy=quick())


def test_certificate_that_is_not_believed_is_final_and_names_the_key(
    server: FileServer, tmp_path: Path
) -> None:
    """A server with a certificate of its own is asked once, and the error says where the authority goes."""
    pem = use_own_certificate(server, tmp_path)
    file = server.serve("/m.bin", b"model")

    with pytest.raises(DownloadRefused, match=r"certificate verify failed.*\[models\] ca_bundle"):
        download_file(file.url, tmp_path / "m", policy=quick())
    download_file(file.url, tmp_path / "m", policy=quick(ca_bundle=pem))

    assert (tmp_path / "m").read_bytes() == b"model"
    assert len(file.requests) == 1


# --- how fast ---


def test_limit_holds_over_all_that_share_it() -> None:
    """Two that share a limit wait as long as one that takes the sum."""

    class Waits(threading.Event):
        seconds = 0.0

        def wait(self, timeout: float | None = None) -> bool:
            self.seconds += timeout or 0.0
            return False

    limit, first, second = Limit(1000.0), Waits(), Waits()
    limit.take(5000, first)
    limit.take(5000, second)

    assert first.seconds == pytest.approx(5.0, abs=0.2)
    assert second.seconds == pytest.approx(10.0, abs=0.3)


def test_download_with_a_limit_is_whole(server: FileServer, tmp_path: Path) -> None:
    """A limit slows a download down and changes nothing else."""
    large = BODY * 900  # more than is fetched as a plain stream
    file = server.serve("/m.bin", large)

    policy = quick(limit=Limit(40_000_000))
    assert download_file(file.url, tmp_path / "m.bin", sha256=file.sha256, policy=policy).is_file()


# --- from the configuration ---


def settings(**models: object) -> Settings:
    return Settings(models=ModelsSection.model_validate(models))


def test_policy_holds_what_the_configuration_says(tmp_path: Path) -> None:
    """Every key that concerns downloads arrives in their policy."""
    bundle = Path(certifi.where())

    policy = policy_from(
        settings(
            allow_insecure_urls=True,
            max_connections=4,
            download_limit_mb_s=2.5,
            connect_timeout_s=1,
            first_byte_timeout_s=2,
            stall_timeout_s=3,
            mirrors={"https://a.example/": "https://b.example/a/"},
            ca_bundle=bundle,
            proxy="http://proxy.example:3128",
        )
    )

    assert policy.allow_insecure
    assert policy.connections.most == 4
    assert policy.limit is not None
    assert policy.limit.bytes_per_s == 2_500_000
    assert (policy.connect_s, policy.first_byte_s, policy.stall_s) == (1, 2, 3)
    assert policy.ways("https://a.example/m") == ("https://b.example/a/m", "https://a.example/m")
    assert (policy.ca_bundle, policy.proxy) == (bundle, "http://proxy.example:3128")


def test_tokens_come_from_credentials_and_from_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is a file named after its host; systemd's credential comes before the folder's."""
    folder, credentials = tmp_path / "tokens", tmp_path / "credentials"
    for place, host, token in (
        (folder, "One.example", "first"),
        (folder, "two", "x"),
        (credentials, "two", "y"),
    ):
        place.mkdir(exist_ok=True)
        (place / f"download-token.{host}").write_text(f"{token}\n")
        (place / f"download-token.{host}").chmod(0o600)
    (folder / "README").write_text("not a token")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))

    assert policy_from(settings(token_dir=folder)).tokens == {"one.example": "first", "two": "y"}


@pytest.mark.parametrize("fault", ["readable", "two lines", "no folder", "no bundle"])
def test_configuration_of_downloads_that_cannot_be_used_is_refused(tmp_path: Path, fault: str) -> None:
    """A token that others can read, or none, and files that are missing are told at the start."""
    token = tmp_path / "download-token.example"
    token.write_text(f"{TOKEN}\n{TOKEN}" if fault == "two lines" else TOKEN)
    token.chmod(0o644 if fault == "readable" else 0o600)
    keys = {
        "no folder": {"token_dir": tmp_path / "none"},
        "no bundle": {"ca_bundle": tmp_path / "none"},
    }.get(fault, {"token_dir": tmp_path})

    with pytest.raises(ConfigError) as failure:
        policy_from(settings(**keys))

    assert failure.value.key.startswith("models.")
    assert TOKEN not in str(failure.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"-----BEGIN RSA PRIVATE KEY-----\n", "holds no certificate in PEM format"),
        ("der", "is in DER format (openssl x509 -inform der"),
        (None, "cannot be read: No such file"),
    ],
    ids=["empty", "no certificate", "DER", "missing"],
)
def test_bundle_that_holds_no_certificates_is_told_with_its_key(
    tmp_path: Path, content: bytes | str | None, says: str
) -> None:
    """A file of certificates that no connection could be made with is a fault of the configuration."""
    bundle = tmp_path / "ca"
    if content == "der":
        pem = Path(certifi.where()).read_text()
        first = pem[pem.index("-----BEGIN") : pem.index("-----END CERTIFICATE-----") + 25] + "\n"
        content = ssl.PEM_cert_to_DER_cert(first)
    if isinstance(content, bytes):
        bundle.write_bytes(content)
    with pytest.raises(ConfigError, match="PEM format, or leave the key out") as caught:
        policy_from(settings(ca_bundle=bundle))
    assert caught.value.key == "models.ca_bundle"
    assert f"{bundle} {says}" in str(caught.value)


@pytest.mark.parametrize("keys", [{"mirrors": {"a": "https://b/"}}, {"proxy": "proxy:3128"}])
def test_addresses_of_mirrors_and_proxies_are_checked(keys: dict[str, object]) -> None:
    """A mirror or proxy that is no address is a fault of the configuration."""
    with pytest.raises(ValueError, match="URL"):
        settings(**keys)
