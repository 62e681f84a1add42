"""All known invalid inputs: `convert` reports one line, exits with code 2, and writes no output.

Each row has a damage to a checkpoint and what the line must contain: the invalid file, the tensor
if it is about one, and words of the reason.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from damages import (
    BLOCKS,
    CONFIG,
    HEAD,
    INDEX,
    LAST,
    NORM,
    SCALES,
    SHARD,
    both,
    config,
    cut_header,
    entry,
    gone,
    header,
    header_text,
    index,
    length,
    link,
    listen,
    mapped,
    only,
    poke,
    renamed,
    replaced,
    scale,
    shard,
    tensor,
    text,
    without,
    yarn,
)
from runs import assert_clean_error, digests, run_in_process

U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
DEEP = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"

# fmt: off
SHARDS = {
    "a shard missing": (gone(SHARD), INDEX, SHARD, "1 of its 4 shards do not exist"),
    "several shards missing": (gone(SHARD, LAST), INDEX, f"{SHARD}, {LAST}", "2 of its 4"),
    "no shard at all": (both(gone(INDEX), lambda f: [x.unlink() for x in f.glob("*.safetensors")]),
                        "no .safetensors file"),
    "a shard of no bytes": (shard(lambda d: b""), SHARD, "0 bytes are too few"),
    "a shard of one byte": (shard(lambda d: d[:1]), SHARD, "1 bytes are too few"),
    "a shard of seven bytes": (shard(lambda d: d[:7]), SHARD, "7 bytes are too few"),
    "only the length field": (shard(lambda d: d[:8]), SHARD, "truncated: a header of"),
    "cut in its header": (cut_header(0.5), SHARD, "truncated: a header of"),
    "cut after its header": (cut_header(1), SHARD, "truncated: 0 bytes of tensor data"),
    "a byte short": (shard(lambda d: d[:-1]), SHARD, "1 are missing"),
    "a page short": (shard(lambda d: d[:-4096]), SHARD, "4096 are missing"),
    "half of the shard": (shard(lambda d: d[: len(d) // 2]), SHARD, "truncated", "are missing"),
    "a byte too long": (shard(lambda d: d + b"\0"), SHARD, "1 bytes follow the last tensor"),
    "a page too long": (shard(lambda d: d + bytes(4096)), SHARD, "4096 bytes follow"),
    "only zeros": (shard(lambda d: bytes(len(d))), SHARD, "not JSON"),
    "a header longer than the file": (length(10_000_000), SHARD, "a header of 10000000 bytes"),
    "a header above the limit": (length(100_000_001), SHARD, "100000001"),
    "a header of 2^63 bytes": (length(2**63), SHARD, str(2**63)),
    "a header of 2^64 - 1 bytes": (length(2**64 - 1), SHARD, str(2**64 - 1)),
    "an LFS pointer": (shard(lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
                       SHARD, "git lfs pull"),
    "an HTML page": (shard(lambda d: b"<!DOCTYPE html><html>404</html>"), SHARD, "HTML"),
    "an XML error": (shard(lambda d: b"<?xml version='1.0'?><Error/>"), SHARD, "XML"),
    "a JSON error": (shard(lambda d: b'{"error": "Invalid token"}'), SHARD, "JSON text"),
    "a zip archive": (shard(lambda d: b"PK\3\4\x14\0\0\0\x08\0" + bytes(99)), SHARD, "zip archive"),
    "a GGUF file": (shard(lambda d: b"GGUF\3\0\0\0\xff" + bytes(99)), SHARD, "GGUF"),
    "an HDF5 file": (shard(lambda d: b"\x89HDF\r\n\x1a\n" + bytes(99)), SHARD, "HDF5"),
    "a pipe": (replaced(SHARD, os.mkfifo), SHARD, "not a regular file"),
    "a folder": (replaced(SHARD, Path.mkdir), SHARD, "not a regular file"),
    "a socket": (replaced(SHARD, listen), SHARD),
    "a link to a device": (replaced(SHARD, link("/dev/zero")), SHARD, "leads out of the folder"),
    "a link out of the folder": (replaced(SHARD, link("../elsewhere.safetensors")),
                                 SHARD, "a link that leads"),
    "a link to nowhere": (replaced(SHARD, link("nowhere")), SHARD),
    "a link to itself": (replaced(SHARD, link(SHARD)), SHARD),
}

# One row for each class of damage; the parser's own table is in `test_safetensors_header`.
HEADERS = {
    "not UTF-8": (header_text(lambda t: t.decode().encode("utf-16")), SHARD, "not UTF-8"),
    "not JSON": (header_text(lambda t: t.replace(b":", b"=", 1)), SHARD, "not JSON"),
    "nested too deeply": (header_text(lambda t: DEEP), SHARD, "nested too deeply"),
    "a number of 5,000 digits": (header_text(lambda t: b'{"a":' + b"9" * 5000 + b"}"), SHARD),
    "an array": (header_text(lambda t: b"[]"), SHARD, "not a JSON object"),
    "a name twice": (header_text(lambda t: t.replace(b"q_proj", b"k_proj")), SHARD, "twice"),
    "a name that cannot be printed": (header(lambda h: h.update({"a\x1b[2J": U8})), SHARD),
    "a name of a megabyte": (header(lambda h: h.update({"a" * 10**6: {}})), SHARD, "aaaa"),
    "a field missing": (header(lambda h: h[NORM].pop("dtype")), SHARD, NORM, "exactly"),
    "an unknown field": (entry(NORM, offset=0), SHARD, NORM, "exactly"),
    "invalid metadata": (header(lambda h: h.update(__metadata__={"a": 1})), SHARD),
    "an unknown dtype": (entry(NORM, dtype="BF17"), SHARD, NORM, "'BF17'"),
    "a negative size": (entry(NORM, shape=[-96]), SHARD, NORM, "non-negative"),
    "a size too large": (entry(NORM, shape=[2**62, 4]), SHARD, NORM, "overflows"),
    "a size that the data does not have": (entry(NORM, shape=[95]), SHARD, NORM, "takes 190 bytes"),
    "offsets backwards": (entry(NORM, data_offsets=[192, 0]), SHARD, NORM, "backwards"),
    "an offset that is not an integer": (entry(NORM, data_offsets=[0.0, 192]), SHARD, NORM),
    "bytes of no tensor": (header(lambda h: h.pop(NORM)), SHARD, "hole"),
    "overlapping tensors": (header(lambda h: h.update(a=U8)), SHARD, "overlaps"),
}

INDEXES = {
    "not JSON": (text(INDEX, b"x"), INDEX, "not JSON"),
    "an empty file": (text(INDEX, b""), INDEX, "not JSON"),
    "nested too deeply": (text(INDEX, DEEP), INDEX, "nested too deeply"),
    "UTF-16": (text(INDEX, '{"weight_map": {}}'.encode("utf-16")), INDEX, "not UTF-8"),
    "a byte order mark": (text(INDEX, b"\xef\xbb\xbf{}"), INDEX, "byte order mark"),
    "NaN": (text(INDEX, b'{"metadata": NaN}'), INDEX, "NaN"),
    "an array": (text(INDEX, b"[]"), INDEX, "weight_map"),
    "no weight_map": (index(lambda i: i.pop("weight_map")), INDEX, "weight_map"),
    "an array for a weight_map": (index(lambda i: i.update(weight_map=[1])), INDEX, "weight_map"),
    "an empty weight_map": (index(lambda i: i["weight_map"].clear()), INDEX, "weight_map"),
    "a number for a shard": (mapped(NORM, 3), INDEX, NORM, "'3'"),
    "an array for a shard": (mapped(NORM, [SHARD]), INDEX, NORM),
    "an absolute path": (mapped(NORM, "/etc/x.safetensors"), INDEX, NORM, "/etc/x.safetensors"),
    "a path to the parent folder": (mapped(NORM, f"../{SHARD}"), INDEX, NORM, f"../{SHARD}"),
    "a path into a folder": (mapped(NORM, f"a/{SHARD}"), INDEX, NORM, f"a/{SHARD}"),
    "a path with a backslash": (mapped(NORM, f"..\\{SHARD}"), INDEX, NORM),
    "a name with a Cyrillic letter": (mapped(NORM, SHARD.replace("o", "о")), INDEX, NORM),
    "a name of 300 letters": (mapped(NORM, "a" * 300 + ".safetensors"), INDEX, NORM),
    "another kind of file": (mapped(NORM, "pytorch_model.bin"), INDEX, NORM, "pytorch_model.bin"),
    "an empty name": (mapped(NORM, ""), INDEX, NORM),
    "a shard that is not there": (mapped(NORM, "x.safetensors"), INDEX, "x.safetensors"),
    "a tensor in another shard": (mapped(NORM, LAST), INDEX, NORM, LAST, SHARD),
    "a tensor in no shard": (mapped("model.extra", SHARD),
                             INDEX, "model.extra", "none of the shards"),
    "a tensor that is not in the index": (index(lambda i: i["weight_map"].pop(NORM)),
                                           INDEX, NORM, SHARD),
    "a tensor in two shards": (lambda f: shutil.copy(f / SHARD, f / LAST) and None,
                               LAST, SHARD, "too"),
    "a pipe for an index": (replaced(INDEX, os.mkfifo), INDEX, "not a regular file"),
    "a folder for an index": (replaced(INDEX, Path.mkdir), INDEX, "not a regular file"),
    "no index and a copy of a shard": (
        both(gone(INDEX), lambda f: shutil.copy(f / SHARD, f / "copy.safetensors")),
        SHARD, "copy.safetensors", "too"),
}

CONFIGS = {
    "missing": (gone(CONFIG), CONFIG, "missing"),
    "an empty file": (text(CONFIG, b""), CONFIG, "not JSON"),
    "truncated": (text(CONFIG, b'{"model_type": "gpt_o'), CONFIG, "not JSON"),
    "an array": (text(CONFIG, b"[]"), CONFIG, "not a JSON object"),
    "not UTF-8": (text(CONFIG, b'{"a": "\xff"}'), CONFIG, "not UTF-8"),
    "NaN": (text(CONFIG, b'{"a": NaN}'), CONFIG, "NaN"),
    "an infinite number": (text(CONFIG, b'{"a": 1e999}'), CONFIG, "too large a number"),
    "nested too deeply": (text(CONFIG, DEEP), CONFIG, "nested too deeply"),
    "a key twice": (text(CONFIG, b'{"a": 1, "a": 2}'), CONFIG, "'a'", "twice"),
    "a file of a megabyte": (text(CONFIG, b"{}" + b" " * 10**6), CONFIG, "1000000"),
    "a pipe": (replaced(CONFIG, os.mkfifo), CONFIG, "not a regular file"),
    "a folder": (replaced(CONFIG, Path.mkdir), CONFIG, "not a regular file"),
    "another model": (config(model_type="llama", quantization_config=...), CONFIG, "'llama'"),
    "no model type": (config(model_type=...), CONFIG, "model type"),
    "another quantisation": (config(quantization_config={"quant_method": "gptq"}), CONFIG, "gptq"),
    "an array for a quantisation": (config(quantization_config=[]), CONFIG, "quantization_"),
    "no layers": (config(num_hidden_layers=0), CONFIG, "num_layers is 0"),
    "a billion layers": (config(num_hidden_layers=10**9, layer_types=...), CONFIG, "1000000000"),
    "10^12 experts": (config(num_local_experts=10**12), CONFIG, "num_experts is 1000000000000"),
    "65,536 experts": (config(num_local_experts=65_536), CONFIG),
    "an integer of 400 digits": (config(vocab_size=10**400), CONFIG, "vocab_size"),
    "a negative size": (config(hidden_size=-96), CONFIG, "hidden_size is -96"),
    "a float": (config(vocab_size=1009.0), CONFIG, "vocab_size is '1009.0'"),
    "true": (config(num_local_experts=True), CONFIG, "num_local_experts is 'True'"),
    "a string": (config(head_dim="32"), CONFIG, "head_dim is '32'"),
    "null": (config(head_dim=None), CONFIG, "head_dim is null"),
    "absent": (config(intermediate_size=...), CONFIG, "intermediate_size is missing"),
    "heads that do not divide": (config(num_key_value_heads=3), CONFIG, "cannot share 3"),
    "too many experts per token": (config(num_experts_per_tok=6, experts_per_token=...), CONFIG,
                                   "6 experts per token"),
    "layer_types too short": (config(layer_types=["full_attention"]), CONFIG, "1 layer_types"),
    "layer_types of other types": (config(layer_types=[["x"], {}]), CONFIG, "layer_types must"),
    "no window for a sliding layer": (config(sliding_window=None), CONFIG, "sliding_window"),
    "a sliding window of 0": (config(sliding_window=0), CONFIG, "sliding_window"),
    "a negative context length": (config(max_position_embeddings=-1), CONFIG, "max_position"),
    "another clamp": (config(swiglu_limit=5.0), CONFIG, "swiglu_limit is 5.0"),
    "another activation": (config(hidden_act="gelu"), CONFIG, "hidden_act is gelu"),
    "an epsilon of 400 digits": (config(rms_norm_eps=10**400), CONFIG, "rms_norm_eps is"),
    "a negative epsilon": (config(rms_norm_eps=-1e-5), CONFIG, "rms_norm_eps"),
    "a rotary base of 0": (config(rope_theta=0), CONFIG, "rope_theta"),
    "1 for a bias": (config(attention_bias=1), CONFIG, "attention_bias is neither"),
    "another rotary embedding": (yarn(rope_type="linear"), CONFIG, "'linear'"),
    "a string for rotary settings": (config(rope_scaling="yarn"), CONFIG, "not an object"),
    "YaRN without its factor": (yarn(factor=...), CONFIG, "factor is missing"),
    "YaRN with a string for a number": (yarn(beta_fast="abc"), CONFIG, "beta_fast is 'abc'"),
}

TENSORS = {
    "a layer missing": (without(".layers.1."), "layer 1 missing that config.json calls for"),
    "one layer too many": (config(num_hidden_layers=1, layer_types=["full_attention"]),
                         CONFIG, "model.layers.1."),
    "a gap in the layers": (renamed(lambda n: n.replace("layers.1.", "layers.2.")),
                         "model.layers.2.", "layer"),
    "a tensor missing": (without(HEAD), f"'{HEAD}'"),
    "a bias missing": (without("0.self_attn.q_proj.bias"), "layers.0.self_attn.q_proj.bias'"),
    "blocks without scales": (without(SCALES), f"'{SCALES}'", "missing"),
    "scales without blocks": (without(BLOCKS), f"'{BLOCKS}'", "missing"),
    "MXFP4 experts and dense ones": (tensor(GATE_UP, "BF16", 5, 96, 128), f"'{GATE_UP}'"),
    "dense experts in one layer": (both(without(GATE_UP + "_blocks", GATE_UP + "_scales"),
                                        tensor(GATE_UP, "BF16", 5, 96, 128)), f"{GATE_UP}_blocks"),
    "another shape": (tensor(NORM, "BF16", 95), LAST, NORM, "BF16 [95]", "[96]"),
    "another rank": (tensor(NORM, "BF16", 96, 1), LAST, NORM, "[96, 1]"),
    "another dtype": (tensor(NORM, "F64", 96), LAST, NORM, "F64 [96]"),
    "transposed": (tensor(HEAD, "BF16", 96, 1009), LAST, HEAD, "[96, 1009]"),
    "a router for four experts": (tensor("model.layers.0.mlp.router.weight", "BF16", 4, 96),
                                  LAST, "'model.layers.0.mlp.router.weight'", "[4, 96]"),
    "four experts in one layer": (tensor(BLOCKS, "U8", 4, 96, 2, 16), LAST, BLOCKS, "[4, 96"),
    "blocks of 15 bytes": (tensor(BLOCKS, "U8", 5, 96, 2, 15), LAST, BLOCKS, "[5, 96, 2, 15]"),
    "signed blocks": (tensor(BLOCKS, "I8", 5, 96, 2, 16), LAST, BLOCKS, "I8"),
    "scales as floats": (tensor(SCALES, "F32", 5, 96, 2), LAST, SCALES, "F32"),
    "one scale for two rows": (tensor(SCALES, "U8", 5, 48, 2), LAST, SCALES, "[5, 48, 2]"),
    "a vocabulary of another size": (config(vocab_size=1008), CONFIG, "[1009, 96]", "[1008, 96]"),
    "rows of incomplete blocks": (config(hidden_size=100), CONFIG),
}

FOLDERS = {
    "no such folder": (lambda f: f / "nowhere", "nowhere: there is no such folder"),
    "a name with a line break": (lambda f: f / "no\nwhere", "no where: there is no such folder"),
    "a file": (lambda f: f / CONFIG, "not a folder"),
    "an empty folder": (only({}), CONFIG, "missing"),
    "the home of an unknown user": (lambda f: Path("~nobody-of-that-name/x"),
                                    "~nobody-of-that-name/x"),
    "OpenAI's files for Metal": (only({"model.bin": b"GPT-OSS v1.0\0"}), "the folder above"),
    "unfused experts": (both(config(quantization_config=...),
                             renamed(lambda n: n.replace("proj_blocks", "projs.0.weight"))),
                        "is one of hf-unfused, beside those of"),
    "a PyTorch checkpoint": (only({CONFIG: b"{}", "pytorch_model.bin": b"PK\3\4"}),
                                  "no .safetensors file"),
}

# Found in the data, after writing has begun.
VALUES = {
    "a scale that is NaN": (scale(255), f"{SHARD}: ", SCALES, "scale 255"),
    "a scale too large": (scale(254), "'blocks.1.mlp.experts.2.W_out.weight'", "exceed BF16"),
}
FLOAT16 = {
    "a scale beyond float16": (scale(141), "'blocks.1.mlp.experts.2.W_out.weight'", "exceed F16"),
    "a weight beyond float16": (poke(O_PROJ, 778, b"\x88\x47"), "'blocks.1.attn.W_O'",
                                "1 values are too large"),
}

OUTPUTS = {
    "a file": (lambda o: o.write_bytes(b""), 2, "a file, not a folder"),
    "a folder in a file": (lambda o: (o.write_bytes(b""), o / "x")[1], 3, "Not a directory"),
    "a name that is too long": (lambda o: o / ("x" * 300), 3, "File name too long"),
    "a loop of links": (lambda o: o.symlink_to(o), 2, "which does not exist or cannot be accessed"),
    "a link to nothing": (lambda o: o.symlink_to("x"), 2, "out: a link to x, which does not exist"),
    "a folder in /proc": (lambda o: Path("/proc/x"), 3, "/proc/x"),
}
# fmt: on

TABLES = {
    "shard": SHARDS,
    "header": HEADERS,
    "index": INDEXES,
    "config": CONFIGS,
    "tensor": TENSORS,
    "folder": FOLDERS,
    "value": VALUES,
    "float16": FLOAT16,
}
ROWS = {
    f"{table}: {name}": (row[0], row[1:], ("--dtype", "float16") if rows is FLOAT16 else ())
    for table, rows in TABLES.items()
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_refused_in_one_line(name, several, tmp_path):
    """The line says which file, which tensor and what is wrong. Nothing is written and the command
    does not hang."""
    damage, words, options = ROWS[name]
    source, output = damage(several) or several, tmp_path / "out"
    before = digests(several)
    done = run_in_process("convert", source, output, *options)
    assert_clean_error(done, 2)
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert len(done.stderr) < 1500
    assert digests(several) == before
    if name.startswith(("value", "float16")):
        assert not {"gptoss_stream.json", INDEX} & {file.name for file in output.iterdir()}
        assert not list(output.rglob("*.safetensors*"))
    else:
        assert not output.exists()


@pytest.mark.parametrize(("create", "code", "words"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_that_cannot_be_created_is_refused_in_one_line(
    create, code, words, several, tmp_path
):
    output = tmp_path / "out"
    created = create(output)
    done = run_in_process("convert", several, created if isinstance(created, Path) else output)
    assert_clean_error(done, code)
    assert words in done.stderr
