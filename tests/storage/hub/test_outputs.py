"""Outputs on the Hub are verified, inspected and opened as local ones are."""

from __future__ import annotations

import shutil

import pytest
from hub_cases import DATA, NAME, OUT, PUT, SIZE, TOKEN, python
from hub_runs import after
from remote_outputs import (
    DAMAGES,
    UNFINISHED,
    assert_covered,
    first_shard,
    flip,
    make_unfinished,
    result_of,
)
from runs import assert_clean_error
from stand_in_hub import Fault

URL = f"hf://{OUT}"


@pytest.fixture(scope="module")
def output(served, released, tmp_path_factory):
    """A local output, with checksums."""
    folder = tmp_path_factory.mktemp("verified")
    words = ("convert", released, "out", *SIZE, "--checksums", "--quiet")
    assert served[1].begin(folder, *words).done().returncode == 0
    return folder / "out"


@pytest.fixture
def copy(output, tmp_path):
    return shutil.copytree(output, tmp_path / "copy")


def sent(hub, name: str) -> dict[str, list[tuple[int, int]]]:
    """Return the byte ranges that were sent of the files of a repository."""
    contents, ranges = hub.files(name), {}
    by_hash = {content.sha256: path for path, content in contents.items()}
    for request in hub.requests:
        if request.method == "GET" and request.range is not None:
            begin, last = request.range.removeprefix("bytes=").split("-")
            path = by_hash.get(request.path.rpartition("/")[2]) or request.path.rpartition("/")[2]
            ranges.setdefault(path, []).append((int(begin), int(last) + 1))
        elif request.method == "GET" and f"/{name}/resolve/" in request.path:
            path = request.path.partition("/resolve/")[2].partition("/")[2]
            ranges.setdefault(path, []).append((0, contents[path].nbytes))
    return ranges


def test_each_byte_is_read_once(hub, cli, released, output):
    """As a user runs it: source and output on the Hub."""
    hub.add_folder(NAME, released)
    commit = hub.add_folder(OUT, output)
    done = cli("verify", NAME, URL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{URL}@{commit[:12]}: equal; 90 tensors")
    assert f"gptoss_stream: verifying {URL}@{commit[:12]}" in done.stderr
    hub.reset_counts()
    assert cli("verify", released, URL, "--quiet").returncode == 0
    assert len([request for request in hub.requests if request.origin == "cdn"]) > 20
    assert_covered(sent(hub, OUT), output)


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found(name, hub, cli, released, copy):
    damage, said = DAMAGES[name]
    damage(copy)
    hub.add_folder(OUT, copy)
    done = cli("verify", released, URL, "--quiet")
    assert done.returncode == 1, done.stderr
    assert said in done.stdout


def test_the_files_of_the_hub_are_no_difference(hub, cli, released, copy):
    (copy / "README.md").write_text("# Mine")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    hub.add_folder(OUT, copy)
    assert cli("verify", released, URL).returncode == 0
    assert cli("verify", "--checksums", URL).returncode == 0


def test_checksums_without_reading_a_shard(hub, cli, copy):
    """The SHA-256 of each shard is the Hub's own."""
    hub.add_folder(OUT, copy)
    done = cli("verify", "--checksums", URL)
    assert done.returncode == 0, done.stderr
    assert "by the checksums that the Hub lists" in done.stdout
    assert result_of(cli("verify", "--checksums", URL, "--json").stdout)["unread"] >= 5
    assert [request for request in hub.requests if request.origin == "cdn"] == []
    flip(first_shard(copy))
    flip(copy / "tl_config.json")
    (copy / "chat_template.jinja").unlink()
    hub.add_folder(OUT, copy)
    done = cli("verify", "--checksums", URL)
    assert done.returncode == 1
    for line in (
        f"checksum: {first_shard(copy).name}",
        "checksum: tl_config.json",
        "missing: chat_template.jinja",
    ):
        assert line in done.stdout
    assert [request for request in hub.requests if request.origin == "cdn"] == []
    (copy / "SHA256SUMS").unlink()
    hub.add_folder(OUT, copy)
    done = cli("verify", "--checksums", URL, "--quiet")
    assert_clean_error(done, 2)
    assert "no SHA256SUMS in it" in done.stderr


def test_a_revision(hub, cli, released, output, copy):
    """In the name, or for --checksums as an option."""
    first = hub.add_folder(OUT, output)
    flip(first_shard(copy))
    hub.add_folder(OUT, copy)
    assert cli("verify", released, URL, "--quiet").returncode == 1
    assert cli("verify", released, f"{URL}@{first}", "--quiet").returncode == 0
    assert cli("verify", "--checksums", URL, "--revision", first).returncode == 0
    assert cli("verify", "--checksums", f"{URL}@{first}").returncode == 0


def test_a_token_is_for_the_output(hub, cli, released, output):
    """A private output of a local source; the CDN sees no token."""
    hub.tokens.add(TOKEN)
    hub.add_folder(OUT, output, private=True)
    assert_clean_error(cli("verify", released, URL, "--quiet"), 2)
    hub.reset_counts()
    assert cli("verify", released, URL, "--token", TOKEN, "--quiet").returncode == 0
    assert cli("verify", "--checksums", URL, "--token", TOKEN, "--quiet").returncode == 0
    assert not any(r.has_token for r in hub.requests if r.origin == "cdn")


def test_an_output_as_convert_sends_it(hub, cli, convert, released):
    """Verified where it is, inspected, and opened bit for bit."""
    assert convert(released, URL, "--checksums").returncode == 0
    assert cli("verify", released, URL, "--quiet").returncode == 0
    assert cli("verify", "--checksums", URL, "--quiet").returncode == 0
    assert ": complete" in cli("inspect", URL).stdout


def test_an_output_opens_as_the_local_one_does(hub, output, tmp_path):
    hub.add_folder(OUT, output)
    code = (
        "import gptoss_stream, torch\n"
        f"local = gptoss_stream.open_state_dict({str(output)!r})\n"
        f"remote = gptoss_stream.open_state_dict({URL!r})\n"
        "assert [*remote] == [*local]\n"
        "same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)\n"
        "assert all(same(remote[name], local[name]) for name in local)\n"
        f"remote = gptoss_stream.open_state_dict({URL!r}, to='hf')\n"
        f"local = gptoss_stream.open_state_dict({str(output)!r}, to='hf')\n"
        "assert all(same(remote[name], local[name]) for name in local)\n"
    )
    done = python(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr


def test_an_unfinished_output(hub, cli, convert, released, copy):
    """Of a run that ended, and of one that had sent no shard."""
    hub.faults.append(after(2, Fault("status", 403), PUT))
    assert convert(released, URL).returncode == 2
    hub.faults.clear()
    make_unfinished(copy)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    hub.add_folder("tester/begun", copy)
    for name in (OUT, "tester/begun"):
        for words in (
            ["verify", released, f"hf://{name}"],
            ["verify", "--checksums", f"hf://{name}"],
            ["show", f"hf://{name}", "embed.W_E"],
        ):
            done = cli(*words, "--quiet")
            assert_clean_error(done, 2)
            assert done.stderr.endswith(f": {UNFINISHED}\n")
        assert "unfinished" in cli("inspect", f"hf://{name}").stdout


def test_what_cannot_be_used_is_refused(hub, cli, released, output):
    hub.add_folder(NAME, released)
    hub.add_repo("tester/data", {"README.md": b""})
    for words, said in (
        (["verify", released, "hf://tester/nothing"], "no repository of the Hub that you can see"),
        (["verify", "--checksums", "hf://tester/nothing"], "no repository of the Hub"),
        (["verify", released, "hf://tester/data"], "no .safetensors file in it"),
        (["verify", released, f"hf://{NAME}"], "none of its tensors is one of transformer-lens"),
        (["verify", released, f"{URL}@v9"], "no repository of the Hub that you can see"),
    ):
        done = cli(*words, "--quiet")
        assert_clean_error(done, 2)
        assert said in done.stderr
    hub.add_folder(OUT, output)
    hub.faults.append(after(12, Fault("status", 500), DATA))
    assert_clean_error(cli("verify", released, URL, "--quiet"), 3)
    hub.faults[:] = [after(0, Fault("lose_reply"), OUT)]
    done = cli("verify", released, URL, "--quiet")
    assert_clean_error(done, 3)
    assert "the Hub cannot be reached" in done.stderr
