"""A zip that proves what is in it: a manifest of digests, and a signature over the manifest.

``manifest.json`` names every other file with its SHA-256; ``signature.json`` signs the manifest's
bytes. With Ed25519 (RFC 8032) a third party needs the public key alone; with an HMAC, the same key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.errors import AuditError
from trace_ray.runtime.audit_log import KEY_ENV

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
ED25519_ENV = "TRACE_RAY_AUDIT_SIGNING_KEY"
"""Environment variable with an Ed25519 private key: a PEM file's path, or the PEM itself."""
MAX_BYTES = 1 << 30
"""A bundle that unpacks to more is refused."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are what its manifest says, and its manifest what was signed."""

    files: dict[str, bytes]
    about: dict[str, Any]
    """What the manifest says beside the digests."""
    signed: str
    """What the signature proves, in words."""


def write_bundle(path: Path, files: Mapping[str, bytes], about: Mapping[str, Any]) -> str:
    """Write files with their manifest and signature, complete or not at all.

    Args:
        path: zip to write.
        files: name -> content.
        about: JSON values for the manifest.

    Returns:
        How it is signed: ``ed25519``, ``hmac-sha256`` or ``none``, by what the environment holds.

    Raises:
        AuditError: the environment's key can't be used, or the file can't be written.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = _json({**about, "files": digests})
    signature = _sign(manifest)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            content = {MANIFEST: manifest, SIGNATURE: _json(signature), **files}
            for name, data in content.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, data)
        os.replace(draft, path)
    except OSError as error:
        raise AuditError(f"{path}: can't be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    return signature["algorithm"]


def read_bundle(path: Path, public_key: Path | None = None) -> Bundle:
    """Read a bundle and check its digests and its signature.

    Args:
        path: zip that ``write_bundle`` wrote.
        public_key: PEM file of the Ed25519 key that must have signed it; None = the bundle's own.

    Raises:
        AuditError: not a bundle, or anything in it isn't what was signed.
    """
    content = _unpack(path)
    try:
        manifest = json.loads(content[MANIFEST])
        signature = json.loads(content[SIGNATURE])
        listed = dict(manifest.pop("files"))
        algorithm = signature["algorithm"]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise AuditError(f"{path}: holds no {MANIFEST} and {SIGNATURE} of an export") from None
    files = {name: data for name, data in content.items() if name not in (MANIFEST, SIGNATURE)}
    found = [f"{name}: is missing" for name in listed.keys() - files.keys()]
    found += [f"{name}: was added" for name in files.keys() - listed.keys()]
    found += [
        f"{name}: was edited"
        for name in files.keys() & listed.keys()
        if hashlib.sha256(files[name]).hexdigest() != listed[name]
    ]
    if found:
        raise AuditError("\n".join(f"{path}: {problem}" for problem in sorted(found)))
    signed = _check(path, content[MANIFEST], algorithm, signature, public_key)
    return Bundle(files, manifest, signed)


def _unpack(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise AuditError(f"{path}: holds two files of one name")
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise AuditError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB")
            return {name: archive.read(name) for name in names}
    except AuditError:
        raise
    except OSError as error:
        raise AuditError(f"{path}: can't be read: {error.strerror}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise AuditError(f"{path}: is not a whole zip file: {error}") from None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sign(manifest: bytes) -> dict[str, str]:
    if given := os.environ.get(ED25519_ENV):
        key = _private_key(given)
        return {
            "algorithm": "ed25519",
            "public_key": _raw(key.public_key()),
            "signature": base64.b64encode(key.sign(manifest)).decode(),
        }
    if key := os.environ.get(KEY_ENV, "").encode():
        return {
            "algorithm": "hmac-sha256",
            "signature": hmac.new(key, manifest, hashlib.sha256).hexdigest(),
        }
    return {"algorithm": "none"}


def _private_key(given: str) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        text = given.encode() if "-----BEGIN" in given else Path(given).read_bytes()
        key = load_pem_private_key(text, None)
    except (OSError, ValueError, TypeError) as error:
        raise AuditError(f"{ED25519_ENV}: no private key can be read: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditError(f"{ED25519_ENV}: is not an Ed25519 key; make one with openssl genpkey")
    return key


def _raw(key: Any) -> str:
    return base64.b64encode(key.public_bytes_raw()).decode()


def _check(
    path: Path, manifest: bytes, algorithm: str, signature: Mapping[str, Any], pem: Path | None
) -> str:
    if pem is not None and algorithm != "ed25519":
        raise AuditError(f"{path}: is signed by {algorithm}, not by an Ed25519 key")
    if algorithm == "none":
        return "not signed: its maker can't be known"
    if algorithm == "hmac-sha256":
        key = os.environ.get(KEY_ENV, "").encode()
        if not key:
            return f"HMAC not checked: set {KEY_ENV}"
        wanted = hmac.new(key, manifest, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(wanted, str(signature.get("signature"))):
            raise AuditError(f"{path}: its signature was made with another key or for other files")
        return "HMAC checked"
    if algorithm != "ed25519":
        raise AuditError(f"{path}: is signed by {algorithm}, which is unknown here")
    return _check_ed25519(path, manifest, signature, pem)


def _check_ed25519(
    path: Path, manifest: bytes, signature: Mapping[str, Any], pem: Path | None
) -> str:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        own = base64.b64decode(signature["public_key"], validate=True)
        key = Ed25519PublicKey.from_public_bytes(own)
        key.verify(base64.b64decode(signature["signature"], validate=True), manifest)
    except (KeyError, ValueError, TypeError, InvalidSignature):
        raise AuditError(
            f"{path}: its signature was made with another key or for other files"
        ) from None
    said = f"Ed25519 signature by key {hashlib.sha256(own).hexdigest()[:16]}"
    if pem is None:
        return f"{said}: give --public-key to know whose it is"
    try:
        trusted = load_pem_public_key(pem.read_bytes())
    except (OSError, ValueError) as error:
        raise AuditError(f"{pem}: no public key can be read: {error}") from None
    if not isinstance(trusted, Ed25519PublicKey) or trusted.public_bytes_raw() != own:
        raise AuditError(f"{path}: was signed with another key than {pem}")
    return f"{said}, the given one"
