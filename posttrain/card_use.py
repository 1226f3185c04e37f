"""What a model card says a model is and how to use it: code that runs as it stands.

In: the kind of model, its name on the Hub (or its folder), a prompt. Out: a sentence, a Python block, further lines.
tests/test_hub.py runs each block on what was pulled from a server.
"""

import json

WHAT = {
    "tokenizer": "A byte-level BPE tokenizer, trained from text. There is no model in this repository.",
    "pretrain": "A base language model: it goes on with a text and does not answer as an assistant.",
    "sft": "A chat model: a language model taught to answer by supervised fine-tuning on conversations.",
    "reward": "A reward model: it gives a conversation one number, higher where people would prefer the last reply. "
    "It writes nothing.",
    "ppo": "A chat model, trained by PPO (arXiv:1707.06347) towards what a reward model scores high.",
    "grpo": "A chat model, trained by GRPO (arXiv:2402.03300) towards rewards that a program computes.",
    "rejection": "A chat model, taught by its own replies that were found right (rejection sampling).",
}
GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
"""
CHAT = """\
messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
COMPLETE = """\
inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)
"""
REPLY = """\
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto")
for reply in ({replies}):
    messages = [{{"role": "user", "content": {prompt}}}, {{"role": "assistant", "content": reply}}]
    inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
    print(reply, model(**inputs).logits[0, 0].item())"""
TOKENIZE = """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
print(tokenizer.tokenize({prompt}))"""
SERVE = "`vllm serve {name}` serves it; `posttrain {verb}` {does} in a terminal."
SERVE_SCORES = """\
In vLLM: `LLM("{name}", runner="pooling", convert="classify")`; with `PoolingParams(use_activation=False)` its
`classify` gives these scores, without it a sigmoid of them. Scores of one prompt's replies can be compared;
{scale}"""
ADAPTER = """

The weights have the LoRA adapter merged. It lies apart in `adapter/`, for the model that it was trained on, {base}:
`peft.PeftModel.from_pretrained(base, "{name}", subfolder="adapter")`."""


def use_of(stage: str, chats: bool, name: str, prompt: str, replies: list[str]) -> str:
    """The Python block: `stage` "reward" scores, "tokenizer" splits, others generate from a chat or a text."""
    said = {"name": json.dumps(name), "prompt": json.dumps(prompt, ensure_ascii=False)}
    if stage == "tokenizer":
        return TOKENIZE.format(**said)
    if stage == "reward":
        quoted = ", ".join(json.dumps(reply, ensure_ascii=False) for reply in replies)
        return SCORE.format(**said, replies=quoted + "," * (len(replies) == 1))
    return (GENERATE + (CHAT if chats else COMPLETE)).format(**said) + REPLY


def further_use(stage: str, chats: bool, name: str, metrics: dict, adapter_of: str | None) -> str:
    """Other ways to use it. `adapter_of`: the name of an adapter's base model; None where there is no adapter."""
    if stage == "tokenizer":
        return "`posttrain inspect` and `recipes/pretrain.py --tokenizer_path` take its name, too."
    if stage == "reward":
        known = {key: metrics.get(key, {}).get("value") for key in ("score mean", "score std")}
        scale = "their zero means nothing."
        if None not in known.values():
            mean, deviation = known.values()
            scale = f"on held-out replies their mean is {mean:.3g}, their standard deviation {deviation:.3g}."
        text = SERVE_SCORES.format(name=name, scale=scale)
    else:
        verb, does = (
            (f"chat {name}", "talks to it") if chats else (f"complete {name} --prompt TEXT", "goes on with a text")
        )
        text = SERVE.format(name=name, verb=verb, does=does)
    return text + (ADAPTER.format(name=name, base=adapter_of) if adapter_of else "")
