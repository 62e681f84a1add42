"""S3-compatible stores that do not support the checksums that AWS's client sends and expects since
botocore 1.36. The refusals are those that such stores are known for."""

from __future__ import annotations

import fsspec
import pytest
from loopback import Reply
from object_store_cases import assert_done, convert
from runs import assert_clean_error, digests

SETTINGS = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
REFUSALS = [
    (501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
    (501, "NotImplemented", "STREAMING-UNSIGNED-PAYLOAD-TRAILER not implemented"),
    (400, "InvalidArgument", "Unsupported header 'x-amz-sdk-checksum-algorithm' received"),
    (400, "InvalidRequest", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, or a valid value."),
    (400, "XAmzContentSHA256Mismatch", "The provided header does not match what was computed."),
    (411, "MissingContentLength", "You must provide the Content-Length HTTP header."),
]


def has_checksum(headers) -> bool:
    checksums = ("x-amz-checksum", "x-amz-sdk-checksum")
    return any(name.lower().startswith(checksums) for name in headers)


def refuse_checksums(s3, number: int, code: str, message: str) -> None:
    """Let a store refuse uploads with checksums."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def refuse(request, answer):
        return Reply(number, {}, body) if has_checksum(request.headers) else answer(request)

    s3.proxy.spoil("PUT", refuse)


def with_settings(monkeypatch) -> None:
    """Set what the message names, for new clients, as a new run has them."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(("number", "code", "message"), REFUSALS)
def test_a_refusal_names_the_settings(number, code, message, s3, checkpoints):
    refuse_checksums(s3, number, code, message)
    done = convert(checkpoints(), s3.url())
    assert_clean_error(done, 3)
    for name, value in SETTINGS.items():
        assert f"{name}={value}" in done.stderr
    assert message[:20] in done.stderr
    assert len(s3.proxy.requests_for("PUT")) <= 3
    assert s3.objects() == []


def test_with_the_settings_the_upload_succeeds(s3, new_clients, checkpoints, whole, monkeypatch):
    refuse_checksums(s3, *REFUSALS[0])
    with_settings(monkeypatch)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole


def test_a_read_with_a_checksum_of_something_else(
    s3, new_clients, checkpoints, whole, monkeypatch, tmp_path
):
    """Some stores send that of the whole file with a part of it."""
    source = s3.fill(checkpoints())

    def lie(request, answer):
        reply = answer(request)
        if has_checksum(request.headers):
            reply.headers["x-amz-checksum-crc32"] = "AAAAAA=="
        return reply

    s3.proxy.spoil("GET .*(safetensors|json)", lie)
    done = convert(source, tmp_path / "out")
    assert_clean_error(done, 3)
    assert "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required" in done.stderr
    with_settings(monkeypatch)
    assert_done(convert(source, tmp_path / "out"))
    shards = {n: d for n, d in whole.items() if n.endswith(".safetensors")}
    assert digests(tmp_path / "out", "*.safetensors") == shards


def test_other_errors_do_not_name_the_settings(s3, new_clients, checkpoints):
    body = b"<Error><Code>InternalError</Code><Message>Try again.</Message></Error>"
    s3.proxy.spoil("PUT", lambda request, answer: Reply(500, {}, body))
    done = convert(checkpoints(), s3.url())
    assert_clean_error(done, 3)
    assert "CHECKSUM" not in done.stderr
