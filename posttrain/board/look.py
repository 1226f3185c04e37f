"""How the board looks: Gradio's plainest theme with the system's own fonts, and the style sheet of view.py.

In: nothing. Out: `theme()` and `CSS`. Nothing is loaded from anywhere; light and dark follow the browser's wish.
"""

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme():
    """A Gradio theme that asks for no web font: a plain string is a font of the system."""
    import gradio as gr

    return gr.themes.Base(primary_hue="teal", neutral_hue="gray", radius_size="md", font=SANS, font_mono=MONO).set(
        body_background_fill="#fcfcfb",
        body_background_fill_dark="#14171a",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1b1f23",
        block_border_color="#e4e6e8",
        block_border_color_dark="#2c3238",
        button_primary_background_fill="#12685a",
        button_primary_background_fill_hover="#0f574b",
        button_primary_background_fill_dark="#1f7a6a",
        button_primary_background_fill_hover_dark="#268f7c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )


CSS = """
:root { --ink: #1d2126; --soft: #5d6670; --rule: #e4e6e8; --bad: #a4262c; --box: #f4f5f5;
  --c0: #c4e6cf; --c1: #e2efc0; --c2: #fbf0b8; --c3: #fad2ae; --c4: #f6b6b0;
  --system: #7d3c98; --user: #1f5fa8; --assistant: #12685a; --tool: #8a5a00; --other: #6b747d; --low: 10%;
  --high: 26%; }
.dark { --ink: #e3e6e8; --soft: #a3acb4; --rule: #2c3238; --bad: #ff8f87; --box: #22272c;
  --c0: #1f4d31; --c1: #3f5120; --c2: #5c5015; --c3: #6b401c; --c4: #6f2c28;
  --system: #c58ade; --user: #7fb2ee; --assistant: #5fc9b3; --tool: #e0ac4d; --other: #97a1aa; --low: 16%;
  --high: 36%; }
.gradio-container { max-width: 1280px !important; width: 100%; margin: 0 auto; }
#talk-box { max-height: max(320px, 58vh); overflow-y: auto; }
.board-head { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; color: var(--ink); }
.board-head h1 { font-size: 22px; letter-spacing: -.01em; margin: 0; }
.board-head span { color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
.talk { display: flex; flex-direction: column; gap: 12px; color: var(--ink); padding: 4px; }
.talk .empty { color: var(--soft); margin: 24px auto; text-align: center; max-width: 40em; }
article.message { border-radius: 10px; padding: 8px 14px 10px; background: var(--box); max-width: 92%;
  align-self: flex-start; overflow-wrap: anywhere; }
article.message.user { align-self: flex-end; background: color-mix(in srgb, var(--user) 14%, transparent); }
article.message.completion { max-width: 100%; align-self: stretch; }
article.message h4 { font-size: 12px; font-weight: 600; color: var(--soft); margin: 0 0 2px; }
.said { white-space: pre-wrap; unicode-bidi: isolate; line-height: 1.5; font-size: 15px; color: var(--ink); }
details.call, p.call { margin: 6px 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  color: var(--tool); border-left: 3px solid var(--tool); padding-left: 8px; }
details.call summary { cursor: pointer; overflow-wrap: anywhere; }
details.call pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; color: var(--ink); margin: 4px 0 0;
  max-height: 16em; overflow-y: auto; unicode-bidi: isolate; }
details.call.failed, details.call.failed summary { color: var(--bad); border-color: var(--bad); }
.said em { font-style: normal; color: var(--soft); }
article.message[aria-busy=true] > .said:last-child::after { content: "\\25AE"; color: var(--soft);
  animation: board-blink 1s steps(2) infinite; }
@keyframes board-blink { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .message[aria-busy=true] .said::after { animation: none; } }
p.note { color: var(--soft); font-size: 13px; margin: 4px 0 0; }
p.error { color: var(--bad); font-size: 14px; margin: 4px 0; font-weight: 500; }
.tokens { color: var(--ink); margin: 0 0 16px; }
.tokens h4 { font-size: 14px; margin: 0 0 6px; }
.tokens h4 span { font-weight: 400; color: var(--soft); }
.cells, .legend { font: 13px/1.3 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 6px; align-items: center; margin: 0 0 10px; }
.legend > span:last-child { color: var(--soft); font-family: system-ui, sans-serif; }
.t { --c: var(--other); position: relative; display: inline-flex; flex-direction: column; vertical-align: top;
  margin: 0 2px 4px 0; padding: 2px 3px; border-radius: 3px;
  background: color-mix(in srgb, var(--c) var(--low), transparent); border-bottom: 2px solid transparent;
  unicode-bidi: isolate; max-width: 100%; color: var(--ink); }
.t b { font-weight: 400; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 1.3em; color: inherit; }
.t small { font-size: 10px; color: var(--soft); }
.c0 { background: var(--c0); }
.c1 { background: var(--c1); }
.c2 { background: var(--c2); }
.c3 { background: var(--c3); }
.c4 { background: var(--c4); }
.t[data-more]:hover::after, .t[data-more]:focus::after { content: attr(data-more); position: absolute; top: 100%;
  left: 0; z-index: 20; white-space: pre; padding: 6px 10px;
  border-radius: 6px; background: var(--ink); color: var(--body-background-fill); font-size: 12px;
  line-height: 1.45; box-shadow: 0 2px 10px rgb(0 0 0 / .3); pointer-events: none; }
.t[data-more]:focus { outline: 2px solid var(--ink); }
.turn { display: grid; grid-template-columns: 84px minmax(0, 1fr); gap: 8px; }
.turn h5 { font: 13px/1.9 system-ui, sans-serif; margin: 0; color: var(--c); }
.turn .t { --c: inherit; }
.turn.system, .turn.system .t { --c: var(--system); }
.turn.user, .turn.user .t { --c: var(--user); }
.turn.assistant, .turn.assistant .t { --c: var(--assistant); }
.turn.tool, .turn.tool .t { --c: var(--tool); }
.turn.other, .turn.other .t { --c: var(--other); }
.legend .turn { display: inline; }
.t.m { background: color-mix(in srgb, var(--c) var(--high), transparent); border-bottom-color: var(--c); }
.t.c b { font-weight: 600; color: var(--c); }
.source { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--ink);
  background: var(--box); padding: 12px; border-radius: 8px; margin: 0; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px;
  align-items: start; }
.beside .message { max-width: none; height: 100%; }
@media (max-width: 640px) { .turn { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .t[data-more]:hover::after, .t[data-more]:focus::after { position: fixed; left: 8px; right: 8px; bottom: 8px;
  top: auto; white-space: pre-wrap; } }
"""
