"""The board's third room: blind replies, put in order by a person, and the ratings that come of it.

In: a `Pool` of models, a `Votes` folder, prompts to draw from if there are any. Out: the room's components inside an
open `gr.Tab`; every vote is on the disk before the page says so.
Launched by `posttrain board RUN`.

    with gr.Tab("Arena"):
        arena_room.room(pool, Votes("runs/tiny/votes"), prompts)
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from posttrain.board import arena, controls, rank_cards, rating_view
from posttrain.board.stages import MOST_CHARACTERS, Pool
from posttrain.board.view import note
from posttrain.board.votes import MOST_CHARS, MOST_REPLIES, ROWS, Item, Votes
from posttrain.errors import UserError

# What a labeller is asked to weigh follows the idea of Ouyang et al. (2022, arXiv 2203.02155), appendix B.
INSTRUCTIONS = """
Put the replies in order, best first. Weigh three things:

- **Helpful**: does it do what the prompt asks, in full and in a form that can be used? Where the prompt is unclear, a
  good reply says how it understood it, or asks.
- **Truthful**: is what it states right, and does it say so where it does not know? Check what you can check. A wrong
  answer that sounds sure is worse than an honest "I do not know".
- **Harmless**: would acting on it, or reading it, hurt somebody? Then it stands last, however well it is written.

Truthful and harmless come before helpful, unless the harm is small and the help is great.

- **Ties**: give the same number to replies between which you would not choose. Do not toss a coin.
- **Refusals**: right where helping would do harm, and best if they say why. Where nothing speaks against helping, a
  refusal stands below every reply that honestly tries.
- **Length**: a reply is not better because it is longer, nor because it is shorter. What counts is what it gives.
- **Bad replies** are ranked, too: the least bad first. **Skip** only what you cannot judge, and say why.
"""
REASONS = ["I cannot judge this", "The prompt makes no sense", "The replies are all the same", "Something else"]
NOBODY = {"prompt": "", "replies": [], "places": [], "open": False}


@dataclass
class Ballot:
    """What one browser tab has before it. It stays on the server: the browser must not know early who wrote what.
    `ticket` counts what was begun: who holds an older one has to stop."""

    item: Item | None = None
    since: float = 0.0
    votes: list[str] = field(default_factory=list)  # ids of this visit, for undo
    ticket: int = 0

    def begin(self) -> int:
        """Forget what was shown; whatever is still being written ends."""
        self.item, self.ticket = None, self.ticket + 1
        return self.ticket

    def seconds(self) -> float:
        return round(time.monotonic() - self.since, 1)


def room(pool: Pool, votes: Votes, prompts: arena.Prompts | None = None) -> None:
    """Build the room inside an open `gr.Tab`."""
    import gradio as gr

    ballot, desk = gr.State(Ballot()), Desk(pool, votes, prompts)
    with gr.Accordion("How to rank", open=True):
        gr.Markdown(INSTRUCTIONS)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=8, max_length=MOST_CHARACTERS, elem_id="arena-prompt",
                placeholder="Enter asks, Shift+Enter begins a line",
            )  # fmt: skip
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", min_width=80)
                draw = gr.Button("Draw a prompt", visible=prompts is not None, min_width=120)
                stop = gr.Button("Stop", visible=False, min_width=80)
            status = gr.HTML(lambda: str(note(_count(votes))), elem_id="arena-status", apply_default_css=False)
            cards = gr.HTML(
                NOBODY, html_template=rank_cards.HTML, css_template=rank_cards.CSS, js_on_load=rank_cards.SCRIPT,
                apply_default_css=False, elem_id="arena-cards",
            )  # fmt: skip
            with gr.Row():
                comment = gr.Textbox(
                    label="Comment", max_length=MOST_CHARS["comment"], scale=3, elem_id="arena-comment"
                )
                labeller = gr.Textbox(label="Your name, if you like", max_length=MOST_CHARS["labeller"], scale=1)
            with gr.Row():
                vote = gr.Button("Vote", variant="primary", interactive=False, min_width=120)
                undo = gr.Button("Undo my last vote", interactive=False, min_width=120)
            with gr.Row(equal_height=True):
                reason = gr.Dropdown(REASONS, value=REASONS[0], label="If you skip: why", min_width=200)
                skip = gr.Button("Skip", interactive=False, min_width=120)
        with gr.Column(scale=1, min_width=260):
            chat = [name for name, entry in pool.entries.items() if not entry.is_base] or pool.names
            names = gr.Dropdown(
                controls.choices(pool), value=chat, multiselect=True, label="Stages", info="one alone: its samples"
            )
            num = gr.Slider(2, MOST_REPLIES, min(4, max(2, len(chat))), step=1, label="Replies")
            with gr.Accordion("Sampling", open=False):
                how = controls.settings(system=False)
    told = [status, cards, vote, skip, undo, stop]
    given = [ballot, names, num, *how]
    gr.on([ask.click, prompt.submit], desk.ask, [prompt, *given], told, trigger_mode="multiple", **controls.SAMPLING)
    draw.click(desk.draw, given, told, trigger_mode="multiple", **controls.SAMPLING)
    stop.click(desk.stop, ballot, told, **controls.QUICK)
    one = {**controls.QUICK, "concurrency_id": "votes", "concurrency_limit": 1}  # a double click is one vote
    vote.click(desk.vote, [ballot, cards, comment, labeller], [*told, comment], **one)
    skip.click(desk.skip, [ballot, reason, comment, labeller], [*told, comment], **one)
    undo.click(desk.undo, ballot, told, **one)
    with gr.Accordion("Ratings", open=False):
        refresh = gr.Button("Count the votes")
        ratings = gr.HTML(css_template=rating_view.CSS, apply_default_css=False)
        learn = f"recipes/reward.py learns from these votes: --dataset_name {votes.folder / ROWS}"
        gr.HTML(str(note(learn)), apply_default_css=False)
    refresh.click(lambda: _ratings(votes), None, ratings, **controls.QUICK)


class Desk:
    """What the buttons do. Each gives what `told` in `room` names: status, cards, and which buttons work."""

    def __init__(self, pool: Pool, votes: Votes, prompts: arena.Prompts | None):
        self.pool, self.votes, self.prompts = pool, votes, prompts

    def ask(self, text: str, ballot: Ballot, *given) -> Iterator[tuple]:
        """The replies to a typed prompt."""
        try:
            prompt = arena.typed(text)
        except UserError as error:
            yield _told(error, ballot)
            return
        yield from self._ask(prompt, "typed", ballot, *given)

    def draw(self, ballot: Ballot, *given) -> Iterator[tuple]:
        """The replies to a prompt of the data set."""
        yield from self._ask(self.prompts.draw(), self.prompts.source, ballot, *given)

    def _ask(self, prompt, source, ballot: Ballot, names, num, *how) -> Iterator[tuple]:
        mine, ready = ballot.begin(), None
        try:
            for found in arena.ask(self.pool, names, num, prompt, controls.read(*how), source):
                if ballot.ticket != mine:
                    return
                if isinstance(found, Item):
                    ballot.item, ballot.since = found, time.monotonic()
                elif found != ready:
                    ready = found
                    yield _told(f"{ready} replies are ready, the next is being written", ballot, NOBODY, busy=True)
        except UserError as error:
            yield _told(error, ballot, NOBODY)
            return
        yield _told("Who wrote what is shown after your vote.", ballot, rank_cards.cards(ballot.item))

    def stop(self, ballot: Ballot) -> tuple:
        ballot.begin()
        return _told("Stopped.", ballot, NOBODY)

    def vote(self, ballot: Ballot, value, comment: str, labeller: str) -> tuple:
        """Store the order that the browser sends, then say who wrote what."""
        item = ballot.item
        if item is None:
            return *_told(UserError("there is nothing to vote on; ask for replies first"), ballot), comment
        try:
            places = _places(value, len(item.shown))
            said = {"labeller": labeller, "comment": comment, "seconds": ballot.seconds()}
            ballot.votes.append(self.votes.vote(item, places, **said))
        except (UserError, OSError) as error:
            return *_told(error, ballot), comment
        ballot.begin()
        shown = rank_cards.cards(item, value["places"], reveal=True)
        return *_told(f"Saved. {_count(self.votes)}", ballot, shown), ""

    def skip(self, ballot: Ballot, reason: str, comment: str, labeller: str) -> tuple:
        """Store that nothing was ranked."""
        if ballot.item is None:
            return *_told(UserError("there is nothing to skip; ask for replies first"), ballot), comment
        try:
            said = {"labeller": labeller, "comment": comment, "seconds": ballot.seconds()}
            self.votes.skip(ballot.item, reason, **said)
        except (UserError, OSError) as error:
            return *_told(error, ballot), comment
        ballot.begin()
        return *_told(f"Skipped. {_count(self.votes)}", ballot, NOBODY), ""

    def undo(self, ballot: Ballot) -> tuple:
        """Take back this visitor's last vote. It is not asked again: who wrote what is known by now."""
        if not ballot.votes:
            return _told(UserError("you have no vote to take back"), ballot)
        try:
            self.votes.cancel(ballot.votes.pop())
        except (UserError, OSError) as error:
            return _told(error, ballot)
        return _told(f"Your last vote is taken back. {_count(self.votes)}", ballot)


def _places(value, num: int) -> list[int]:
    """`places` of the cards' value, 0 the best. UserError where one is missing; what else a browser may send, too."""
    places = value.get("places") if isinstance(value, dict) else None
    if not isinstance(places, list) or len(places) != num:
        raise UserError(f"the order has to name a place for each of {num} replies; load the page again")
    fine = [isinstance(p, int) and not isinstance(p, bool) and 1 <= p <= num for p in places]
    if not all(fine):
        left = ", ".join(label for label, is_fine in zip(rank_cards.LABELS, fine, strict=False) if not is_fine)
        raise UserError(f"give each reply a place from 1 to {num}; still without one: {left}")
    return [place - 1 for place in places]


def _told(said: str | Exception, ballot: Ballot, cards=None, *, busy: bool = False) -> tuple:
    import gradio as gr

    kind = "error" if isinstance(said, Exception) else "note"
    can = gr.update(interactive=ballot.item is not None and not busy)
    shown = gr.skip() if cards is None else cards
    undo = gr.update(interactive=bool(ballot.votes) and not busy)
    return str(note(str(said), kind)), shown, can, can, undo, gr.update(visible=busy)


def _count(votes: Votes) -> str:
    counts = votes.counts()
    left = counts["standing"] - counts["rows"]
    unusable = f" {left} of them hold an empty reply and are rated, not learned from." if left else ""
    number = counts["standing"]
    return f"{number} vote{' stands' if number == 1 else 's stand'} in {votes.folder}.{unusable}"


def _ratings(votes: Votes) -> str:
    from posttrain.board.ratings import rate

    return rating_view.page(rate(votes.read()))
