"""`fedvpa federation init`: a folder with everything a federation needs, and one folder for each
client to take away."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedvpa.config import FeaturesConfig
from fedvpa.errors import BadInputError
from fedvpa.files import claim, make_folder, write_atomically

MOST_NAME = 120
"""Characters of a client's name: it is the name of a folder and of a key."""
_APP = """# The Flower app of this federation. Install fedvpa on every machine: its parts are there.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedvpa-federation"
version = "1.0.0"
description = "Federated variational preference selector"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["federation_app"]

[tool.flwr.app]
publisher = "fedvpa"

[tool.flwr.app.components]
serverapp = "federation_app.server:app"
clientapp = "federation_app.client:app"

[tool.flwr.app.config]
settings = "server.yaml"
"""
_SERVER = '''"""Rounds, checkpoints, resume."""

from fedvpa.network import server_app

app = server_app.app
'''
_CLIENT = '''"""Flower asks an app for a ClientApp; clients of this federation run none."""

from flwr.clientapp import ClientApp

app = ClientApp()
'''


def init_project(
    folder: Path, clients: Sequence[str], *, host: str = "127.0.0.1", port: int = 9092,
    data: Sequence[str] = (),
    training: dict[str, Any] | None = None, secure: bool = False,
) -> list[Path]:  # fmt: skip
    """Write the project; the folders of the clients, in their order.

    Certificates and keys are new, made here, good for a year, and meant for a trial: in production
    every client makes its own key and hands over the public half alone.

    Raises:
        BadInputError: the folder is in use, or names, an address or a path that cannot be used;
            nothing is written then.
    """
    host = _check(folder, clients, host, port, data)
    given = (training or {}).get("features", {}).get("backbone", FeaturesConfig().backbone)
    backbone = (
        str(Path(given).expanduser().resolve()) if Path(given).expanduser().is_dir() else given
    )
    authority = _Authority()
    server: dict[str, Any] = {
        "clients": list(clients),
        "host": host,
        "port": port,
        "secure": secure,
    }
    server |= {"training": training or {}}
    _write(folder / "server.yaml", yaml.safe_dump(server, sort_keys=False))
    _write(folder / "app" / "pyproject.toml", _APP)
    _write(folder / "app" / "federation_app" / "__init__.py", '"""A federation of fedvpa."""\n')
    _write(folder / "app" / "federation_app" / "server.py", _SERVER)
    _write(folder / "app" / "federation_app" / "client.py", _CLIENT)
    _write(folder / "certificates" / "ca.crt", authority.certificate)
    key, certificate = authority.issue("fedvpa server", [host, "127.0.0.1", "localhost"])
    _write(folder / "certificates" / "server.crt", certificate)
    _write(folder / "certificates" / "server.key", key, private=True)
    folders = []
    for i, name in enumerate(clients):
        own = {"name": name, "data": data[i] if data else "pairs.jsonl", "server": f"{host}:{port}"}
        own["backbone"] = backbone
        folders.append(_client_folder(folder, authority, own))
    return folders


def _check(folder: Path, clients: Sequence[str], host: str, port: int, data: Sequence[str]) -> str:
    """Refuse what cannot be used, before anything is written; returns the host's ASCII name."""
    claim(folder, "choose another folder")
    for name in clients:
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise BadInputError(
                f"'{name}': a client's name has letters, digits, '-', '_' and '.' only"
            )
        if len(name) > MOST_NAME:
            raise BadInputError(
                f"'{name[:20]}...': a client's name has {MOST_NAME} characters at most, not"
                f" {len(name)}"
            )
    host = _checked_host(host)
    if not 0 < port < 65536:
        raise BadInputError(f"--port {port}: between 1 and 65535")
    if "\\" in str(folder.resolve()):
        raise BadInputError(
            f"{folder}: the path holds a backslash, which certificates are not found under;"
            " choose another folder"
        )
    if len(set(clients)) < len(clients):
        raise BadInputError("clients: a name is given twice")
    if data and len(data) != len(clients):
        raise BadInputError(f"{len(data)} data files for {len(clients)} clients")
    return host


def _checked_host(host: str) -> str:
    """An address that a certificate can name: as it is, or in its ASCII form.

    Raises:
        BadInputError: it is none.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return host
    try:
        name = host.encode("idna").decode()
    except UnicodeError:
        name = ""
    part = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
    if len(name) > 253 or not re.fullmatch(rf"{part}(\.{part})*\.?", name):
        raise BadInputError(f"--host {host!r}: not the name or the address of a machine")
    return name


def _client_folder(folder: Path, authority: _Authority, own: dict[str, Any]) -> Path:
    """What a client takes to its machine, and its public key on the server's side."""
    name = own["name"]
    home = make_folder(folder / "clients" / name, private=True)
    private, public = _node_key()
    own = own | {"root_certificate": "ca.crt", "key": "node.key"}
    _write(home / "client.yaml", yaml.safe_dump(own, sort_keys=False))
    _write(home / "ca.crt", authority.certificate)
    _write(home / "node.key", private, private=True)
    _write(folder / "keys" / f"{name}.pub", public)
    return home


def _write(path: Path, text: str, private: bool = False) -> None:
    write_atomically(path, text.encode(), private=private)


def _node_key() -> tuple[str, str]:
    """A P-384 key pair in OpenSSH's format, the only one that Flower reads."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private.decode(), public.decode() + "\n"


class _Authority:
    """A certificate authority of its own, whose key is forgotten afterwards."""

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedvpa trial authority")]
        )
        self._certificate = self._signed(self._name, self._key.public_key(), [], authority=True)

    @property
    def certificate(self) -> str:
        """Its own certificate, PEM."""
        from cryptography.hazmat.primitives import serialization

        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, name: str, hosts: Sequence[str]) -> tuple[str, str]:
        """A key and a certificate for some hosts, both PEM."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._signed(
            subject, key.public_key(), list(dict.fromkeys(hosts)), authority=False
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return private.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()

    def _signed(self, subject: Any, public_key: Any, hosts: Sequence[str], authority: bool) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False
            )
        if authority:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
                key_encipherment=False,
                data_encipherment=False, key_agreement=False, encipher_only=False,
                decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        return builder.sign(self._key, hashes.SHA384())


def _host(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
