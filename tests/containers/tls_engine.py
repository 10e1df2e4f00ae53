"""The engine of this machine behind TLS on a port of loopback, as `dockerd --tlsverify` offers it."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from relay import connect


def write_certificates(folder: Path) -> None:
    """ca.pem, cert.pem and key.pem, as the docker command wants them; the server uses the same pair."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, issuer: str, by: ec.EllipticCurvePrivateKey) -> bytes:
        alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
                key.public_key(), x509.random_serial_number(), now - datetime.timedelta(1), now + datetime.timedelta(1),
            )
            .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
            .add_extension(alternative, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )  # fmt: skip
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ours, theirs = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    (folder / "ca.pem").write_bytes(certificate("ca", ours, "ca", ours))
    (folder / "cert.pem").write_bytes(certificate("engine", theirs, "ca", ours))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(theirs.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))


@contextlib.contextmanager
def engine_behind_tls(folder: Path, engine: str) -> Iterator[str]:
    """The address of the engine whose socket is `engine`, for as long as this lasts. Only the folder's certificate gets in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    connected: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    raw, _ = server.accept()
                    ours = socket.socket(socket.AF_UNIX)
                    connected.append(ours)
                    threading.Thread(target=_connect, args=[raw, context, ours, engine], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for ours in connected:  # as when the network between two machines is gone
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)


def _connect(raw: socket.socket, context: ssl.SSLContext, ours: socket.socket, engine: str) -> None:
    with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as theirs, ours:
        ours.connect(engine)
        connect(theirs, ours)
