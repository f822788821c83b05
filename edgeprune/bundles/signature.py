"""Signatures of files by OpenSSH's ssh-keygen (PROTOCOL.sshsig), in the namespace `edgeprune`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO

from edgeprune.errors import InputError, MissingError, VerifyError

NAMESPACE = "edgeprune"
KEYGEN = "ssh-keygen"


def signature_path(file: Path) -> Path:
    """Path of the signature of a file, next to it."""
    return file.with_name(f"{file.name}.sig")


def sign(file: Path, key: Path) -> bytes:
    """The signature of a file by an OpenSSH key; `key` may be the public half of one in the ssh-agent.

    Raises InputError where the key cannot be used, MissingError without ssh-keygen.
    """
    if not key.is_file():
        raise InputError(f"{key}: no such key: make one with ssh-keygen -t ed25519 -f {key}")
    with open(file, "rb") as data:
        done = _keygen("sign", "-f", key, "-n", NAMESPACE, data=data)
    if done.returncode or not done.stdout:
        raise InputError(f"{key} cannot sign ({_said(done)}): pass an OpenSSH private key that ssh-keygen can read")
    return done.stdout


def verified(data: IO[bytes], file: Path, allowed: Path, signer: str | None = None) -> str:
    """Check the signature beside `file`, opened as `data`, and return who signed it, a name in `allowed`.

    `allowed` is an allowed_signers file of ssh-keygen(1). With `signer` only that name will do. Raises VerifyError,
    InputError where a file is missing, MissingError without ssh-keygen.
    """
    signature = signature_path(file)
    if not signature.is_file():
        raise VerifyError(f"{file}: its signature {signature.name} is missing: fetch it too, or pass --unsigned")
    if not allowed.is_file():
        raise InputError(f"{allowed}: no such file: pass an allowed_signers file as in ssh-keygen(1)")
    found = _keygen("find-principals", "-f", allowed, "-s", signature, data=subprocess.DEVNULL)
    names = [name for line in found.stdout.decode(errors="replace").splitlines() for name in line.split(",") if name]
    if found.returncode or not names:
        raise VerifyError(
            f"{file}: its signature is by none of the signers in {allowed} ({_said(found)}): "
            "get the file from a source you trust, or add the signer's public key"
        )
    if signer is not None and signer not in names:
        raise VerifyError(
            f"{file} is signed by {', '.join(names)}, not by {signer}: get the file that {signer} signed"
        )
    name = signer or names[0]
    data.seek(0)
    done = _keygen("verify", "-f", allowed, "-I", name, "-n", NAMESPACE, "-s", signature, data=data)
    if done.returncode:
        raise VerifyError(
            f"{file} does not match its signature by {name} ({_said(done)}): one was changed, fetch both again"
        )
    return name


def _keygen(action: str, *options: str | Path, data: IO[bytes] | int) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [KEYGEN, "-Y", action, *map(str, options)], stdin=data, capture_output=True, check=False
        )
    except OSError as error:
        raise MissingError(
            f"{KEYGEN} cannot be started ({error.strerror}): install the OpenSSH client (Debian: openssh-client)"
        ) from None


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line of its output."""
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].rstrip(".")[:200] if lines else f"{KEYGEN} exit code {done.returncode}"
