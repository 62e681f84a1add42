"""The location that a name means, and how retries end."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate

import pytest

from gptoss_stream import open_location, open_writable_location, plan, synth
from gptoss_stream.errors import CheckpointError, MachineError, OptionError
from gptoss_stream.storage import retries
from gptoss_stream.storage.hub_names import name_of_page
from gptoss_stream.storage.local_folder import LocalFolder
from gptoss_stream.storage.open_location import is_repository_name


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://huggingface.co/openai/gpt-oss-20b", "openai/gpt-oss-20b"),
        ("https://huggingface.co/openai/gpt-oss-20b/", "openai/gpt-oss-20b"),
        ("https://huggingface.co/openai/x/tree/v1/original", "openai/x@v1/original"),
        ("https://huggingface.co/openai", None),
        ("https://huggingface.co.evil.org/openai/gpt-oss-20b", None),
        ("http://huggingface.co/openai/gpt-oss-20b", None),
    ],
)  # fmt: skip
def test_the_address_of_a_page_is_its_repository(url, name):
    assert name_of_page(url) == name


@pytest.mark.parametrize("name", ["a", "a/b/c", "./a/b", "/a/b", "~/b", "a/", "-a/b", "a b/c"])
def test_a_path_is_not_a_repository(name):
    assert not is_repository_name(name)
    assert isinstance(open_location(name), LocalFolder)


def test_a_local_folder_has_priority_over_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gpt-oss-20b").mkdir(parents=True)
    assert is_repository_name("openai/gpt-oss-20b")
    assert isinstance(open_location("openai/gpt-oss-20b"), LocalFolder)


def test_a_subfolder_of_a_folder(tmp_path):
    assert str(open_location(tmp_path, subfolder="original")) == str(tmp_path / "original")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hf://datasets/openai/x", {}),
        ("hf://openai", {}),
        ("hf://openai/x@v1", {"revision": "v2"}),
        ("HF://datasets/openai/x", {}),
        ("hf://user/name/..", {}),
        ("hf://user/name/a/../b", {}),
        ("hf://user/name/./a", {}),
        ("hf://user/name", {"subfolder": "../x"}),
        ("hf://user/name@..", {}),
        ("hf://user/name", {"revision": ".."}),
        ("hf://../x", {}),
        ("hf://a/../b", {}),
        ("hf:///.", {}),
        ("hf:///./a", {}),
        ("hf://a--b/x", {}),
        ("user/name", {"token": ""}),
        ("folder", {"token": ""}),
        ("user/name", {"token": "hf_secret\n"}),
        ("user/name", {"token": "hf_secret\xe9"}),
        ("simplecache::file:///folder", {}),
        ("zip://x::s3://bucket/x.zip", {}),
        ("dir:///folder", {}),
        ("folder", {"revision": "main"}),
        ("folder", {"token": "hf_secret"}),
        ("https://example.org/x", {"download": True}),
        ("https://", {}),
        ("nosuch://bucket/x", {}),
    ],
)
def test_invalid_names_are_refused(name, options):
    with pytest.raises(OptionError) as refusal:
        open_location(name, **options)
    assert "hf_secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "https://example.org/x",
            "hf://a/b@main",
            "hf://user/name/..",
            "hf://../x",
            "hf://a/../b",
        ),
        *("hf:///.", "hf:///./a", "hf://user/name/.git", "hf://user/name/a//b"),
        *(
            "S3:/bucket/x",
            "simplecache::file:///folder",
            "SimpleCache::file:///folder",
            "dir:///folder",
        ),
    ],
)
def test_what_cannot_be_written_to_is_refused(name):
    with pytest.raises(OptionError) as refusal:
        open_writable_location(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("opened", [open_location, open_writable_location])
def test_a_kind_before_a_repository(opened):
    with pytest.raises(OptionError, match="hf://models/user/x: write hf://user/x"):
        opened("hf://models/user/x")


@pytest.mark.parametrize("token", ["", " ", "hf_secret\n", "hf_secret\r\nHost: x", "hf_\xe9"])
def test_a_token_that_cannot_be_sent(token):
    for opened in (open_location, open_writable_location):
        with pytest.raises(
            OptionError, match=r"--token: the token is (empty|malformed)"
        ) as refusal:
            opened("hf://user/name", token=token)
        assert "hf_" not in str(refusal.value)


@pytest.fixture
def own_bounds(monkeypatch):
    """Bounds of the user's own for hf_xet: then opening a repository changes no variable."""
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")


def test_the_token_of_the_environment_is_checked(own_bounds, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_\xe9")
    with pytest.raises(OptionError, match="HF_TOKEN or the cached login: the token is malformed"):
        open_writable_location("hf://user/name")


def test_the_case_of_a_protocol_does_not_count(own_bounds, tmp_path):
    location = open_writable_location(f"FILE://{tmp_path}")
    location.put({"x": b"data"}, {})
    assert (tmp_path / "x").read_bytes() == b"data"
    assert open_location(f"File://{tmp_path}").names() == ["x"]
    assert str(open_writable_location("HF://user/name")) == "hf://user/name"
    assert str(open_location("HTTPS://example.org/x")) == "https://example.org/x"


def test_an_address_may_have_two_colons():
    assert str(open_location("http://[::1]:80/x")) == "http://[::1]:80/x"


def test_an_output_that_is_a_dangling_link(tmp_path):
    (tmp_path / "out").symlink_to("missing/folder")
    with pytest.raises(OptionError, match="out: a link to missing/folder, which does not exist"):
        open_writable_location(str(tmp_path / "out"))


def test_a_url_is_refused_where_a_local_folder_is_needed():
    with pytest.raises(OptionError, match="must be a local folder"):
        synth("s3://bucket/x")


def test_a_location_is_a_source_of_a_plan(checkpoints):
    named, opened = plan(checkpoints()), plan(open_location(checkpoints()))
    assert [s.header for s in opened.shards] == [s.header for s in named.shards]


def test_offline_only_the_cache_is_used(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        open_location("openai/gpt-oss-20b")


def test_retries_end_and_progress_starts_them_again(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.0)
    error = MachineError("the server fails")
    policy = retries.RetryPolicy(threading.Event(), tries=3)
    policy.wait(error)
    policy.wait(error)
    policy.progress()
    policy.wait(error)
    policy.wait(error)
    with pytest.raises(MachineError, match="the server fails"):
        policy.wait(error)


def test_a_stop_ends_the_waiting():
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(MachineError):
        retries.RetryPolicy(stop).wait(MachineError("stopped"), seconds=600)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "Wed, 21 Foo 2015"}, None),
        ({"Retry-After": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retries.retry_after(headers) == seconds


def test_a_date_to_retry_after():
    date = formatdate(time.time() + 1800, usegmt=True)
    assert 1700 < (retries.retry_after({"Retry-After": date}) or 0) <= 1800


@pytest.mark.parametrize(("asked", "least"), [(0.0, 0.0), (20.0, 20.0), (3600.0, 3600.0)])
def test_waits_are_spread_and_never_shorter_than_asked(asked, least, monkeypatch):
    """Processes that were refused at the same time do not come back at the same time."""
    stop, waits = threading.Event(), []
    monkeypatch.setattr(stop, "wait", lambda seconds: waits.append(seconds))
    policy = retries.RetryPolicy(stop, tries=100)
    for _ in range(50):
        policy.wait(MachineError("busy"), seconds=asked)
        policy.progress()
    assert least <= min(waits) < max(waits) <= least * 1.2 + retries.FIRST_DELAY
    assert len(set(waits)) == 50
