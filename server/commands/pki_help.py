"""The texts of `lamina pki --help` and of each of its commands."""

from __future__ import annotations

from collections.abc import Mapping

USAGE = """\
usage: lamina pki COMMAND …      lamina pki COMMAND --help

The CA of a consortium, and the identities of its coordinator, clients, operators and auditors.

at the CA:
  init      make a CA folder
  invite    give a site a one-time invite
  sign      answer a request that came as a file
  listen    answer requests over the network
  revoke    withdraw certificates
  list      what was issued and who is invited
at a site:
  enroll    an invite to an identity
  renew     a new certificate before the old one ends

example, all on one machine:
  lamina pki init ca consortium=hospitals
  lamina pki invite ca north role=client output=north.invite.json
  lamina pki enroll north.invite.json output=north ca=ca"""

HELP: Mapping[str, str] = {
    "init": """\
usage: lamina pki init CA_DIR consortium=NAME [days=3650]

Makes the folder of a CA: its key (encrypted where LAMINA_CA_PASSPHRASE is set), certificate, ledger and revocation list.
Keep it on a machine that does nothing else. Sites trust this CA alone.

examples:
  lamina pki init ca consortium=hospitals
  LAMINA_CA_PASSPHRASE=… lamina pki init /media/stick/ca consortium=hospitals days=1825""",
    "invite": """\
usage: lamina pki invite CA_DIR NAME [role=client] [host=NAME,…] [days=7] [certificate_days=365] [enrollment=HOST:PORT]
                         [output=FILE]

Writes an invite that works once. role is coordinator, client, operator or auditor; a coordinator needs host=, the DNS names
and IP addresses where clients reach it. enrollment= is where `lamina pki listen` will be reached. days is the invite's life,
certificate_days the certificate's. Default output: NAME.invite.json. Whoever holds the file becomes NAME: hand it over
privately.

examples:
  lamina pki invite ca north output=north.invite.json
  lamina pki invite ca hub role=coordinator host=hub.example.org,10.0.0.5 output=hub.invite.json
  lamina pki invite ca south days=1 enrollment=ca.example.org:8441""",
    "enroll": """\
usage: lamina pki enroll INVITE output=DIR [ca=CA_DIR | certificate=FILE] [address=HOST:PORT] [online=true]

Makes keys in DIR, where they stay, and has them certified: by the listener that the invite names (or address=), by the CA
folder at hand (ca=), or by files: DIR/request.json goes to whoever keeps the CA, certificate=FILE installs the answer.
online=false goes by files though the invite names a listener. Given again after a failure, it continues.

examples:
  lamina pki enroll north.invite.json output=north
  lamina pki enroll north.invite.json output=north ca=ca
  lamina pki enroll north.invite.json output=north online=false
  lamina pki enroll north.invite.json output=north certificate=certificate.pem""",
    "sign": """\
usage: lamina pki sign CA_DIR REQUEST [output=certificate.pem]

Checks a request from `lamina pki enroll` or `lamina pki renew` against the ledger, and writes the certificate.

examples:
  lamina pki sign ca request.json
  lamina pki sign ca north-request.json output=north-certificate.pem""",
    "listen": """\
usage: lamina pki listen CA_DIR [address=127.0.0.1:8441]

Answers enrollments and renewals until stopped, over TLS 1.3, at most 20 at once and 1 a second after that; an invite bears 5
refused attempts. Callers are told only that a request was refused; why is written to stderr.

examples:
  lamina pki listen ca
  lamina pki listen ca address=0.0.0.0:8441""",
    "revoke": """\
usage: lamina pki revoke CA_DIR NAME      lamina pki revoke CA_DIR serial=HEX

Revokes all certificates of a name and cancels its open invites, or revokes one certificate, and rewrites CA_DIR/crl.pem,
which the coordinator reads. A name that was revoked may be invited anew.

examples:
  lamina pki revoke ca north
  lamina pki revoke ca serial=4f0c…""",
    "renew": """\
usage: lamina pki renew DIR [ca=CA_DIR | certificate=FILE] [address=HOST:PORT] [online=true] [rotate_signing_key=false]

A new certificate with a new TLS key, asked for with the old signing key, which is kept unless rotate_signing_key=true. The
ways are those of `lamina pki enroll`. The old files stay in force until the new ones replace them, all at once.

examples:
  lamina pki renew north
  lamina pki renew north ca=ca
  lamina pki renew north online=false
  lamina pki renew north certificate=certificate.pem""",
    "list": """\
usage: lamina pki list CA_DIR [--json]

The CA's fingerprint, certificates and invites, with their states. A certificate that was renewed is superseded: it stays valid
until its date unless it is revoked by its serial number.

examples:
  lamina pki list ca
  lamina pki list ca --json""",
}
