"""A tokenizer as GGUF's: kind of split, tokens with their types, merges, begin and end tokens, chat template.

In:  a fast tokenizer and the ids that end a reply. Out: keys in a `gguf.GGUFWriter`, and `texts(...)`, what is then
     encoded by llama.cpp and by the tokenizer alike before the file counts (gguf_engine.py). Used by
     `posttrain export --format gguf`.

A split is known by its pattern, not by a model's name: llama.cpp has patterns of its own, each under a name
(`tokenizer.ggml.pre`, src/llama-vocab.cpp). A tokenizer whose split it lacks is refused.
"""

import json
import random
import re
from dataclasses import dataclass

from posttrain.errors import UserError
from posttrain.tokenizer import GPT4, SPLITS

# (pattern, whether a word that is a token is taken whole before any merge) -> llama.cpp's name of that split.
PRE_OF_PATTERN = {
    (GPT4, False): "dbrx",
    (GPT4, True): "llama-bpe",
    (SPLITS["gpt4_one_digit"], False): "qwen2",
    (SPLITS["gpt2"], False): "gpt-2",
}
GPT2_OWN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # GPT-2's pattern inside the library
GENERATION_MARK = re.compile(r"\{%(-?)(\s*(?:end)?generation\s*)(-?)%\}")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")

WORDS = """\
It's a test, isn't it? I'LL SAY we've 3 apples, 12 pears, 123 plums, 1234 nuts and 12345678901234567890 seeds.
 leading space|trailing space |two  spaces|   three|\ttab|\t\ttabs|a\nb|a\n\nb|a \n b|a\r\nb|\n|\n\n\n| \n |a  \n\n  b
don't DON'T 'twas rock'n'roll 'S 'Re x'll y'd
def f(x: int) -> list[int]:|    return [x ** 2 for _ in range(10)]  # über
{"a": [1, 2.5e-3, null]}|<div class="a">&amp;</div>
http://example.org/a?b=c&d=%20e#f|me@example.org|C:\\temp\\a.txt|a_b-c/d|$1,234.56|100%|#1|3.14159|1/2|--flag=x|...|?!?!
Ünïcödé, naïve café, Straße, Ελληνικά, Русский текст, עברית, العربية, हिन्दी, ไทย
한국어, 日本語のテキスト, 中文字符123测试
e\u0301 (combining)|ﬁ ligature|½ ² ③ Ⅷ ٣٤٥ ４５|𝒳𝓎 𐍈|🙂
👩‍👩‍👧‍👦|🇩🇪|👍🏽|☕️|™©®|“quotes” ‘single’ «guillemets»|– — …|\u00a0nbsp\u00a0|\u200bzw
\u2028line|\u3000wide|\ufeffbom|\x01\x02\x7f|\x85next|a\x0bb\x0cc|||===***+++~~~^^^|<<>>[]{}()|<|x|>|<0x41>|[INST]|</s"""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer. `kind`: gpt2 (byte-level BPE) or llama (SentencePiece's BPE)."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    add_bos: bool
    template: str | None
    remarks: tuple[str, ...]


def vocabulary(tokenizer, rows: int) -> Vocabulary:
    """The tokenizer for a model with `rows` embeddings. UserError for a kind that llama.cpp does not split alike."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizer.json: found a {model['type']} model; a GGUF is written for BPE")
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and the model's embeddings {rows} rows")
    remarks = []
    if is_sentencepiece(state):
        kind, pre = "llama", "default"
    else:
        kind, pre = "gpt2", split_name(state)
        remarks += _normalizer_remarks(state)
    tokens, types = token_types(tokenizer, state, rows, kind)
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in map(_pair, model["merges"])],
        scores=_scores(model, tokens) if kind == "llama" else [],
        add_bos=adds_bos(tokenizer),
        template=plain_template(tokenizer),
        remarks=tuple(remarks),
    )


def is_sentencepiece(state: dict) -> bool:
    """Whether tokenizer.json is SentencePiece's BPE as Llama 2 has it: a space before each text, spaces as ▁."""
    if not state["model"].get("byte_fallback") or "<0x00>" not in state["model"]["vocab"]:
        return False
    prepends = [step["type"] for step in _normalizers(state)] == ["Prepend", "Replace"]
    if not prepends or state["pre_tokenizer"] is not None:
        raise UserError(
            "tokenizer.json: BPE with byte fallback whose spaces are not added as Llama 2's are; llama.cpp would cut "
            "texts otherwise. Convert it with llama.cpp's convert_hf_to_gguf.py, and check with posttrain check-export"
        )
    return True


def split_name(state: dict) -> str:
    """llama.cpp's name of a byte-level tokenizer's split. UserError where it has none."""
    steps = state["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    whole_words = bool(state["model"].get("ignore_merges"))
    last, before = steps[-1], steps[:-1]
    own = all(last.get(key) == value for key, value in GPT2_OWN.items()) and not whole_words
    if own and not before:
        return "gpt-2"
    if own and [(step["type"], step.get("individual_digits")) for step in before] == [("Digits", True)]:
        return "smollm"
    plain = last.get("type") == "ByteLevel" and not last.get("use_regex") and not last.get("add_prefix_space")
    if plain and [step["type"] for step in before] == ["Split"] and before[0]["behavior"] == "Isolated":
        name = PRE_OF_PATTERN.get((before[0]["pattern"].get("Regex"), whole_words))
        if name is not None:
            return name
    raise UserError(
        "tokenizer.json: llama.cpp has no split that cuts texts as this pre_tokenizer does (known: "
        f"{', '.join(SPLITS)} of recipes/tokenizer.py, Llama 3's, Qwen's, GPT-2's, SmolLM's): "
        f"{json.dumps(state['pre_tokenizer'])[:300]}"
    )


def _normalizers(state: dict) -> list[dict]:
    normalizer = state["normalizer"]
    return [] if normalizer is None else normalizer.get("normalizers", [normalizer])


def _normalizer_remarks(state: dict) -> list[str]:
    names = [step["type"] for step in _normalizers(state)]
    if names == ["NFC"]:
        return ["the tokenizer brings texts to Unicode's form NFC, which llama.cpp does not: send composed letters"]
    if names:
        raise UserError(f"tokenizer.json: normalizer {', '.join(names)}: llama.cpp has none for byte-level BPE")
    return []


def token_types(tokenizer, state: dict, rows: int, kind: str) -> tuple[list[str], list[int]]:
    """(texts, types) of all `rows` ids: special tokens are control, other added ones user-defined, and rows without
    a token unused."""
    from gguf import TokenType

    unknown = state["model"].get("unk_token")
    text_of = {id: text for text, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for id in range(rows):
        text, type_ = text_of.get(id), TokenType.NORMAL
        if text is None:
            text, type_ = f"[PAD{id}]", TokenType.UNUSED
        elif kind == "llama" and text == unknown:
            type_ = TokenType.UNKNOWN
        elif id in added:
            type_ = TokenType.CONTROL if added[id].special else TokenType.USER_DEFINED
        elif kind == "llama" and BYTE.fullmatch(text):
            type_ = TokenType.BYTE
        tokens.append(text)
        types.append(int(type_))
    return tokens, types


def _pair(merge) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _scores(model: dict, tokens: list[str]) -> list[float]:
    """SentencePiece merges the pair of the highest score first: minus the place among the merges."""
    place = {}
    for number, merge in enumerate(model["merges"]):
        place.setdefault("".join(_pair(merge)), number)
    return [-float(place.get(token, len(place) + id)) for id, token in enumerate(tokens)]


def adds_bos(tokenizer) -> bool:
    """Whether llama.cpp is to put the begin token before a prompt: where the chat template writes it and the
    tokenizer adds it to plain text, too; of a base model, where texts begin with one (base_evals.begin_id)."""
    from posttrain.base_evals import begin_id
    from posttrain.chat import PROBE, encode_chat

    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    if not tokenizer.chat_template:
        return begin_id(tokenizer) == bos
    written = encode_chat(tokenizer, PROBE).input_ids[:1] == [bos]
    return written and tokenizer("a").input_ids[:1] == [bos]


def plain_template(tokenizer) -> str | None:
    """The chat template without transformers' own marks for training; comments stand in their place, so that white
    space is trimmed as before."""
    if not tokenizer.chat_template:
        return None
    from posttrain.chat import template_of

    return GENERATION_MARK.sub(r"{#\1\2\3#}", template_of(tokenizer))


def add_tokenizer(writer, tokenizer, words: Vocabulary, stops: tuple[int, ...]) -> None:
    """Write the keys. UserError where more tokens end a reply than the format has places for."""
    from gguf import GGUFValueType

    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no eos token, and llama.cpp would take another one for it; set eos_token")
    others = [id for id in stops if id != tokenizer.eos_token_id]
    if len(others) > 2:
        raise UserError(f"{len(others) + 1} tokens end a reply ({stops}); a GGUF names 3: eos, eot and eom")
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.kind == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(True)
    elif words.merges:
        writer.add_token_merges(words.merges)
    else:  # an array needs a kind, and an empty list has none
        writer.add_key_value("tokenizer.ggml.merges", [], GGUFValueType.ARRAY, GGUFValueType.STRING)
    named = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    named |= {"eos": tokenizer.eos_token_id, **dict(zip(("eot", "eom"), others, strict=False))}
    named["bos"] = named["eos"] if named["bos"] is None else named["bos"]  # else llama.cpp's own default, token 11
    for name, id in named.items():
        if id is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    if words.template is not None:
        writer.add_chat_template(words.template)


def texts(tokenizer, *, most: int = 2000, seed: int = 0) -> list[str]:
    """What is encoded to prove the split: lines of many scripts, digits and white space, every control token with and
    without neighbours, up to `most` tokens' own texts, and random characters of a seed."""
    rng = random.Random(seed)
    lines = WORDS.split("\n")
    found = [part for line in lines for part in (line, *line.split("|"))] + [WORDS]
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for token in added[:300]:
        found += [token, f"a{token}b", f"{token}{token}\n", f"Hi {token} there"]
    ids = sorted(tokenizer.get_vocab().values())
    ids = ids if len(ids) <= most else rng.sample(ids, most)
    own = [text for text in (tokenizer.decode([id]) for id in ids) if "\ufffd" not in text]
    found += ["".join(own[start : start + 20]) for start in range(0, len(own), 20)]
    found += ["\n".join(own[start : start + 20]) for start in range(0, len(own), 20)]
    alphabet = [chr(c) for c in (*range(32, 127), *range(0xA0, 0x250), *range(0x370, 0x460), *range(0x4E00, 0x4E80))]
    alphabet += list(" \n\t'0123456789") * 20
    found += ["".join(rng.choices(alphabet, k=40)) for _ in range(60)]
    return [text for text in dict.fromkeys(found) if text]
