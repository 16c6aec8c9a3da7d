"""What proves to the libp2p daemon of this machine who speaks to it: a TLS certificate of a peer.

Source: libp2p specs, `tls/tls.md`.
"""

import datetime
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from swarm.net.identity import Identity

_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
_SIGNED_PREFIX = b"libp2p-tls-handshake:"
_OCTETS, _SEQUENCE = b"\x04", b"\x30"
_VALID_FOR = datetime.timedelta(hours=1)


def context_of(identity: Identity, public: bytes) -> ssl.SSLContext:
    """For connections that `identity` makes, whose key is `public` as libp2p encodes it.

    Who answers is not looked at: only for what may be told to anybody who listens on this machine.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signed = _SIGNED_PREFIX + key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    proof = _der(_SEQUENCE, _der(_OCTETS, public) + _der(_OCTETS, identity.sign(signed)))
    nobody, now = x509.Name([]), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(issuer_name=nobody, subject_name=nobody, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID_FOR)
        .not_valid_after(now + _VALID_FOR)
        .add_extension(x509.UnrecognizedExtension(_EXTENSION, proof), critical=False)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["libp2p"])
    with tempfile.NamedTemporaryFile() as file:  # mode 0600
        file.write(certificate.public_bytes(Encoding.PEM))
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _der(tag: bytes, content: bytes) -> bytes:
    assert len(content) < 128, "an Ed25519 key and its signature are short"
    return tag + bytes([len(content)]) + content
