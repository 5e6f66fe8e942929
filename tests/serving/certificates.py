"""Real certificates and keys, made by OpenSSL for one test run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


class Authority:
    """Vouches for servers and clients; its certificate is in every folder that it makes."""

    def __init__(self, place: Path, name: str) -> None:
        self.place = place
        self.name = name
        self.key, self.certificate = place / "ca-key.pem", place / "ca-cert.pem"
        place.mkdir(parents=True)
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-keyout", str(self.key), "-out", str(self.certificate)),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"),
        )

    def vouch(self, folder: Path, role: str) -> Path:
        """A folder with the certificate of a ``server`` or a ``client`` on this machine."""
        folder.mkdir(parents=True, exist_ok=True)
        key, request = folder / f"{role}-key.pem", folder / "request.pem"
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", f"/CN={role}", "-keyout", str(key), "-out", str(request)),
        )
        extensions = folder / "extensions"
        usage = "serverAuth" if role == "server" else "clientAuth"
        extensions.write_text(f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1\nextendedKeyUsage={usage}\n")
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self.key)),
            *("-CAcreateserial", "-days", "2", "-extfile", str(extensions)),
            *("-out", str(folder / f"{role}-cert.pem")),
        )
        key.chmod(0o600)
        return self.trusted(folder)

    def trusted(self, folder: Path) -> Path:
        """A folder where this authority is trusted."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        return folder


def keys(path: Path, *names: str) -> Path:
    """A file of pre-shared keys."""
    path.write_text("".join(f"{name}:{os.urandom(32).hex()}\n" for name in names))
    path.chmod(0o600)
    return path
