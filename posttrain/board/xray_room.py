"""The room that shows any text as tokens, under a stage's tokenizer and chat template.

In: a `Pool`. Out: components in the open tab. A text alone, or a small conversation; ids and roles, what SFT would
learn of it, and on demand the probability that the stage gives each token.
"""

import json

from posttrain.board import controls, view
from posttrain.board.stages import MOST_CHARACTERS, Pool, check_text
from posttrain.errors import UserError

ROLES = ("system", "user", "assistant", "user", "assistant")
KINDS = ("Text", "Conversation", "Messages as JSON")
MOST_SCORED = 8192
EXAMPLE = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]'


def room(pool: Pool) -> None:
    """Build the room inside the open tab."""
    import gradio as gr

    with gr.Row():
        stage = gr.Dropdown(
            controls.choices(pool), value=controls.newest(pool), label="Tokenizer and template of", filterable=False
        )
        kind = gr.Radio(KINDS, value="Text", label="What to look at")
    limits = {"max_length": MOST_CHARACTERS, "max_lines": 16}
    text = gr.Textbox(label="Text", lines=3, placeholder="Any text; control tokens typed here stay text", **limits)
    with gr.Column(visible=False) as turns:
        fields = [gr.Textbox(label=f"{n + 1}. {role}", lines=1, **limits) for n, role in enumerate(ROLES)]
    code = gr.Textbox(label="Messages", lines=4, placeholder=EXAMPLE, visible=False, **limits)
    with gr.Row():
        opened = gr.Checkbox(False, label="Open the assistant's reply at the end", visible=False)
        scored = gr.Checkbox(False, label="Probabilities of the stage's model")
    look = gr.Button("Show tokens", variant="primary")
    shown = gr.HTML("", apply_default_css=False)

    quick = {"show_progress": "hidden", "api_visibility": "private"}
    kind.change(
        lambda kind: [gr.update(visible=kind == each) for each in KINDS] + [gr.update(visible=kind != "Text")],
        kind, [text, turns, code, opened], concurrency_limit=None, **quick,
    )  # fmt: skip
    inputs = [stage, kind, opened, scored, text, code, *fields]
    gr.on([look.click, text.submit], lambda *values: page(pool, *values), inputs, shown, concurrency_limit=2, **quick)


def page(pool: Pool, stage: str, kind: str, opened: bool, scored: bool, text: str, code: str, *fields: str) -> str:
    """The tokens, or in words why there are none."""
    try:
        for each in (text, code, *fields):
            check_text(each or "", "the text")
        if kind == "Text":
            return _text(pool, stage, text, scored)
        written = zip(ROLES, fields, strict=True)
        messages = [{"role": role, "content": each} for role, each in written if each]
        return _conversation(pool, stage, read_messages(code) if kind == KINDS[2] else messages, opened, scored)
    except UserError as error:
        return str(view.note(str(error), "error"))


def read_messages(code: str) -> list[dict]:
    """Messages from JSON. Raises UserError that says what is not as it should be."""
    try:
        messages = json.loads(code)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the messages are not JSON ({error}); expected {EXAMPLE}") from error
    fine = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    if not fine or not messages:
        raise UserError(f"expected a list of messages, each with a role; for example {EXAMPLE}")
    return messages


def _text(pool: Pool, stage: str, text: str, scored: bool) -> str:
    from posttrain.tokenizer import bytes_per_token

    tokenizer = pool.tokenizer(stage)
    ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
    if not ids:
        raise UserError("the text is empty; write some")
    rate = f"{len(ids)} tokens, {len(text):,} characters, {bytes_per_token(tokenizer, [text]):.2f} bytes a token"
    if scored:
        from posttrain.base_evals import document_start

        return _by_probability(pool, stage, document_start(tokenizer) + ids, rate)
    return str(view.plain(tokenizer, ids, rate))


def _conversation(pool: Pool, stage: str, messages: list[dict], opened: bool, scored: bool) -> str:
    from posttrain.chat import encode_chat

    tokenizer = pool.tokenizer(stage)
    if not tokenizer.chat_template:
        raise UserError(f"{stage} is a base model without a chat template: look at a text, or choose a chat model")
    if not messages:
        raise UserError("the conversation is empty; write a message")
    encoded = encode_chat(tokenizer, messages, add_generation_prompt=opened)
    rate = f"{len(encoded.input_ids)} tokens, {sum(encoded.assistant_mask)} of them learned by SFT"
    if scored:
        return _by_probability(pool, stage, encoded.input_ids, rate)
    tokens = view.conversation(tokenizer, messages, encoded.input_ids, encoded.assistant_mask, opened)
    return str(view.role_legend("learned by SFT") + view.by_role(tokens, "Conversation", rate))


def _by_probability(pool: Pool, stage: str, ids: list[int], rate: str) -> str:
    from posttrain.complete_view import score
    from posttrain.conversations import token_reader

    if len(ids) > MOST_SCORED:
        raise UserError(f"the text has {len(ids)} tokens; probabilities are looked up for {MOST_SCORED} at most")
    with pool.use(stage) as loaded:
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) > limit:
            raise UserError(f"the text has {len(ids)} tokens; the model's context holds {limit}: shorten it")
        with loaded.lock:
            tokens = score(loaded.model, ids, token_reader(loaded.tokenizer))
    nats = [token.nats for token in tokens if token.nats is not None]
    mean = f", -log p {sum(nats) / len(nats):.3f} a token" if nats else ""
    return str(view.probability_legend() + view.by_probability(tokens, "Tokens", rate + mean))
