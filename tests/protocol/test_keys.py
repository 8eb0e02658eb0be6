"""Users, keys and TLS of a real server: the start rules, the commands, and how soon a key ends."""

from __future__ import annotations

import datetime
import json
import os
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.protocol.conftest import running_server, serve_command, serve_environment

_TINSMITH = str(Path(sys.executable).with_name("tinsmith"))


def admin(folder: Path, *words: str, **environment: str) -> Any:
    return command(folder, "admin", *words, **environment)


def command(folder: Path, *words: str, **environment: str) -> Any:
    env = {**serve_environment(folder / "data"), **environment}
    done = subprocess.run([_TINSMITH, *words], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in words else done.stdout.strip()


def self_signed(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    return folder / "cert.pem", folder / "key.pem"


def test_an_open_address_without_keys_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    done = subprocess.run(
        serve_command("--host", "0.0.0.0", "--port", "0"),
        capture_output=True,
        text=True,
        env=serve_environment(tmp_path / "data"),
        timeout=60,
    )
    assert done.returncode == 1
    assert "tinsmith admin keys create" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("options", [["--tls-certificate", "no.pem"], ["--tls-certificate", "a", "--tls-key", "b"]])
def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path, options: list[str]) -> None:
    command = serve_command("--port", "0", *options)
    done = subprocess.run(command, capture_output=True, text=True, env=serve_environment(tmp_path), timeout=60)
    assert done.returncode == 1
    assert "--tls-key" in done.stderr


def test_keys_over_tls_on_an_open_address(tmp_path: Path) -> None:
    admin(tmp_path, "users", "create", "anna", "--role", "admin")
    secret = admin(tmp_path, "keys", "create", "anna")
    certificate, key = self_signed(tmp_path)
    options = ["--host", "0.0.0.0", "--tls-certificate", str(certificate), "--tls-key", str(key)]
    with running_server(tmp_path, *options) as server:
        assert server.url.startswith("https://")
        assert "TINKER_API_KEY" not in server.ready_line
        url = server.url.replace("0.0.0.0", "localhost")
        with httpx2.Client(base_url=url, verify=ssl.create_default_context(cafile=certificate)) as http:
            assert http.get("/api/v1/sessions").status_code == 401
            assert http.get("/readyz").status_code == 200
            headers = {"x-api-key": secret}
            assert http.get("/api/v1/sessions", headers=headers).status_code == 200
            remote = {"TINKER_API_KEY": secret, "SSL_CERT_FILE": str(certificate)}
            admin(tmp_path, "users", "create", "ben", "--base-url", url, **remote)
            made = admin(tmp_path, "keys", "create", "ben", "--base-url", url, "--json", **remote)
            assert http.get("/api/v1/sessions", headers={"x-api-key": made["secret"]}).status_code == 200
            listed = admin(tmp_path, "users", "list", "--base-url", url, "--json", **remote)
            assert [user["user_id"] for user in listed] == ["anna", "ben"]
            assert command(tmp_path, "checkpoint", "list", "--base-url", url, "--json", **remote) == []


def test_a_key_that_another_process_revokes_stops_within_a_second(tmp_path: Path) -> None:
    admin(tmp_path, "users", "create", "anna")
    made = admin(tmp_path, "keys", "create", "anna", "--json")
    with running_server(tmp_path) as server, httpx2.Client(base_url=server.url) as http:
        headers = {"authorization": f"Bearer {made['secret']}"}
        assert http.get("/api/v1/sessions", headers=headers).status_code == 200
        assert http.get("/api/v1/sessions").status_code == 401
        admin(tmp_path, "keys", "revoke", str(made["key_id"]), "--yes")
        for _ in range(100):  # a second is what it takes at most on a machine that has time
            if http.get("/api/v1/sessions", headers=headers).status_code == 401:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the revoked key still works")


def test_the_official_sdk_works_with_a_key_and_not_without(tmp_path: Path) -> None:
    sdk = Path(__file__).parents[2] / ".venv-tinker" / "bin" / "python"
    admin(tmp_path, "users", "create", "anna", "--email", "anna@example.org")
    secret = admin(tmp_path, "keys", "create", "anna")
    script = (
        "import tinker; c = tinker.ServiceClient(); r = c.create_rest_client();"
        "t = c.create_lora_training_client('tinsmith/tiny', rank=4); t.save_state('a').result();"
        "print(r.list_training_runs().result().training_runs[0].model_owner, r.whoami().result().email)"
    )
    with running_server(tmp_path) as server:
        for key, code in ((secret, 0), ("tml-" + "0" * 48, 1)):
            env = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0"}
            done = subprocess.run(
                [str(sdk), "-W", "ignore", "-c", script], capture_output=True, text=True, env=env, timeout=120
            )
            assert done.returncode == code, done.stderr
            if code == 0:
                assert done.stdout.split() == ["anna", "anna@example.org"]
            else:
                assert "401" in done.stderr
            assert key not in server.log.read_text()
