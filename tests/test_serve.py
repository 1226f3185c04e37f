"""`posttrain chat` on tiny real models: what is printed, what the model is given, what stops it.

Run: pytest tests/test_serve.py
"""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

from posttrain.decoding import choose
from posttrain.errors import UserError
from posttrain.reply import TextStream
from posttrain.serve import chat, printable

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE: 4 special tokens, 256 bytes and a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    backend.train_from_iterator(["user system assistant what is the sum of the parts and the whole"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", extra_special_tokens=["<|im_start|>"]
    )


def save(folder, model, tokenizer, template=TEMPLATE, eos=None):
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(tokenizer, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **{**sizes, **changes})
    return LlamaForCausalLM(config)


def scripted(tokenizer, ids, **changes):
    """A Llama that says `ids` after a line break: one-hot embeddings, silent layers, a head token -> next."""
    model = llama(tokenizer, hidden_size=len(tokenizer) + len(tokenizer) % 2, **changes)
    path = [tokenizer("\n").input_ids[-1], *ids]
    assert len(set(path)) == len(path), "each token has one successor"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        model.lm_head.weight.zero_()
        for token, successor in zip(path, path[1:], strict=False):
            model.lm_head.weight[successor, token] = 1.0
    return model


def speaker(folder, tokenizer, text, stop="<|im_end|>", **changes):
    """Folder of a model whose every reply is `text`."""
    ids = [*tokenizer(text, split_special_tokens=True).input_ids, tokenizer.convert_tokens_to_ids(stop)]
    return save(folder, scripted(tokenizer, ids, **changes), tokenizer)


@pytest.fixture(scope="session")
def random_chat(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("models") / "random", llama(tokenizer), tokenizer)


def type_in(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def raw_ids(text):
    """Token ids of /raw output: `[text]id` for the prompt, `[text]id(probability)` for the reply."""
    return [int(token) for token in re.findall(r"\](\d+)", text)]


def render(user, system=None):
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def reference(folder, ids, new_tokens):
    """transformers' own greedy continuation of `ids` and the probability of each of its tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, len(ids) :].tolist()
    return new, [step[0].softmax(-1)[token].item() for step, token in zip(out.logits, new, strict=True)]


def test_greedy_reply_is_generates_token_for_token(random_chat, tokenizer, capsys):
    ids, probs = reference(random_chat, tokenizer(render("what is the sum")).input_ids, 40)
    assert chat(random_chat, prompt="what is the sum", temperature=0, max_new_tokens=40, raw=True) == 0
    out, err = capsys.readouterr()
    assert raw_ids(out) == ids
    assert [float(p) for p in re.findall(r"\]\d+\((\d\.\d\d)\)", out)] == pytest.approx(probs, abs=0.006)
    assert raw_ids(err) == tokenizer(render("what is the sum")).input_ids


def test_one_shot_prints_only_the_reply(tmp_path, tokenizer, capfd):
    folder = speaker(tmp_path / "m", tokenizer, "G\u00e9 \U0001f642!")
    assert chat(folder, prompt="hi", system="be kind") == 0
    assert capfd.readouterr().out == "G\u00e9 \U0001f642!\n"


def test_a_reader_that_leaves_is_no_error(random_chat, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert chat(random_chat, prompt="hi", seed=0) == 0


def test_raw_shows_special_tokens_and_pieces_of_characters(tmp_path, tokenizer, capsys):
    chat(speaker(tmp_path / "m", tokenizer, "a\u00e9"), prompt="hi", raw=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    a, first, second = tokenizer("a\u00e9").input_ids
    out, err = capsys.readouterr()
    assert out == f"[a]{a}(1.00) [\u00c3]{first}(1.00) [\u00a9]{second}(1.00) [<|im_end|>]{end}(1.00) \n"
    assert "[<|im_start|>]" in err and "[\\n]" in err


def test_escapes_from_the_model_are_inert(tmp_path, tokenizer, capsys):
    folder = speaker(tmp_path / "m", tokenizer, "x\x1b]0;\x07\r\x08\u202e\x9b9")
    for raw in (False, True):
        chat(folder, prompt="hi", raw=raw)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", capsys.readouterr().out)
    chat(folder, prompt="hi")
    assert capsys.readouterr().out == "x\\x1b]0;\\x07\\r\\x08\\u202e\\x9b9\n"
    assert printable("a\tb\n\u00e9\U0001f469\u200d\U0001f680") == "a\tb\n\u00e9\U0001f469\u200d\U0001f680"


def test_characters_come_out_whole_and_broken_ones_are_not_lost(tokenizer):
    text = "a\u00e9\u4e2d\U0001f642b"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    half = tokenizer("\U0001f642").input_ids[:2]
    assert stream.add(half[0]) + stream.add(half[1]) == "" and stream.end() == "\ufffd"


def test_base_model_completes_plain_text(tmp_path, tokenizer, capsys, monkeypatch):
    folder = save(tmp_path / "base", llama(tokenizer), tokenizer, template=None)
    ids, _ = reference(folder, tokenizer("the whole").input_ids, 12)
    chat(folder, prompt="the whole", temperature=0, max_new_tokens=12, raw=True)
    assert raw_ids(capsys.readouterr().out) == ids
    with pytest.raises(UserError, match="no chat template"):
        chat(folder, prompt="the whole", system="be kind")
    with pytest.raises(UserError, match="prompt is empty"):
        chat(folder, prompt="")


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "base"])
def test_typed_control_tokens_stay_text(tmp_path, tokenizer, capsys, template):
    folder = save(tmp_path / "m", llama(tokenizer), tokenizer, template=template)
    chat(folder, prompt="a<|im_end|>b", system=template and "<|im_start|>", max_new_tokens=1, raw=True)
    given = raw_ids(capsys.readouterr().err)
    assert given.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == (2 if template else 0)
    assert given.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == (3 if template else 0)
    assert "a<|im_end|>b" in tokenizer.decode(given)


def test_every_end_token_of_the_generation_config_stops(tmp_path, tokenizer, capsys):
    ids = tokenizer("ok").input_ids
    pad, end = tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_end|>"])
    folder = save(tmp_path / "m", scripted(tokenizer, [*ids, pad, end]), tokenizer, eos=[pad, 0])
    chat(folder, prompt="hi")
    out, err = capsys.readouterr()
    assert out == "ok\n" and "cut" not in err


def test_conversation_commands_and_reset(tmp_path, tokenizer, capsys, monkeypatch):
    folder = speaker(tmp_path / "m", tokenizer, "ok")
    type_in(
        monkeypatch, "/raw", "/system be brief", "one", "two", "/reset", "three", "/system", "/nope", "/quit", "no"
    )
    assert chat(folder) == 0
    out, err = capsys.readouterr()
    prompts = [tokenizer.decode(raw_ids(line)) for line in err.splitlines() if line.startswith("[<|im_start|>]")]
    end = "<|im_end|>\n"
    turn_two = f"<|im_start|>user\none{end}<|im_start|>assistant\nok{end}" + render("two")
    assert prompts == [
        render("one", "be brief"),
        f"<|im_start|>system\nbe brief{end}" + turn_two,
        render("three", "be brief"),
    ]
    assert out.count("<|im_end|>") == 3 and "unknown command /nope" in err and "[no system message]" in err


class Interrupting(io.StringIO):
    """Stdout that presses Ctrl-C once, when the reply has reached `after`."""

    encoding = "utf-8"

    def __init__(self, after):
        super().__init__()
        self.after = after

    def write(self, text):
        super().write(text)
        if self.after and self.after in self.getvalue():
            self.after = None
            signal.raise_signal(signal.SIGINT)
        return len(text)


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(tmp_path, tokenizer, capsys, monkeypatch):
    folder = speaker(tmp_path / "m", tokenizer, "abcdefg")
    type_in(monkeypatch, "one", "/raw", "two")
    monkeypatch.setattr(sys, "stdout", Interrupting(after="abc"))
    assert chat(folder) == 0
    err = capsys.readouterr().err
    prompt = tokenizer.decode(raw_ids(err.split("tokens:\n")[-1]))
    assert "stopped" in err and sys.stdout.getvalue().startswith("abc\n")
    assert "one<|im_end|>\n<|im_start|>assistant\nabc<|im_end|>" in prompt
    monkeypatch.setattr(sys, "stdout", Interrupting(after="abc"))
    with pytest.raises(KeyboardInterrupt):
        chat(folder, prompt="hi")


def test_oldest_turns_leave_a_full_context_and_the_system_message_stays(tmp_path, tokenizer, capsys, monkeypatch):
    folder = speaker(tmp_path / "m", tokenizer, "ok", max_position_embeddings=128)
    turns = [f"{number}" * 20 for number in range(5)]
    type_in(monkeypatch, "/raw", *turns, "z" * 200, "5")
    chat(folder, system="be brief")
    err = capsys.readouterr().err
    prompts = [tokenizer.decode(raw_ids(line)) for line in err.splitlines() if line.startswith("[<|im_start|>]")]
    assert len(prompts) == 6 and "turn(s) were dropped" in err and "error: the prompt has" in err
    assert all(p.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n") for p in prompts)
    assert turns[4] in prompts[4] and turns[0] not in prompts[4]
    assert all(len(tokenizer(p).input_ids) <= 128 - 32 for p in prompts)


def test_reply_ends_at_the_context_and_at_max_new_tokens(tmp_path, tokenizer, capsys):
    folder = speaker(tmp_path / "m", tokenizer, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", max_position_embeddings=40)
    chat(folder, prompt="h", max_new_tokens=3)
    assert capsys.readouterr() == ("ABC\n", "[cut at max_new_tokens 3]\n")
    room = 40 - len(tokenizer(render("1234567")).input_ids)
    chat(folder, prompt="1234567")
    assert capsys.readouterr() == (
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:room] + "\n",
        "[cut: the context of 40 tokens is full]\n",
    )


def test_a_seed_repeats_the_reply(random_chat, capsys):
    replies = []
    for seed in (1, 1, 2):
        chat(random_chat, prompt="hi", seed=seed, max_new_tokens=30)
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6), (2.0, 0.9)])
def test_draws_follow_transformers_warped_distribution(temperature, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    warped = TopPLogitsWarper(top_p)(None, logits[None] / temperature)[0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(logits, temperature, top_p, generator) for _ in range(20000)])
    seen = torch.bincount(draws, minlength=12) / len(draws)
    torch.testing.assert_close(seen, warped, atol=0.015, rtol=0)  # over four standard errors
    assert not seen[warped == 0].any()
    assert choose(logits, 1e-30, 1.0, generator) == choose(logits, 0, 1.0, generator) == logits.argmax()


@pytest.fixture
def run_folder(tmp_path, tokenizer):
    """runs/tiny with pretrain and sft, a tokenizer and a reward stage, and a ppo stage that never finished."""
    run = tmp_path / "runs" / "tiny"
    for number, stage in enumerate(("tokenizer", "pretrain", "sft", "reward")):
        folder = run / stage
        folder.mkdir(parents=True)
        if stage == "reward":
            LlamaForSequenceClassification(llama(tokenizer).config).save_pretrained(folder)
        elif stage != "tokenizer":
            save(folder, llama(tokenizer), tokenizer)
        manifest = {"stage": stage, "status": "finished", "created": f"2026-01-01T00:00:0{number}Z", "parents": {}}
        if stage == "reward":
            manifest["parents"] = {"policy": {"path": str(run / "sft"), "stage": "sft"}}
        (folder / "stage.json").write_text(json.dumps(manifest))
    (run / "ppo" / "checkpoints").mkdir(parents=True)
    return run


def test_folders_that_cannot_chat_are_named_with_the_mend(run_folder):
    expected = {
        "": f"is a run. Choose one of {run_folder}/pretrain, {run_folder}/sft",
        "stf": f"no such folder. Choose one of {run_folder}/pretrain, {run_folder}/sft",
        "tokenizer": "a finished 'tokenizer' stage, which leaves no model. Choose one of",
        "reward": f"reward model (LlamaForSequenceClassification): .* try posttrain chat {run_folder}/sft",
        "ppo": "has not finished (checkpoints but no stage.json)",
        "sft/config.json": "is a file",
    }
    for name, message in expected.items():
        pattern = re.escape(message).replace(r"\.\*", ".*")
        with pytest.raises(UserError, match=pattern):
            chat(str(run_folder / name), prompt="hi")


def test_broken_checkpoints_are_errors_that_name_the_folder(run_folder):
    sft = run_folder / "sft"
    (sft / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="sft: no causal language model could be loaded in the folder"):
        chat(str(sft), prompt="hi")
    (sft / "model.safetensors").unlink()
    with pytest.raises(UserError, match="sft: no causal language model could be loaded in the folder"):
        chat(str(sft), prompt="hi")
    save_file({"lm_head.weight": torch.zeros(300, 32)}, sft / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ of the model's weights"):
        chat(str(sft), prompt="hi")


def test_settings_and_names_out_of_range(random_chat, tmp_path, monkeypatch):
    for setting in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(setting))):
            chat(random_chat, prompt="hi", **setting)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="/no/such/folder: no such folder"):
        chat("/no/such/folder", prompt="hi")
    chat(random_chat, prompt="not \udcff UTF-8", max_new_tokens=1)  # as sys.argv spells a stray byte


def test_a_diverged_model_says_so(tmp_path, tokenizer):
    model = llama(tokenizer)
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        chat(save(tmp_path / "m", model, tokenizer), prompt="hi")


def posttrain_chat(*argv, stdin="", **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    # What the console script `posttrain` runs.
    command = [sys.executable, "-c", "import sys; from posttrain.cli import main; sys.exit(main())", "chat", *argv]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)


def test_command_line_one_shot_and_errors(tmp_path, tokenizer):
    folder = speaker(tmp_path / "m", tokenizer, "ok \u00e9")
    done = posttrain_chat(folder, "--prompt", "hi", "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, "ok \u00e9\n"), done.stderr
    done = posttrain_chat(folder, "--prompt", "hi", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "ok \\xe9\n"), done.stderr
    done = posttrain_chat("nobody/no-such-model", "--prompt", "hi")
    assert done.returncode == 2 and done.stdout == ""
    assert "no folder of that name is here" in done.stderr and "Traceback" not in done.stderr


def test_command_line_conversation_over_a_pipe(tmp_path, tokenizer):
    done = posttrain_chat(speaker(tmp_path / "m", tokenizer, "ok"), stdin="hi\n/help\nthere\n")
    assert (done.returncode, done.stdout) == (0, "ok\nok\n"), done.stderr
    assert "/reset" in done.stderr
