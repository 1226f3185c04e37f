"""One flag swaps the template: new tokens and their rows, eos, pad and generation config, and what is saved renders
the same in transformers, TRL and vLLM.

Run: pytest tests/test_template_swap.py
"""

import json
from copy import deepcopy

import pytest
import torch
from template_helpers import FOLDER, NAMES, gpt2_like, source, spaced
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, LlamaConfig

from posttrain.chat import control_tokens, encode_chat, end_of_turn_id, set_template, stop_ids
from posttrain.models import save_pair
from posttrain.template_render import declared_control

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 3+4?"},
    {"role": "assistant", "content": "It is 7."},
]


def llama(rows: int, tied: bool, dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, dtype=dtype,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def swapped(base, name: str, model=None):
    tokenizer = deepcopy(base)
    model = model or llama(len(tokenizer), tied=True)
    set_template(tokenizer, model, str(FOLDER / f"{name}.jinja"))
    return tokenizer, model


# ---- tokens and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_all_control_tokens_of_a_template_are_special_afterwards(name):
    """None of gpt2_like's 400 tokens is one of them before."""
    tokenizer, model = swapped(gpt2_like(), name)
    declared = declared_control(source(name))
    assert set(declared) <= set(control_tokens(tokenizer).values())
    new = [token for token in tokenizer.get_vocab() if token not in gpt2_like().get_vocab()]
    assert set(new) - {"<|pad|>"} == set(declared)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == len(gpt2_like()) + len(new)
    assert [tokenizer.tokenize(token) for token in declared] == [[token] for token in declared]


@pytest.mark.parametrize("padding", [0, 3, 64])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_the_rows_in_use(tied, padding, dtype):
    """`padding`: rows that the matrix has beyond the tokenizer's, as Qwen's and Phi's have; here they hold rubbish."""
    used = len(gpt2_like())
    model = llama(used + padding, tied, dtype)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in layers:
        layer.weight.data[used:] = 1e3
    old = [layer.weight.detach().clone()[:used] for layer in layers]
    tokenizer, model = swapped(gpt2_like(), "llama3", model)  # three tokens, and one that pads
    new = len(tokenizer) - used
    assert new == 4
    for layer, before in zip([model.get_input_embeddings(), model.get_output_embeddings()], old, strict=True):
        assert torch.equal(layer.weight[:used], before)
        mean = before.double().mean(0).expand(new, -1)
        close = {"atol": 1e-7 if dtype == torch.float32 else 1e-3, "rtol": 0}
        torch.testing.assert_close(layer.weight[used : used + new].double(), mean, **close)
        assert layer.weight.shape[0] == max(used + padding, used + new) and layer.weight.dtype == dtype
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied and model.config.vocab_size == layer.weight.shape[0]


def test_a_bias_of_the_head_grows_with_it():
    config = GPTJConfig(vocab_size=len(gpt2_like()), n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.bias.data = torch.arange(float(len(gpt2_like())))
    tokenizer, model = swapped(gpt2_like(), "chatml", model)
    bias = model.lm_head.bias
    assert len(bias) == len(tokenizer) and set(bias[len(gpt2_like()) :].tolist()) == {(len(gpt2_like()) - 1) / 2}
    assert torch.equal(bias[: len(gpt2_like())], torch.arange(float(len(gpt2_like()))))


def test_tokens_that_the_vocabulary_has_keep_their_rows_and_become_special():
    base = deepcopy(gpt2_like())
    base.add_tokens(["<start_of_turn>"])
    assert base.convert_tokens_to_ids("<start_of_turn>") not in control_tokens(base)
    model = llama(len(base), tied=True)
    old = model.get_input_embeddings().weight.detach().clone()
    tokenizer, model = swapped(base, "gemma", model)
    token = tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert token == base.convert_tokens_to_ids("<start_of_turn>") and token in control_tokens(tokenizer)
    assert torch.equal(model.get_input_embeddings().weight[: len(base)], old)
    ids = encode_chat(tokenizer, [{"role": "user", "content": "<start_of_turn>"}]).input_ids
    assert ids.count(token) == 1


def test_swapping_back_and_forth_adds_nothing_twice_and_changes_no_row(base_tokenizer):
    tokenizer, model = swapped(base_tokenizer, "llama3")
    size, rows = len(tokenizer), model.get_input_embeddings().weight.detach().clone()
    for name in ("chatml", "chatml_plain", "llama3"):
        set_template(tokenizer, model, str(FOLDER / f"{name}.jinja"))
    assert len(tokenizer) == size and torch.equal(model.get_input_embeddings().weight, rows)
    assert tokenizer.eos_token == "<|eot_id|>"
    set_template(tokenizer, model, None)  # keeps its own
    assert tokenizer.chat_template == source("llama3") and len(tokenizer) == size


def test_a_template_that_declares_nothing_gets_what_its_texts_write_and_not_its_comments(base_tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{# unlike <|comment|> #}{% for m in messages %}[INST]{{ '<｜Rôle｜>' + m.role + '<start_of_turn>' }}"
        "{% generation %}{{ m.content }}<|over|>{% endgeneration %}{% endfor %}"
    )
    tokenizer, model = deepcopy(base_tokenizer), llama(len(base_tokenizer), True)
    set_template(tokenizer, model, str(path))
    new = set(tokenizer.get_vocab()) - set(base_tokenizer.get_vocab())
    assert new == {"[INST]", "<｜Rôle｜>", "<start_of_turn>", "<|over|>"}


# ---- where generation stops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_generation_stops_where_training_ended(name):
    tokenizer, model = swapped(gpt2_like(), name)
    chat = encode_chat(tokenizer, TALK)
    learned = [i for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m]
    end = learned[-1]
    assert end == end_of_turn_id(tokenizer) == tokenizer.eos_token_id == model.config.eos_token_id
    assert end in model.generation_config.eos_token_id
    assert set(stop_ids(tokenizer, model)) == {end, gpt2_like().eos_token_id}

    def third_is_the_end(ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, end if ids.shape[1] == len(prompt) + 2 else 70] = 0
        return scores

    prompt = encode_chat(tokenizer, TALK[:2], add_generation_prompt=True).input_ids
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=9, do_sample=False, logits_processor=[third_is_the_end]
    )
    assert out[0, len(prompt) :].tolist() == [70, 70, end]


PADS = {
    # special tokens of the tokenizer before -> the pad token after
    "one of its own stays": ({"pad_token": "<|mine|>", "eos_token": "</s>"}, "<|mine|>"),
    "none, but one named so": (
        {"eos_token": "</s>", "extra_special_tokens": ["<|a|>", "<|right_pad|>"]},
        "<|right_pad|>",
    ),
    "none, but an unknown token": ({"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
    "none, but a spare one": ({"eos_token": "</s>", "extra_special_tokens": ["<|reserved|>"]}, "<|reserved|>"),
    "none, and none to spare": ({"eos_token": "</s>", "bos_token": "</s>", "unk_token": "</s>"}, "<|pad|>"),
    "the end of turns, as SmolLM2's": ({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, "</s>"),
    "the end of texts, as Qwen's, stays": ({"eos_token": "<|im_end|>", "pad_token": "</s>"}, "</s>"),
}


@pytest.mark.parametrize("case", PADS)
def test_the_pad_token_never_ends_turns(case):
    special, pad = PADS[case]
    base = tokenizer_with(special)
    tokenizer, model = swapped(base, "chatml_plain")
    assert tokenizer.pad_token == pad and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)


def tokenizer_with(special: dict):
    """gpt2_like's vocabulary with `</s>` and these special tokens; `<s>` is an ordinary word of it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(gpt2_like().backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<s>"]
    state["post_processor"] = None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)


# ---- saved ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory, base_tokenizer):
    """(name, tokenizer and model in memory, their folder). base_tokenizer keeps line breaks together before a word, as
    Llama 3's does: another one's tokens of Llama 3's header depend on the reply, but for ours."""
    base = spaced("first") if request.param in ("mistral", "zephyr") else gpt2_like()
    base = base_tokenizer if request.param.startswith("llama3") else base
    tokenizer, model = swapped(base, request.param, llama(len(base) + 8, tied=False))
    folder = tmp_path_factory.mktemp(request.param)
    save_pair(model, tokenizer, folder)
    return request.param, tokenizer, model, folder


def test_what_is_saved_renders_and_stops_the_same_in_transformers_and_trl(checkpoint):
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    name, tokenizer, model, folder = checkpoint
    again, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert again.chat_template == source(name) and again.get_vocab() == tokenizer.get_vocab()
    assert control_tokens(again) == control_tokens(tokenizer)
    for prompt in (False, True):
        chat = encode_chat(tokenizer, TALK[: 4 if prompt else 5], add_generation_prompt=prompt)
        render = again.apply_chat_template(
            TALK[: 4 if prompt else 5],
            add_generation_prompt=prompt,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert encode_chat(again, TALK[: 4 if prompt else 5], add_generation_prompt=prompt) == chat
        assert (render["input_ids"], render["assistant_masks"]) == (chat.input_ids, chat.assistant_mask)
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert (
        loaded.config.eos_token_id == tokenizer.eos_token_id and loaded.config.pad_token_id == tokenizer.pad_token_id
    )
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert has_generation_markers(again.chat_template) and is_chat_template_stop_token_trained(again)


@pytest.mark.vllm
def test_vllm_renders_what_is_saved_as_we_do(checkpoint):
    """Its chat endpoint's own path. A template whose contents it took for lists would get lists, and refuse them."""
    hf = pytest.importorskip("vllm.renderers.hf", reason="vLLM is not installed")
    from vllm.config import ModelConfig

    _, tokenizer, _, folder = checkpoint
    again, config = AutoTokenizer.from_pretrained(folder), ModelConfig(model=str(folder), dtype="float32")
    expected = encode_chat(tokenizer, TALK[:4], add_generation_prompt=True).input_ids
    found = hf.safe_apply_chat_template(config, again, TALK[:4], tokenize=True, add_generation_prompt=True)
    assert found == expected
    form = hf.resolve_chat_template_content_format(None, None, "auto", again, model_config=config)
    assert form == "string"
