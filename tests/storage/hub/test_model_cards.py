"""The model cards of outputs of, and on, the Hub."""

from __future__ import annotations

from hub_cases import NAME, OUT
from huggingface_hub import ModelCard

CARD = "README.md"


def text_of(hub, name: str = OUT) -> str:
    content = hub.files(name)[CARD]
    return bytes(content.read(0, content.nbytes)).decode()


def card_of(hub, name: str = OUT) -> ModelCard:
    return ModelCard(text_of(hub, name))


def test_the_source_is_the_base_model(hub, convert, released, tmp_path):
    """OpenAI's repositories have one license; others have the one that their card names."""
    commit = hub.add_folder(NAME, released)
    assert convert(NAME, f"hf://{OUT}", "--to", "hf").returncode == 0
    card = card_of(hub)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", [NAME])
    assert f"| source | [{NAME}](https://huggingface.co/{NAME}) | {commit} |" in card.text
    # A conversion of this output is made of it, whatever its card says.
    assert convert(OUT, "out", "--to", "hf-mxfp4", "--reference", NAME).returncode == 0
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", [OUT])
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert f"| reference | [{NAME}](https://huggingface.co/{NAME}) | {commit} |" in card.text
    # A local copy of it is made of the same.
    assert convert("out", "copy", "--to", "hf").returncode == 0
    assert ModelCard.load(tmp_path / "copy" / CARD).data.base_model == [OUT]


def test_a_folder_of_a_repository(hub, convert, released, tmp_path):
    hub.add_folder(NAME, released)
    assert convert(NAME, "out", "--subfolder", "original").returncode == 0
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", [NAME])
    assert "folder `original`" in card.text


def test_a_repositorys_own_card_is_kept(hub, convert, released):
    """The Hub's page for new repositories makes one with the license."""
    hub.add_repo(OUT, {CARD: b"# Mine"})
    assert convert(released, f"hf://{OUT}", "--checksums").returncode == 0
    assert text_of(hub) == "# Mine"
    assert convert(released, f"hf://{OUT}", "--to", "hf", "--overwrite").returncode == 0
    assert text_of(hub) == "# Mine"


def test_a_card_that_is_no_text_is_kept(hub, convert, released):
    """It is not sent again: the client would refuse it."""
    card = "# Mine".encode("utf-16")
    hub.add_repo(OUT, {CARD: card})
    done = convert(released, f"hf://{OUT}", "--checksums")
    assert done.returncode == 0, done.stderr
    content = hub.files(OUT)[CARD]
    assert bytes(content.read(0, content.nbytes)) == card


def test_an_unedited_card_is_replaced(hub, convert, released):
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert card_of(hub).data.library_name == "transformer-lens"
    assert convert(released, f"hf://{OUT}", "--to", "hf", "--overwrite").returncode == 0
    assert card_of(hub).data.library_name == "transformers"
