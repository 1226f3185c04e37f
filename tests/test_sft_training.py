"""SFT as users run it: what each setting does, held-out loss, replies while training, Liger, NEFTune, no packing.

Run: pytest tests/test_sft_training.py
"""

import math
from copy import deepcopy

import pytest
import torch
from conftest import new_llama
from recipe_runs import ROOT, argv, call, log, manifest, refused, run
from test_sft_encoding import ROWS, logged, sft

from posttrain import chat, sft_eval
from posttrain.errors import UserError
from posttrain.liger import liger_obstacle
from posttrain.rl.rollout import HFEngine, Sampling
from posttrain.sft import SFTConfig
from posttrain.sft_rows import encode_rows, pack_rows


def reference(model, encoded):
    """(mean loss over supervised tokens, gradient norm) of conversations run one by one by transformers."""
    total, count = 0.0, 0
    for row in encoded:
        labels = torch.tensor([row["labels"]])
        number = (labels[:, 1:] != -100).sum().item()
        total, count = total + model(torch.tensor([row["input_ids"]]), labels=labels).loss * number, count + number
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    return (total / count).item(), norm


@pytest.mark.usefixtures("restored_signals")
def test_conversations_of_1_to_900_tokens_give_one_gradient_however_they_are_batched(tokenizer, tmp_path):
    """Packed or padded, 4 x 1 or 1 x 4: the loss is the mean over supervised tokens of all."""
    reply = "seven "
    lengths = [1, 3, 40, 900 // len(tokenizer(reply)["input_ids"])]
    rows = [
        {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": reply * n}]}
        for n in lengths
    ]
    encoded = encode_rows(tokenizer, rows, 1024)
    assert max(len(row["input_ids"]) for row in encoded) > 800
    loss, norm = reference(new_llama(tokenizer), encoded)
    for packing, size, steps in ((False, 4, 1), (False, 1, 4), (True, 1, len(pack_rows(encoded, 1024, 0)))):
        folder = tmp_path / f"{packing}-{size}-{steps}"
        sft(
            folder, tokenizer, new_llama(tokenizer), encoded, max_steps=1, max_length=1024, packing=packing,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        assert logged(folder, "loss") == pytest.approx([loss], rel=1e-4), (packing, size)
        assert logged(folder, "grad_norm") == pytest.approx([norm], rel=1e-3), (packing, size)


@pytest.mark.usefixtures("restored_signals")
def test_a_reply_learned_by_heart_ends_by_itself_though_pad_is_the_end_token(tokenizer, tmp_path):
    tokenizer, model = deepcopy(tokenizer), new_llama(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    row = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is blue."}]}
    encoded = encode_rows(tokenizer, [row] * 4, 64)
    sft(tmp_path / "o", tokenizer, model, encoded, max_steps=60, max_length=64, packing=False)
    prompt = chat.encode_chat(tokenizer, row["messages"][:1], add_generation_prompt=True).input_ids
    sampling = Sampling(1, 40, chat.stop_ids(tokenizer), temperature=0.0)
    (reply,) = HFEngine(model, tokenizer.pad_token_id).generate([prompt], sampling, 0)
    assert reply.stop == "stop" and chat.decode(tokenizer, reply.ids) == "It is blue."


def test_the_held_out_loss_is_that_of_transformers(tokenizer, model):
    encoded = encode_rows(tokenizer, ROWS[:12], 256)
    sums, counts = sft_eval.supervised_losses(model, encoded, max_tokens=300)
    for row, total, count in zip(encoded, sums, counts, strict=True):
        labels = torch.tensor([row["labels"]])
        loss = model(torch.tensor([row["input_ids"]]), labels=labels).loss.item()
        assert count == (labels[:, 1:] != -100).sum() and total == pytest.approx(loss * count, rel=1e-4)


def test_the_gain_in_held_out_loss_is_paired():
    """Every conversation falls by exactly 0.1 nats a token, far less than conversations differ from one another."""
    sums, counts = [10.0, 80.0, 5.0, 300.0], [10, 20, 10, 100]
    better = [total - 0.1 * count for total, count in zip(sums, counts, strict=True)]
    found = sft_eval.loss_gain((sums, counts), (better, counts))
    assert found["passed"] and found["before"]["value"] - found["after"]["value"] == pytest.approx(0.1)
    assert found["after"]["high"] > found["before"]["low"], "unpaired intervals would say nothing"
    assert not sft_eval.loss_gain((sums, counts), (sums, counts))["passed"]


def test_measuring_while_training_changes_nothing(small_chain, tmp_path):
    plain = run(argv("sft", small_chain, tmp_path / "plain"), tmp_path)
    settings = {"eval_steps": 3, "loss_dataset_split": "test", "loss_max_rows": 20}
    watched = run(argv("sft", small_chain, tmp_path / "watched", **settings), tmp_path)
    assert plain.returncode == 0 and watched.returncode == 0, plain.stderr + watched.stderr
    one, other = manifest(tmp_path / "plain"), manifest(tmp_path / "watched")
    assert one["files"]["model.safetensors"] == other["files"]["model.safetensors"]
    lines = log(tmp_path / "watched")
    measured = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert [line for line in lines if "held_out_loss" not in line] == log(tmp_path / "plain")
    assert {"sampled/replies that end", "sampled/reply length", "sampled/pass@1"} <= measured[0].keys()
    samples = log(tmp_path / "watched", "samples.jsonl")
    assert [sample["step"] for sample in samples] == [3] * 6 + [6] * 6
    assert all(sample["prompt"].startswith("user: ") and len(sample["texts"]) == 1 for sample in samples)
    assert {"held-out loss", "held-out loss, base"} <= other["metrics"].keys()
    assert [source["split"] for source in other["data"]] == ["train", "test", "test"]


def test_a_split_that_is_the_training_data_is_refused(small_chain, tmp_path):
    done = run(argv("sft", small_chain, tmp_path / "o", loss_dataset_split="train", loss_max_rows=50), tmp_path)
    refused(done, "loss_dataset_split: all 50 held-out rows of tiny are training rows, too", "train[-100:]")


def test_neftune_is_the_papers_noise(tokenizer, tmp_path, restored_signals):
    """Uniform within alpha / sqrt(L d) in training, none afterwards (Jain et al. 2310.05914, algorithm 1)."""
    model, seen = new_llama(tokenizer), []
    table = model.get_input_embeddings()

    def watch(module, arguments, keywords):
        ids, embedded = keywords.get("input_ids"), keywords.get("inputs_embeds")
        if ids is None and embedded is None:
            ids = arguments[0]
        seen.append(ids)

    noise = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, arguments, keywords: noise.append((arguments or (keywords["hidden_states"],))[0].detach()),
        with_kwargs=True,
    )
    model.model.register_forward_pre_hook(watch, with_kwargs=True)
    start = table.weight.detach().clone()
    encoded = encode_rows(tokenizer, ROWS[:2], 256)
    sft(tmp_path / "o", tokenizer, model, encoded, max_steps=1, max_length=256, packing=False, neftune_noise_alpha=5.0)
    gap, bound = noise[0] - start[seen[0]], 5.0 / math.sqrt(noise[0].shape[1] * noise[0].shape[2])
    assert gap.abs().max() <= bound * 1.0001 and gap.abs().max() > 0.98 * bound
    assert gap.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    handle.remove()
    assert torch.equal(table(seen[0]), table.weight[seen[0]]), "none after training"


def test_liger_is_refused_or_left_out_in_words(small_chain, tmp_path):
    assert liger_obstacle().startswith("Liger's Triton kernels need a GPU")
    done = run(argv("sft", small_chain, tmp_path / "a", use_liger_kernel="true"), tmp_path)
    refused(done, "use_liger_kernel: true, but Liger's Triton kernels need a GPU", "--use_liger_kernel auto")
    done = run(argv("sft", small_chain, tmp_path / "b"), tmp_path)
    assert "sft: no Liger kernels: Liger's Triton kernels need a GPU" in done.stdout


LIGER = """
import sys, torch
from conftest import new_llama
from test_sft_encoding import ROWS, logged, sft
from posttrain.sft_rows import encode_rows
from posttrain.chat import set_template
from transformers import AutoTokenizer
from transformers.models.llama import modeling_llama
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = new_llama(tokenizer)
sft(sys.argv[1], tokenizer, model, encode_rows(tokenizer, ROWS[:2], 320), max_steps=1, max_length=320,
    packing=False, use_liger_kernel=sys.argv[3],
    liger_kernel_config={"rms_norm": False, "swiglu": False})
print(modeling_llama.apply_rotary_pos_emb.__name__)
"""


@pytest.mark.slow
def test_ligers_kernels_give_the_same_loss_and_gradient(small_chain, tmp_path):
    """Interpreted on the CPU, in a process of its own: Triton reads the variable at import. Triton 3.9 cannot
    interpret Liger's RMSNorm and SwiGLU; the head's loss is TRL's own fused one in any case."""
    import sys

    found = []
    for setting in ("false", "true"):
        folder = tmp_path / setting
        done = call([sys.executable, "-c", LIGER, folder, small_chain / "sft", setting], TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("liger_rotary_pos_emb" in done.stdout) == (setting == "true"), done.stdout
        found.append([logged(folder, "loss")[0], logged(folder, "grad_norm")[0]])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_liger_kernel": "maybe"}, "use_liger_kernel: found 'maybe', expected auto, true or false"),
        ({"too_long": "drop"}, "too_long: found 'drop', expected cut or leave_out"),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha: found -1.0, expected null or more than 0"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words):
        SFTConfig(**settings)


def test_a_loss_data_set_without_its_split(small_chain, tmp_path):
    done = run(argv("sft", small_chain, tmp_path / "o", loss_dataset_name="tiny"), tmp_path)
    refused(done, "loss_dataset_name: needs loss_dataset_split")


def test_a_dry_run_looks_at_the_data_of_the_held_out_loss(small_chain, tmp_path):
    from posttrain.chain import import_recipe

    recipe = import_recipe(ROOT / "recipes" / "sft.py")
    flags = argv("sft", small_chain, tmp_path / "o", loss_dataset_split="test")[1:]
    assert recipe.check(flags)["loss_dataset_split"] == "test"
    with pytest.raises(UserError, match="split: found 'tset', expected train or test"):
        recipe.check([*flags, "--loss_dataset_split", "tset"])
