"""The way to the studio: one proxy and one set of trusted certificates for its HTTP calls and its session.

The two libraries would each choose by rules of their own: another order of variables, other defaults for
certificates. A worker that registers through one way and connects through another is hard to explain.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import requests

from studio_worker.errors import ConfigError
from studio_worker.network.urls import is_loopback

_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
"""As downloads have it, where the configuration names no bundle."""


@dataclass(frozen=True)
class Route:
    """How the studio is reached. ``trusted`` is a file or folder of certificates."""

    proxy: str | None  # may hold a password
    trusted: str

    def ssl_context(self) -> ssl.SSLContext:
        """For the session; its HTTP calls take ``trusted`` itself."""
        is_folder = Path(self.trusted).is_dir()
        return ssl.create_default_context(
            cafile=None if is_folder else self.trusted, capath=self.trusted if is_folder else None
        )


def route_to(root: str) -> Route:
    """The way to the studio at ``root``, as the environment has it.

    ``https_proxy`` (``http_proxy`` for plain http) or ``all_proxy``; not for what ``no_proxy`` names, and
    never for this machine itself.

    Raises:
        ConfigError: the proxy is of a kind that the worker cannot use, or the certificates cannot be read.
    """
    proxy = None
    if not is_loopback(urlsplit(root).hostname or ""):
        proxy = requests.utils.select_proxy(root, requests.utils.get_environ_proxies(root))
    if proxy is not None:
        if "://" not in proxy:
            proxy = f"http://{proxy}"  # as curl and requests read it
        if urlsplit(proxy).scheme not in {"http", "https"}:
            raise ConfigError(
                f"a proxy of kind {urlsplit(proxy).scheme} cannot be used to reach the studio",
                cure="name an http proxy in https_proxy, or the studio's host in no_proxy",
            )
    route = Route(proxy, _trusted())
    try:
        if root.startswith("https:"):
            route.ssl_context()
    except OSError as error:  # ssl.SSLError too
        raise ConfigError(
            f"certificates cannot be read from {route.trusted}",
            cure=f"correct {', '.join(_CA_VARIABLES)} in the service's environment",
        ) from error
    return route


def _trusted() -> str:
    for variable in _CA_VARIABLES:
        if named := os.environ.get(variable):
            return named
    # What the operator gave the system (update-ca-certificates) counts; the bundle of the libraries does not
    # know it, and stands in where the system has none.
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return paths.cafile
    if paths.capath and any(Path(paths.capath).iterdir()):
        return paths.capath
    return certifi.where()
