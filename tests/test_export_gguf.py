"""GGUF files of every shape, computed by llama.cpp beside transformers; planted faults; what is refused.

Run: pytest tests/test_export_gguf.py
"""

import json
import re
from copy import deepcopy

import export_helpers as helpers
import gguf
import pytest
import torch
from recipe_runs import ROOT, posttrain
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig

from posttrain import check_export, cli, export, gguf_tokenizer, gguf_weights
from posttrain.chat import set_template
from posttrain.errors import UserError
from posttrain.gguf_engine import LlamaCpp


@pytest.mark.parametrize("shape", helpers.SHAPES)
def test_llama_cpp_computes_what_transformers_does(shape, tokenizer, tmp_path):
    model = helpers.new(shape, tokenizer, rows=len(tokenizer) + 7)
    found, remarks = helpers.check(tmp_path, model, tokenizer)
    assert found.verdict == "agrees" and found.faults == [] and remarks == []
    assert found.same == found.positions == 6 * 8 and found.dtype == "F32"
    # gpt2's GELU is a table of half precision in llama.cpp.
    assert 0 < found.largest < (0.05 if shape == "gpt2" else 0.001)


@pytest.mark.parametrize(("dtype", "bits"), [("f16", 16), ("bf16", 16), ("q8_0", 8.5)])
def test_narrow_dtypes_are_as_small_as_they_say_and_near(dtype, bits, tokenizer, tmp_path):
    model = helpers.new("llama", tokenizer)
    found, _ = helpers.check(tmp_path, model, tokenizer, dtype)
    assert found.dtype == dtype.upper() and found.faults == [] and found.mean > 1e-5
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "t.gguf").tensors}
    matrix = tensors["blk.0.ffn_up.weight"]
    assert 8 * matrix.n_bytes / matrix.n_elements == bits
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_matrices_whose_rows_have_no_blocks_of_32_stay_f16_and_it_is_said(tokenizer, tmp_path):
    config = LlamaConfig(**{**helpers.GROUPED, "intermediate_size": 90}, vocab_size=len(tokenizer))
    model = type(helpers.new("llama", tokenizer))(config).eval()
    _, remarks = helpers.check(tmp_path, model, tokenizer, "q8_0", tokens=1)
    assert remarks == ["2 matrices have rows that are no multiple of 32 and stay f16: blk.0.ffn_down.weight, ..."]


# ---- planted faults -------------------------------------------------------------------------------------------------


def test_rotary_rows_in_another_order_are_found(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_weights, "rotary_order", lambda rows, heads: rows)
    found, _ = helpers.check(tmp_path, helpers.new("llama", tokenizer), tokenizer, "q8_0")
    assert found.verdict == "differs" and found.mean > 1 and found.faults[0].startswith("prompt 1, token ")
    assert "Hugging Face takes " in found.faults[0] and " behind)" in found.faults[0]


def test_another_end_token_is_found(tokenizer, tmp_path):
    written = deepcopy(tokenizer)
    written.eos_token = "<|im_start|>"
    found, _ = helpers.check(tmp_path, helpers.new("llama", tokenizer), tokenizer, written=written, tokens=1)
    assert found.faults == ["tokenizer.ggml.eos_token_id is '<|im_start|>' (2), which ends no reply of this model"]


def test_an_end_token_that_the_file_does_not_name_is_found(tokenizer, tmp_path, monkeypatch):
    """`<|im_end|>` and others llama.cpp knows by their names: one that it does not know."""
    ours, named = deepcopy(tokenizer), "<|im_sep|>"
    model = helpers.new("llama", ours)
    model.generation_config.eos_token_id = ours.convert_tokens_to_ids(named)
    real = gguf_tokenizer.add_tokenizer
    monkeypatch.setattr(gguf_tokenizer, "add_tokenizer", lambda w, t, v, stops: real(w, t, v, (t.eos_token_id,)))
    found, _ = helpers.check(tmp_path, model, ours, tokens=1)
    assert found.faults == [
        f"{named!r} (3) ends a reply, but not in llama.cpp: the file's eos or eot token is another one"
    ]


def test_another_template_is_found(tokenizer, tmp_path):
    written = deepcopy(tokenizer)
    written.chat_template = tokenizer.chat_template.replace("'<|im_sep|>'", "'\\n'")
    found, _ = helpers.check(tmp_path, helpers.new("llama", tokenizer), tokenizer, written=written, tokens=1)
    assert len(found.faults) == 6
    assert found.faults[0] == "prompt 1 as tokens: token 5 is '<|im_sep|>' (3), in llama.cpp '\\n' (203)"


def test_a_begin_token_too_many_is_found(base_tokenizer, tmp_path, monkeypatch):
    model = helpers.new("llama", base_tokenizer)
    assert helpers.check(tmp_path / "right", model, base_tokenizer, tokens=1)[0].faults == []
    monkeypatch.setattr(gguf_tokenizer, "adds_bos", lambda tokenizer: False)
    found, _ = helpers.check(tmp_path / "wrong", model, base_tokenizer, tokens=1)
    assert "in llama.cpp" in found.faults[0] and "token 1 is '<|endoftext|>' (0)" in found.faults[0]


def test_a_file_that_is_not_the_model_gets_no_name(tokenizer, tmp_path, monkeypatch):
    helpers.save(tmp_path, helpers.new("llama", tokenizer), tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_text("of an export before")
    monkeypatch.setattr(gguf_weights, "rotary_order", lambda rows, heads: rows)
    with pytest.raises(UserError, match="is not the model, and keeps that name: prompt 1, token"):
        export.gguf(tmp_path, "test", out, "f32")
    assert [path.name for path in out.iterdir()] == ["model.unchecked.gguf"]


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_export_and_check_export_from_the_command_line(tokenizer, tmp_path, capsys):
    folder = helpers.save(tmp_path / "model", helpers.new("llama", tokenizer), tokenizer)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/base\n---\nA model.\n")
    assert cli.command(["export", str(folder), "--format", "gguf", "--dtype", "f32"]) == 0
    out = folder / "export" / "f32"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "check.json", "model.gguf"]
    said = capsys.readouterr().out
    assert "48 of 48" not in said and f"ollama create model -f {out / 'Modelfile'}" in said
    figures = json.loads((out / "check.json").read_text())
    assert figures["verdict"] == "agrees" and figures["largest_difference"] < 0.001
    fields = gguf.GGUFReader(out / "model.gguf").fields
    named = {key: fields[key].contents() for key in ("general.license", "general.base_model.0.name", "general.name")}
    assert list(named.values()) == ["apache-2.0", "someone/base", "model"]
    template = fields["tokenizer.chat_template"].contents()
    assert "{#- generation -#}" in template and not re.search(r"\{%-?\s*(end)?generation", template)

    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "Hello"}\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
                    '"content": "b"}]}\n')  # fmt: skip
    options = [
        "--engines",
        "gguf",
        "--prompts",
        str(rows),
        "--max_new_tokens",
        "3",
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert cli.command(["check-export", str(folder), str(out / "model.gguf"), *options]) == 0
    assert json.loads((tmp_path / "c.json").read_text())[0]["positions"] == 6

    other = helpers.new("llama", tokenizer)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(-1)
    helpers.save(folder, other, tokenizer)
    assert cli.command(["check-export", str(folder), str(out / "model.gguf"), "--engines", "gguf"]) == 1
    assert "gguf: prompt 1, token" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_agrees_too(tokenizer, tmp_path):
    folder = helpers.save(tmp_path, helpers.new("llama", tokenizer), tokenizer)
    done = posttrain("check-export", folder, "--engines", "hf", "vllm", "--max_new_tokens", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout.splitlines()[-1].split()
    assert (
        line[0] == "vllm" and line[2:5] == ["24", "of", "24"] and 0 < float(line[6]) < 0.001 and line[-1] == "agrees"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--engines", "gguf"], "gguf needs a file"),
        (["--engines", "hf"], "nothing to compare with Hugging Face"),
        (["no.gguf", "--engines", "gguf"], "no.gguf: no such file"),
        (["x.gguf", "--prompts", "rows.jsonl"], "rows.jsonl, line 2: expected messages"),
        (["x.gguf", "--max_new_tokens", "0"], "--max_new_tokens: found 0"),
    ],
)
def test_what_check_export_cannot_do(argv, words, tokenizer, tmp_path, monkeypatch):
    helpers.save(tmp_path, helpers.new("llama", tokenizer), tokenizer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=words):
        cli.command(["check-export", ".", *argv])


def test_a_file_that_llama_cpp_cannot_load(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match=r"x.gguf: llama.cpp could not load it \(exit code \d+\): .*"):
        LlamaCpp(tmp_path / "x.gguf", 64)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_architectures_that_llama_cpp_would_compute_otherwise():
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    neox.config.architectures = ["GPTNeoXForCausalLM"]
    with pytest.raises(
        UserError, match="GPTNeoXForCausalLM: no GGUF is written for this architecture, only for Llama"
    ):
        gguf_weights.architecture(neox.config)
    llama = {"architectures": ["LlamaForCausalLM"], **helpers.GROUPED}
    for keys, words in (
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ):
        with pytest.raises(UserError, match=words):
            gguf_weights.architecture(LlamaConfig(**llama, **keys))
    yarn = LlamaConfig(**llama, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UserError, match="rope_type is 'yarn'; a GGUF is written for default, linear and llama3"):
        gguf_weights.add_shape(gguf.GGUFWriter(None, "llama"), yarn)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "holds NaN"), (1e5, "take --dtype bf16 or f32")])
def test_weights_that_fit_no_file(value, words, tokenizer, tmp_path):
    model = helpers.new("llama", tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    helpers.save(tmp_path, model, tokenizer)
    with pytest.raises(UserError, match=f"model.layers.0.mlp.up_proj.weight: .*{words}"):
        export.write(tmp_path, "test", tmp_path / "t.gguf", "f16", model, tokenizer)


def test_rotary_factors_are_those_of_transformers():
    """transformers divides its inverse frequencies by them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**helpers.GROUPED, rope_parameters=helpers.LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(gguf_weights.llama3_factors(config)), scaled, rtol=1e-6, atol=0)
    assert gguf_weights.llama3_factors(LlamaConfig(**helpers.GROUPED)) is None


def test_a_template_swapped_to_another_vocabulary(base_tokenizer, tmp_path):
    """llama3.jinja on the tiny tokenizer: new control tokens, a begin token in the template, trimmed contents."""
    ours = deepcopy(base_tokenizer)
    model = helpers.new("llama", ours)
    set_template(ours, model, str(ROOT / "chat_templates" / "llama3.jinja"))
    helpers.save(tmp_path, model, ours)
    said = export.gguf(tmp_path, "test", tmp_path / "out", "f32")
    assert "cuts white space around contents (system, user, assistant)" in said
    reference = check_export.Reference(deepcopy(model), ours, None, 1)
    assert reference.prompts[0][0] == ours.bos_token_id != reference.prompts[0][1]
