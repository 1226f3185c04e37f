"""The gate: what a stage checks before it trains, and refuses to train on.

In: the stage's tokenizer, model, rows and their token ids. Out: checks, {name of a condition: what is wrong, or None},
and a refusal that names row, token and mend; `--allow NAME` lets one condition pass, which the manifest records.
To see the same without training: `posttrain inspect --config recipes/tiny/sft.yaml`.
"""

import random
from collections.abc import Iterable

from posttrain import conditions
from posttrain.chat import EncodedChat, template_sha256
from posttrain.conditions import CONDITIONS
from posttrain.conversations import PROBE_ROW, Conversation, Rendered, ids_of, render
from posttrain.errors import UserError
from posttrain.templates import TALK

Checks = dict[str, str | None]  # condition -> what is wrong, None where it holds

FIRST, SEEDED = 64, 64  # conversations that are rendered turn by turn: the first ones, and so many of the others
MOST_LEFT_OUT = 0.5  # share of the rows that reward and RL stages may leave out for their length
REPLY = {"role": "assistant", "content": "pong"}  # stands for what RL will sample


def chosen(num: int) -> list[int]:
    """Indices of the first conversations and of a fixed choice among the others."""
    rest = range(min(FIRST, num), num)
    return [*range(min(FIRST, num)), *sorted(random.Random(0).sample(rest, min(SEEDED, len(rest))))]


def sft_talks(rows: list[dict], chats: list[EncodedChat]) -> list[Conversation]:
    pairs = enumerate(zip(rows, chats, strict=True))
    return [Conversation(index, row["messages"], chat.input_ids, row.get("tools")) for index, (row, chat) in pairs]


def reward_talks(rows: list[dict], rankings: list) -> list[Conversation]:
    from posttrain.ranking_rows import replies_of

    return [
        Conversation(ranking.row, [*rows[ranking.row]["prompt"], *reply], ids)
        for ranking in rankings
        for reply, ids in zip(replies_of(rows[ranking.row]), ranking.sequences, strict=True)
    ]


def rl_talks(prompts: list[dict]) -> list[Conversation]:
    return [
        Conversation(each["row"], each["prompt"], each["prompt_ids"], each.get("tools"), opened=True)
        for each in prompts
    ]


def sft_checks(tokenizer, model, rows: list[dict], chats: list[EncodedChat], config, parents: dict) -> Checks:
    """chats: the rows encoded, before they are cut; config: SFTConfig; parents: of `stage.describe_parents`. Without a
    model (None: a tokenizer alone is looked at) what needs one is not among the checks."""
    talks = sft_talks(rows, chats)
    sizes = [len(chat.input_ids) for chat in chats]
    return {
        "no_assistant_turn": conditions.no_assistant_turn(talks),
        "no_supervised_tokens": conditions.no_supervised_tokens(tokenizer, talks, chats, config.max_length),
        "end_token_unsupervised": conditions.end_token_unsupervised(tokenizer, model, talks, chats),
        "pad_is_masked_end": conditions.pad_is_masked_end(tokenizer, model, talks, chats),
        **_ends(tokenizer, model),
        **_renders(tokenizer, talks),
        "truncated": conditions.truncated(sizes, config.max_length, config.max_truncated),
        **(_packing(model) if config.packing else {}),
        **_same_template(tokenizer, parents),
    }


def reward_checks(tokenizer, rows: list[dict], rankings: list, parents: dict) -> Checks:
    """rankings: the rows encoded and not left out. That the layout of a batch keeps sequences apart,
    ranking_forward.find_layout proves by itself."""
    talks = reward_talks(rows, rankings)
    kept = [ranking.row for ranking in rankings]
    return {
        "no_end_token": conditions.no_end_token(tokenizer),
        "score_not_at_end": conditions.score_not_at_end(tokenizer, talks),
        **_renders(tokenizer, talks),
        "truncated": conditions.left_out(kept, len(rows), MOST_LEFT_OUT),
        **_same_template(tokenizer, parents),
    }


def rl_checks(tokenizer, model, rows: list[dict], prompts: list[dict], parents: dict) -> Checks:
    """prompts: the rows encoded and not left out, with `row`, `prompt` and `prompt_ids`."""
    talks = rl_talks(prompts)
    return {
        **_ends(tokenizer, model),
        **_renders(tokenizer, talks),
        "truncated": conditions.left_out([each["row"] for each in prompts], len(rows), MOST_LEFT_OUT),
        **_packing(model),
        **_same_template(tokenizer, parents),
    }


def _packing(model) -> Checks:
    return {} if model is None else {"packing_leaks": conditions.packing_leaks(model)}


def _ends(tokenizer, model) -> Checks:
    return {
        "no_end_token": conditions.no_end_token(tokenizer, model),
        "end_is_not_eos": conditions.end_is_not_eos(tokenizer, model),
    }


def _renders(tokenizer, talks: list[Conversation]) -> Checks:
    """A row in which content became control differs from its render for that reason alone: it is left out here."""
    broken = conditions.control_rows(tokenizer, talks)
    sound = [talk for index, talk in enumerate(talks) if index not in broken]
    probe = ids_of(tokenizer, TALK)  # rows of one turn say nothing of the template's second
    samples = [_rendered(tokenizer, sound[index]) for index in chosen(len(sound))]
    samples += [render(tokenizer, Conversation(PROBE_ROW, TALK, probe))] if probe else []
    return {
        "control_in_content": next(iter(broken.values()), None),
        "not_prefix_preserving": conditions.not_prefix_preserving(tokenizer, samples),
        "retokenised_turns": conditions.retokenised_turns(tokenizer, samples),
        "render_mismatch": conditions.render_mismatch(tokenizer, samples),
    }


def _rendered(tokenizer, talk: Conversation) -> Rendered:
    if talk.opened:
        messages = [*talk.messages, REPLY]
        ids = ids_of(tokenizer, messages, talk.tools)
        if ids is None:  # a prompt that a reply cannot follow: the template says so where it is encoded
            return Rendered(talk, {}, {})
        talk = Conversation(talk.row, messages, ids, talk.tools)
    return render(tokenizer, talk)


def _same_template(tokenizer, parents: dict) -> Checks:
    from posttrain.stage import read_manifest

    trained = {
        role: (parent["path"], (read_manifest(parent["path"]) or {}).get("chat_template_sha256"))
        for role, parent in parents.items()
    }
    return {
        "template_differs_from_parent": conditions.template_differs_from_parent(template_sha256(tokenizer), trained)
    }


# ---- the verdict ----------------------------------------------------------------------------------------------------


def require(run, checks: Checks) -> None:
    """Refuse to train where a condition does not hold and `allow` of the stage's config does not name it. `run.gate`,
    which goes into the manifest, gets what was checked and what was found and allowed. UserError."""
    allowed = conditions.known(run.config["allow"])
    refused = {name: said for name, said in checks.items() if said and name not in allowed}
    if refused:
        raise UserError(refusal(refused))
    run.gate = manifest_entry(checks, allowed)
    for name, said in run.gate["allowed"].items():
        run.note(f"allowed: {name}: {said}")


def refusal(refused: Checks) -> str:
    """Every condition that does not hold: what was found, what it means, how to mend it."""
    lines = [f"{name}: {said}. {_mend(name)}" for name, said in list(refused.items())[:2]]
    if len(refused) > 2:
        lines.append(f"and {', '.join(list(refused)[2:])}: `posttrain inspect` with the same flags shows them all")
    return "the gate refuses to train. " + "\n".join(lines)


def _mend(name: str) -> str:
    means, mend = CONDITIONS[name]
    return f"That is, {means}: {mend}; or train nevertheless with --allow {name}"


def manifest_entry(checks: Checks, allow: Iterable[str]) -> dict:
    """What the manifest keeps of the gate."""
    return {"checked": list(checks), "allowed": {name: checks[name] for name in allow if checks.get(name)}}
