"""What real tokenizers, templates and exports do and the embedded world does not. Run: pytest tests/test_real_input.py

SmolLM2's template has no generation marks and a line break after each turn, its tokenizer no pad and, in some copies,
another eos than the end of a turn; OASST's exports overlap and hold prompts longer than a small model's context.
"""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from rl_helpers import ROOT, llama_config, tiny_llama, tiny_scorer, tiny_tokenizer

from posttrain.chat import decode, encode_chat, end_of_turn_id, reply_end_id, set_template, stop_ids
from posttrain.data import DataConfig, origin
from posttrain.errors import UserError
from posttrain.evals import EvalConfig, ReplyConfig, check_both, fit_prompts, load_both, rollouts_as_samples
from posttrain.models import require_positions
from posttrain.ranking_forward import score_all
from posttrain.ranking_rows import encode_rankings
from posttrain.reward_model import set_pad
from posttrain.rl.batches import encode_prompts
from posttrain.rl.config import RLConfig
from posttrain.rl.rollout import EngineConfig, make_engine, vllm_obstacle
from posttrain.rl.types import Completion, Rollouts

PLAIN = ROOT / "chat_templates" / "chatml_plain.jinja"
HELLO = [{"role": "user", "content": "hello"}]


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


class Notes(list):
    """A stage as far as its notes go."""

    note = list.append


@pytest.fixture
def unnamed():
    """A tokenizer in whose config <|im_end|> has no part, with <|im_start|> as eos and no pad; a template without
    marks that puts a line break after each turn."""
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer._extra_special_tokens = []
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = "<|im_start|>", "<|im_start|>", None
    template = PLAIN.read_text(encoding="utf-8")
    tokenizer.chat_template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in tokenizer.all_special_ids
    return tokenizer


def test_a_reply_ends_with_the_templates_token_whatever_the_tokenizer_calls_eos(unnamed):
    start, end = unnamed.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert reply_end_id(unnamed) == end and stop_ids(unnamed) == tuple(sorted((start, end)))
    text = unnamed("five", add_special_tokens=False)["input_ids"]
    assert decode(unnamed, [*text, end]) == "five"


def test_a_control_token_counts_though_the_config_does_not_name_it(unnamed):
    """SFT with a template of ours on such a tokenizer."""
    set_template(unnamed, tiny_llama(), str(PLAIN))
    assert end_of_turn_id(unnamed) == unnamed.eos_token_id == unnamed.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("marked", [True, False])
def test_a_ranking_ends_where_a_sampled_reply_does(unnamed, marked):
    """Else the score would be learned at the line break after the turn and read at the end token before it."""
    if marked:
        unnamed.chat_template = PLAIN.read_text(encoding="utf-8")
    [ranking], _ = encode_rankings(unnamed, [{"prompt": HELLO, "chosen": say("yes"), "rejected": say("no")}], 100)
    prompt = encode_chat(unnamed, HELLO, add_generation_prompt=True).input_ids
    end = unnamed.convert_tokens_to_ids("<|im_end|>")
    replies = [unnamed(text, add_special_tokens=False)["input_ids"] for text in ("yes", "no")]
    assert ranking.sequences == [[*prompt, *reply, end] for reply in replies]


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|pad|>"])
def test_transformers_reads_a_saved_reward_model_where_it_was_trained(unnamed, pad):
    """With padding: SmolLM2's pad is its end of turn, at which a score would be read one token too early."""
    model, unnamed.pad_token = tiny_scorer(), pad
    set_pad(model, unnamed)
    assert model.config.pad_token_id == unnamed.pad_token_id not in stop_ids(unnamed)
    row = {"prompt": HELLO, "completions": [say("a longer reply"), say("no"), say("yes")]}
    sequences = encode_rankings(unnamed, [row], 100)[0][0].sequences
    batch = unnamed.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    assert scores.tolist() == pytest.approx(score_all(model, sequences), abs=1e-4)


@pytest.fixture
def files(tmp_path):
    """Training conversations, and held-out prompts of which the second opens one of them."""
    train = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": x}, *say("r")]} for x in "ab"
    ]
    turns = [[{"role": "user", "content": x}, *say("other"), {"role": "user", "content": "?"}] for x in "xby"]
    for name, rows in {"train": train, "test": [{"prompt": turn} for turn in turns]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_held_out_rows_of_a_training_tree_are_left_out(files):
    data, held_out = DataConfig(str(files)), EvalConfig(eval_dataset_split="test")
    rows, test, sources = load_both(data, held_out, 0, ("messages",), ("prompt",))
    assert [row["prompt"][0]["content"] for row in test] == ["x", "y"] and len(rows) == 2
    assert (sources[1]["rows"], sources[1]["overlap"]["dropped_eval"]) == (2, 1)


def test_the_origin_of_every_kind_of_row():
    assert origin({"messages": [{"role": "system", "content": "s"}, *HELLO, *say("x")]}) == "hello"
    assert origin({"prompt": HELLO, "answer": "1"}) == origin({"prompt": "hello", "answer": "2"}) == "hello"
    texts = [{"text": "a"}, {"text": "b"}, {"prompt": say("only")}, {"prompt": 3}, {"messages": ["x"]}]
    assert len({origin(row) for row in texts}) == 5


def test_a_dry_run_looks_at_the_held_out_rows_too(files):
    data = DataConfig(str(files / "train.jsonl"))
    check_both(data, EvalConfig(), 0, ("messages",))
    with pytest.raises(UserError, match="none.jsonl"):
        check_both(data, EvalConfig(eval_dataset_name=str(files / "none.jsonl")), 0, ("messages",))
    with pytest.raises(UserError, match="'prompt' is missing"):
        check_both(data, EvalConfig(), 0, ("messages",), ("prompt",))


def test_prompts_without_room_are_left_out_and_counted():
    run, model = Notes(), tiny_llama()
    rows = [{"prompt": [{"role": "user", "content": "x" * size}]} for size in (10, 600, 200, 100)]
    replies = ReplyConfig(eval_max_tokens=300)
    kept, test, length = encode_prompts(run, model, tiny_tokenizer(), rows, rows, RLConfig(), replies)
    assert ([row["row"] for row in kept], len(test)) == ([0, 2, 3], 2)
    assert max(len(row["prompt_ids"]) for row in kept) + 64 < length <= 512
    assert len(run) == 2 and "1 of 4 prompts" in run[0] and "2 of 4 prompts" in run[1]
    most = RLConfig(max_prompt_length=150)
    assert [row["row"] for row in encode_prompts(run, model, tiny_tokenizer(), rows, rows, most, replies)[0]] == [0, 3]
    with pytest.raises(UserError, match="all 2 prompts are longer than 12 tokens"):
        fit_prompts(run, model, rows[:2], [13, 14], 500)
    with pytest.raises(UserError, match="max_length: found 513.*512 positions"):
        require_positions(model, "max_length", 513)


def test_a_head_size_that_vllm_has_no_kernel_for(tmp_path):
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("vLLM's attention on a GPU has other head sizes")
    model = tiny_llama(num_attention_heads=8)
    run = SimpleNamespace(note=Notes().append, config={"seed": 0}, output_dir=tmp_path)
    assert vllm_obstacle(llama_config()) is None
    assert "transformers" in make_engine(EngineConfig(), model, tiny_tokenizer(), 64, run).name
    with pytest.raises(UserError, match="use_vllm: true, but .* heads of 8"):
        make_engine(EngineConfig(use_vllm="true"), model, tiny_tokenizer(), 64, run)


def test_the_list_of_head_sizes_is_vllms():
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    from posttrain.rl.rollout import CPU_HEAD_SIZES

    assert set(CPU_HEAD_SIZES) <= set(backend.CPUAttentionBackend.get_supported_head_sizes())


def test_samples_of_one_reply_a_prompt_are_that_prompts():
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": text} for text in ("p", "q")]
    completions = [Completion(tokenizer(text)["input_ids"], [], "stop") for text in ("a", "b")]
    samples = rollouts_as_samples(Rollouts(rows, [[1], [2]], completions, 1), tokenizer, 6)
    assert samples == [{"prompt": "p", "texts": ["a"]}, {"prompt": "q", "texts": ["b"]}]
