"""The model card of an output, read by the Hub's own parser."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from memory_location import MemoryLocation
from runs import digests
from shards import edit_json

import gptoss_stream
from gptoss_stream import Adapter

CARD = "README.md"
APACHE = "\n          Apache License\n        Version 2.0, January 2004\n"


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / CARD, ignore_metadata_errors=False)


def metadata_of(folder) -> dict:
    """Return the metadata as PyYAML reads it, after a comparison with what the Hub reads."""
    text = (folder / CARD).read_text()
    found = yaml.safe_load(text.split("---\n")[1])
    assert card_of(folder).data.to_dict() == found
    return found


LOADS = {
    "hf": ("transformers", "AutoModelForCausalLM.from_pretrained"),
    "hf-mxfp4": ("transformers", "AutoModelForCausalLM.from_pretrained"),
    "hf-unfused": ("gptoss_stream", "load_hf_model"),
    "openai": ("gpt-oss", "Transformer.from_checkpoint"),
    "transformer-lens": ("transformer-lens", "load_hooked_transformer"),
}


@pytest.mark.parametrize("to", gptoss_stream.formats.names())
def test_each_format_says_how_it_is_loaded(to, tiny, tmp_path):
    gptoss_stream.convert(tiny, tmp_path / "whole", to=to, checksums=True)
    gptoss_stream.convert(
        tiny, tmp_path / "part", to=to, selection=gptoss_stream.Selection(only=("router",))
    )
    library, call = LOADS[to]
    found = metadata_of(tmp_path / "whole")
    assert found["library_name"] == library
    assert found.get("pipeline_tag") == ("text-generation" if library == "transformers" else None)
    assert ("mxfp4" in found["tags"]) == (to in ("hf-mxfp4", "openai"))
    assert not {"license", "base_model", "base_model_relation"} & found.keys()  # nobody knows them
    text = card_of(tmp_path / "whole").text
    assert call in text
    assert "not a whole model" not in text
    part = card_of(tmp_path / "part")
    assert part.data.library_name == "gptoss_stream"
    assert part.data.pipeline_tag is None
    assert "not a whole model" in part.text
    assert "open_state_dict(folder)" in part.text
    record = json.loads((tmp_path / "whole/gptoss_stream.json").read_text())
    assert CARD in record["files"]
    assert (
        f"{digests(tmp_path / 'whole')[CARD]}  {CARD}"
        in (tmp_path / "whole/SHA256SUMS").read_text().splitlines()
    )


@pytest.mark.parametrize("to", ["hf", "transformer-lens", "hf-unfused"])
def test_the_code_runs(to, tiny, tmp_path):
    """All but what needs a tokenizer, which a random checkpoint has none of."""
    gptoss_stream.convert(tiny, tmp_path / "out", to=to)
    code = card_of(tmp_path / "out").text.split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/folder", str(tmp_path / "out"))
    names: dict = {}
    exec("\n".join(line for line in code.splitlines() if "okenizer =" not in line), names)
    assert sum(1 for _ in names["model"].parameters()) > 10


CARDS = {
    "---\nlicense: mit\nbase_model: openai/gpt-oss-20b\nbase_model_relation: finetune\n---\n"
    "# Mine": {
        "license": "mit",
        "base_model": ["openai/gpt-oss-20b"],
        "base_model_relation": "finetune",
    },
    "---\r\nlicense: other\r\nlicense_name: my license\r\nlicense_link: https://x.org/l\r\n"
    "---\r\n": {
        "license": "other",
        "license_name": "my license",
        "license_link": "https://x.org/l",
    },
    "---\nbase_model: [a/b, 'c d', 3, '../x', 'a/b/c', {}]\n---\n": {"base_model": ["a/b"]},
    "---\nlicense: [apache-2.0]\nbase_model_relation: merge\n---\n": {},
    "---\nlicense: other\nlicense_link: LICENSE\n---\n": {"license": "other"},
    "---\nlicense: &a [*a]\n---\n": {},
    "---\nlicense: !!python/object/apply:os.system ['false']\n---\n": {},
    "---\n" + "[" * 5000 + "\n---\n": {},
    "---\nlicense: 2001-99-99\n---\n": {},
    "# No metadata\n\n---\nlicense: mit\n---\n": {},
    "---\nlicense: mit\n": {},
}


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
def test_what_the_sources_card_says(card, tiny, tmp_path):
    """License and base models are taken from it, and nothing else; it describes the source."""
    (tiny / CARD).write_text(card)
    gptoss_stream.convert(tiny, tmp_path / "out")
    found = metadata_of(tmp_path / "out")
    assert {k: v for k, v in found.items() if k.startswith(("license", "base"))} == CARDS[card]
    assert "# Mine" not in (tmp_path / "out" / CARD).read_text()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("LICENSE", APACHE, "apache-2.0"), ("LICENSE.txt", "MIT License", None)],
)
def test_the_license_file(name, text, expected, tiny, tmp_path):
    (tiny / name).write_text(text)
    gptoss_stream.convert(tiny, tmp_path / "out")
    assert metadata_of(tmp_path / "out").get("license") == expected


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("unsloth/gpt-oss-20b-BF16", True),
        ("outputs/gpt-oss-sft", False),
        ("/home/me/gpt-oss", False),
        ("me/model", False),
        (7, False),
    ],
)
def test_the_configuration_may_name_the_base(name, is_known, tiny, tmp_path):
    edit_json(tiny / "config.json", lambda config: config.update(_name_or_path=name))
    gptoss_stream.convert(tiny, tmp_path / "out")
    assert metadata_of(tmp_path / "out").get("base_model") == ([name] if is_known else None)


def test_unusable_cards_are_ignored(tiny, tmp_path):
    (tiny / CARD).mkdir()
    (tiny / "LICENSE").symlink_to("/etc/passwd")
    gptoss_stream.convert(tiny, tmp_path / "out")
    assert "license" not in metadata_of(tmp_path / "out")


def test_smaller_models_and_mxfp4(checkpoints, tmp_path):
    source = checkpoints(layers=2, format="hf")
    gptoss_stream.convert(
        source, tmp_path / "out", to="hf-mxfp4", keep_layers="1", keep_experts="0,2,3,4"
    )
    card = card_of(tmp_path / "out")
    assert {"mxfp4", "pruned"} <= {*card.data.tags}
    assert "its layers `[1]` and of each the experts `[0, 2, 3, 4]`" in card.text
    assert "by the rule `openai`" in card.text
    assert "`mxfp4_encoding.json` says how much" in card.text


def test_merged_adapters(tiny, tmp_path):
    """The license is that of all parts, or unknown."""
    adapter = gptoss_stream.synth_adapter(tmp_path / "adapter", layers=2)
    (tiny / CARD).write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    options = {"to": "hf", "adapters": [Adapter(adapter, scale=0.25)]}
    gptoss_stream.convert(tiny, tmp_path / "out", **options)
    found = metadata_of(tmp_path / "out")
    assert found["base_model_relation"] == "merge"
    assert {"lora", "merged"} <= {*found["tags"]}
    assert "license" not in found
    assert "| adapter | not on the Hub |  | 0.25 |" in card_of(tmp_path / "out").text
    (adapter / CARD).write_text("---\nlicense: mit\n---\n")
    gptoss_stream.convert(tiny, tmp_path / "out", overwrite=True, **options)
    assert metadata_of(tmp_path / "out")["license"] == "mit"


def test_the_same_bytes_from_anywhere(tiny, tmp_path):
    """No folder of this machine is in it."""
    shutil.copytree(tiny, tmp_path / "elsewhere/copy")
    for source, out in ((tiny, "one"), (tmp_path / "elsewhere/copy", "other")):
        gptoss_stream.convert(source, tmp_path / out)
    card = (tmp_path / "one" / CARD).read_bytes()
    assert card == (tmp_path / "other" / CARD).read_bytes()
    assert str(tmp_path).encode() not in card
    assert b"elsewhere" not in card


def test_a_card_of_the_outputs_users_is_kept(tiny, tmp_path):
    """One that was there before, and one that was edited; also with --overwrite."""
    out = tmp_path / "out"
    out.mkdir()
    (out / CARD).write_text("# Mine")
    gptoss_stream.convert(tiny, out, checksums=True)
    assert (out / CARD).read_text() == "# Mine"
    assert gptoss_stream.verify(tiny, out).equal
    assert gptoss_stream.verify_checksums(out).equal
    gptoss_stream.convert(tiny, out, to="hf", overwrite=True)
    assert (out / CARD).read_text() == "# Mine"
    (out / CARD).unlink()
    assert gptoss_stream.verify(tiny, out).equal
    gptoss_stream.convert(tiny, out, to="hf")  # a file of the run is missing: it is made again
    assert card_of(out).data.library_name == "transformers"
    gptoss_stream.convert(tiny, out, overwrite=True)  # nobody has edited it
    assert card_of(out).data.library_name == "transformer-lens"
    edited = (out / CARD).read_text().replace("gpt-oss", "gpt-oss!", 1)
    (out / CARD).write_text(edited)
    gptoss_stream.convert(tiny, out, to="hf", overwrite=True)
    assert (out / CARD).read_text() == edited


def test_a_card_in_a_remote_location_is_kept(tiny, tmp_path):
    location = MemoryLocation()
    location.files[CARD] = b"# Mine"
    options = {"staging": tmp_path / "staging", "checksums": True}
    gptoss_stream.convert(tiny, location, **options)
    assert location.files[CARD] == b"# Mine"
    assert list((tmp_path / "staging").iterdir()) == []
    gptoss_stream.convert(tiny, location, to="hf", overwrite=True, **options)
    assert location.files[CARD] == b"# Mine"
    digest = location.checksums[CARD]
    assert f"{digest}  {CARD}" in location.files["SHA256SUMS"].decode()
    del location.files[CARD]
    gptoss_stream.convert(tiny, location, to="hf", **options)
    gptoss_stream.convert(tiny, location, overwrite=True, **options)
    assert b"load_hooked_transformer" in location.files[CARD]
