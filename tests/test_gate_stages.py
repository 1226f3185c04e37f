"""The gate: packing, reward and RL stages, parents, what passes, and real runs of a recipe.

Run: pytest tests/test_gate_stages.py
"""

from copy import deepcopy

import pytest
import torch
from conftest import REPOSITORY, new_llama
from gate_helpers import ROWS, Run, failure, opens_a_thought, refused_and_allowed, reward, rl, says, sft, user
from recipe_runs import argv, manifest, refused, run
from test_chat import WITHOUT_MARKS, with_template
from transformers import AutoModelForSequenceClassification

from posttrain.chat import set_template, template_sha256
from posttrain.conditions import known, packing_leaks
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.evals import ReplyConfig
from posttrain.models import save_pair
from posttrain.ranking_rows import encode_rankings, replies_of
from posttrain.rl.batches import encode_prompts
from posttrain.rl.config import RLConfig

SHIPPED = sorted((REPOSITORY / "chat_templates").glob("*.jinja"))


# ---- packing --------------------------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 700, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
KEYS = {
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt_oss": {**HEADS, "num_local_experts": 4},
    "falcon": {},
    "bloom": {},
    "mamba": {"state_size": 4},
}


def other_model(kind, attention):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SHAPE, **KEYS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize(
    "kind, attention",
    [
        ("opt", "sdpa"),
        ("opt", "eager"),
        ("gpt_oss", "eager"),
        ("falcon", "sdpa"),
        ("bloom", "eager"),
        ("mamba", "eager"),
    ],
)
def test_models_that_leak_across_a_packed_row(kind, attention):
    """As they are in transformers 5.17. OPT, Falcon and GPT-OSS make their masks without the position ids; Bloom's
    ALiBi and Mamba's state know no documents."""
    model = other_model(kind, attention).train()
    state = torch.random.get_rng_state()
    assert "in a packed row another first document changes the outputs of the second" in packing_leaks(model)
    assert model.training and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_that_isolate(kind, attention, tokenizer):
    """Of experts, the products round otherwise where other tokens come to them: that is no leak."""
    model = new_llama(tokenizer) if kind == "llama" else other_model(kind, attention)
    assert packing_leaks(model) is None
    scorer = AutoModelForSequenceClassification.from_config(model.config, attn_implementation=attention)
    assert packing_leaks(scorer) is None


def test_a_mask_that_covers_the_whole_row_leaks(model):
    """What a trainer does that passes a mask of ones beside the position ids."""

    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.device = model, model.config, model.device

        def forward(self, input_ids, position_ids, use_cache):
            return self.inner(
                input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids),
                use_cache=use_cache,
            )  # fmt: skip

    assert "Dense with attn_implementation sdpa" in packing_leaks(Dense())


def test_sft_on_a_model_that_leaks(tokenizer):
    model = other_model("opt", "sdpa")
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    words = ("OPTForCausalLM with attn_implementation sdpa", "--packing false")
    refused_and_allowed("packing_leaks", words, lambda run: sft(tokenizer, model, run=run))
    run = Run()
    sft(tokenizer, model, run=run, packing=False)
    assert "packing_leaks" not in run.gate["checked"] and run.gate["allowed"] == {}


# ---- reward, RL, parents --------------------------------------------------------------------------------------------


PAIRS = [{"prompt": [user(f"{i}+1?")], "chosen": [says(f"{i + 1}")], "rejected": [says("no")]} for i in range(9)]


def test_rewards_are_read_at_the_end_of_the_assistants_turn(tokenizer):
    run = Run()
    reward(tokenizer, PAIRS, run)
    assert "score_not_at_end" in run.gate["checked"] and run.gate["allowed"] == {}
    broken = [*PAIRS, {"prompt": [user("hi")], "chosen": [says("ho"), user("bye")], "rejected": [says("no")]}]
    words = ("row 9: its score is read at token", "'<|im_end|>'", "of a turn of role user")
    refused_and_allowed("score_not_at_end", words, lambda run: reward(tokenizer, broken, run))


def test_rankings_and_prompts_that_are_mostly_left_out(tokenizer, model):
    long = [{**PAIRS[0], "chosen": [says("word " * 90)]} for _ in range(10)]
    words = ("10 of 19 rows are too long and left out, row 9 the first; allowed are 50%",)
    refused_and_allowed("truncated", words, lambda run: reward(tokenizer, PAIRS + long, run, max_length=60))
    prompts = [{"prompt": [user("word " * 90)]}] * 2 + [{"prompt": [user("hi")]}]
    words = ("2 of 3 rows are too long and left out, row 0 the first",)
    refused_and_allowed("truncated", words, lambda run: rl(tokenizer, model, prompts, run, max_prompt_length=60))


def test_rl_prompts_pass_and_are_those_of_encode_prompts(tokenizer, model):
    prompts = [{"prompt": row["prompt"]} for row in tiny.rows("problems", "train", 100, 0)]
    run, config, replies = Run(), RLConfig(), ReplyConfig(eval_max_tokens=16)
    assert rl(tokenizer, model, prompts, run) == encode_prompts(
        run, model, tokenizer, prompts, prompts, config, replies
    )
    assert {"end_is_not_eos", "packing_leaks", "control_in_content"} <= set(run.gate["checked"])
    leaky = other_model("opt", "sdpa")
    leaky.generation_config.eos_token_id = tokenizer.eos_token_id
    refused_and_allowed("packing_leaks", ("OPTForCausalLM",), lambda run: rl(tokenizer, leaky, prompts, run))


def test_a_parent_trained_with_another_template(tokenizer, model, tmp_path):
    manifest = '{"status": "finished", "stage": "reward", "chat_template_sha256": "%s"}'
    (tmp_path / "stage.json").write_text(manifest % ("0" * 64))
    parents = {"reward": {"path": str(tmp_path)}}

    def act(run):
        run.parents = parents
        return rl(tokenizer, model, [{"prompt": [user("hi")]}], run)

    words = (
        f"reward {tmp_path} was trained with template 000000000000, this stage has {template_sha256(tokenizer)[:12]}",
    )
    refused_and_allowed("template_differs_from_parent", words, act)
    (tmp_path / "stage.json").write_text(manifest % template_sha256(tokenizer))
    act(Run())


# ---- good set-ups, and the words of --allow -------------------------------------------------------------------------


@pytest.mark.parametrize("template", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_template_passes(base_tokenizer, template):
    """But for those whose header says that the format forbids it."""
    tokenizer = deepcopy(base_tokenizer)
    model = new_llama(tokenizer)
    set_template(tokenizer, model, str(template))
    allow = ["not_prefix_preserving"] if "Not prefix-preserving" in template.read_text() else []
    run = Run(*allow)
    assert len(sft(tokenizer, model, run=run, max_length=4096)) == len(ROWS)
    assert list(run.gate["allowed"]) == allow and len(run.gate["checked"]) == 13
    rl(tokenizer, model, [{"prompt": [user("hi")]}], Run(*allow))
    reward(tokenizer, PAIRS, Run(*allow), 4096)


def test_names_that_are_no_condition():
    with pytest.raises(UserError, match="allow: 'truncate' is no condition of the gate; did you mean 'truncated'?"):
        known(["truncate"])
    with pytest.raises(UserError, match="allow: 'x' is no condition of the gate. Known: no_assistant_turn, "):
        known(["x"])
    assert known(["truncated", "packing_leaks"]) == ("truncated", "packing_leaks")


def test_several_conditions_at_once(tokenizer, model):
    """Two are shown in full, the others by name: the refusal stays short enough to read."""
    broken = with_template(tokenizer, WITHOUT_MARKS.replace("assistant\n' }}", "assistant ' }}"))
    rows = [*ROWS, {"messages": [user("hi")]}]
    said = failure(lambda: sft(broken, model, rows, max_length=9))
    assert said.count("--allow") == 2 and "posttrain inspect" in said
    assert "and render_mismatch, truncated:" in said, said


def test_replies_of_rows_are_those_that_were_encoded(tokenizer):
    rankings, _ = encode_rankings(tokenizer, PAIRS, 256)
    for ranking in rankings:
        texts = [tokenizer.decode(ids) for ids in ranking.sequences]
        assert all(r[-1]["content"] in t for r, t in zip(replies_of(PAIRS[ranking.row]), texts, strict=True))


# ---- real runs ------------------------------------------------------------------------------------------------------


def test_a_real_run_is_refused_and_passes_once_allowed(base_tokenizer, tokenizer, tmp_path):
    """recipes/sft.py with a template whose generation prompt opens a thought that training never sees."""
    save_pair(new_llama(base_tokenizer), base_tokenizer, tmp_path / "pretrain")
    opens = tmp_path / "opens.jinja"
    opens.write_text(opens_a_thought(tokenizer.chat_template))
    small = {"max_rows": 40, "max_steps": 1, "warmup_steps": 0, "chat_template_path": opens}
    words = argv("sft", tmp_path, tmp_path / "sft", **small)
    said = refused(run(words, tmp_path), "render_mismatch: row 0, turn ", "--allow render_mismatch")
    assert "sampling begins with token" in said and not (tmp_path / "sft" / "stage.json").exists()
    done = run([*words, "--allow", "render_mismatch"], tmp_path)
    assert done.returncode == 0, done.stderr
    gate = manifest(tmp_path / "sft")["gate"]
    assert list(gate["allowed"]) == ["render_mismatch"] and gate["allowed"]["render_mismatch"] in said
    assert len(gate["checked"]) == 13
    assert f"sft: allowed: render_mismatch: {gate['allowed']['render_mismatch']}" in done.stdout
    assert manifest(tmp_path / "sft")["config"]["allow"] == ["render_mismatch"]
    unknown = argv("sft", tmp_path, tmp_path / "other", **small)
    refused(run([*unknown, "--allow", "no_endtoken"], tmp_path), "allow: 'no_endtoken' is no", "mean 'no_end_token'?")
