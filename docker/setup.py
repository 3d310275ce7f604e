"""Make what a federation with TLS and node authentication needs: certificates, and a key for each SuperNode.

It writes into the volumes of the other containers, mounted under /volumes; what is there already is kept:

    authority/     ca.key, ca.crt                      the root of trust; no other container mounts it
    superlink/     server.key, server.crt, ca.crt
    operator/      ca.crt, nodes/supernode-*.pub       for those who submit runs and register nodes
    supernode-*/   node.key, ca.crt

It runs as root, for it gives each volume but the authority's to the user as whom the other containers run.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VOLUMES = Path("/volumes")
RUNS = Path("/home/fedkit/fedkit-runs")
USER = "fedkit"
# Of the SuperLink: as the other containers, and as its own health check and ServerApps, call it.
NAMES = ["superlink", "localhost", "127.0.0.1", "::1"]
CA_DAYS, SERVER_DAYS, RENEW_DAYS = 3650, 365, 30


def main() -> None:
    """Make what is missing, and say what."""
    names = NAMES + os.environ.get("SUPERLINK_NAMES", "").split()
    authority, superlink, operator = (VOLUMES / name for name in ("authority", "superlink", "operator"))
    if not (authority / "ca.crt").exists():
        make_authority(authority)
    if not is_valid(superlink / "server.crt", names, authority):
        make_server_certificate(superlink, names, authority)
    for node in sorted(VOLUMES.glob("supernode-*")):
        if not (node / "node.key").exists():
            make_node_key(node)
        key = load_ssh_private_key((node / "node.key").read_bytes(), None)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        write(operator / "nodes" / f"{node.name}.pub", public + b"\n")
        write(node / "ca.crt", (authority / "ca.crt").read_bytes())
    for volume in (superlink, operator):
        write(volume / "ca.crt", (authority / "ca.crt").read_bytes())

    for volume in VOLUMES.iterdir():
        if volume != authority:
            shutil.chown(volume, USER, USER)
    if RUNS.stat().st_uid == 0:  # Docker made it, for the first run
        shutil.chown(RUNS, USER, USER)


def make_authority(folder: Path) -> None:
    """Make the certificate authority that signs the SuperLink's certificate."""
    key, name = ec.generate_private_key(ec.SECP384R1()), common_name("fedkit")
    certificate = (
        builder(name, name, key.public_key(), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    write(folder / "ca.key", pem(key), mode=0o600)
    write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))


def make_server_certificate(folder: Path, names: list[str], authority: Path) -> None:
    """Make the SuperLink's key and certificate, valid for `names`."""
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    ca_key = load_pem_private_key((authority / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        builder(common_name(names[0]), ca.subject, key.public_key(), ca_key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write(folder / "server.key", pem(key), mode=0o600)
    write(folder / "server.crt", certificate.public_bytes(Encoding.PEM))


def make_node_key(folder: Path) -> None:
    """Make a SuperNode's key, as `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    write(folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=0o600)


def is_valid(path: Path, names: list[str], authority: Path) -> bool:
    """Return whether a server certificate is there, of this authority, for these names, and lasts a while."""
    if not path.exists():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:  # which one depends on what is wrong
        return False
    valid_for = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return list(valid_for) == [general_name(name) for name in names] and left.days >= RENEW_DAYS


def builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    """Return a certificate with what all certificates have."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # devices' clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def key_usage(**allowed: bool) -> x509.KeyUsage:
    """Return the extension that allows these uses and no other."""
    uses = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**(dict.fromkeys(uses, False) | allowed))


def common_name(name: str) -> x509.Name:
    """Return a subject that has a common name alone."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def general_name(name: str) -> x509.GeneralName:
    """Return a host name or an address as certificates have it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as a file has it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file, whole or not at all, for the user who needs it."""
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.touch(mode)
    partial.write_bytes(data)
    if path.parent.name != "authority":
        shutil.chown(partial, USER, USER)
    partial.replace(path)
    print(f"made {path.relative_to(VOLUMES)}", flush=True)


if __name__ == "__main__":
    main()
