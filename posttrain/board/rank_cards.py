"""The cards of the arena: replies that are put in order by drag, by numbers or by keys.

In: `cards(item)`, what the browser may know of an item. Out: the component's value, in which the browser fills
`places` (1 the best, equal numbers = tied, null = none yet), one for each label. The script builds every element and
sets texts as text, so that a reply is never read as HTML; the template itself holds no value.

A card's number does not move it until all cards have one; then they stand in order. A drag places all cards as they
stand; a card dropped between two that are tied joins them.
"""

from posttrain.board.votes import Item
from posttrain.serve import printable

LABELS = "ABCDEFGH"

HTML = """<div class="rank"><p class="rank-prompt"></p><ol class="rank-cards" aria-label="replies, best first"></ol>
<p class="rank-state" role="status"></p></div>"""

CSS = """
.rank-prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; margin: 0 0 .5rem; }
.rank-cards { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
.rank-card { display: grid; grid-template-columns: auto 1fr; border: 1px solid var(--border-color-primary);
  border-radius: .5rem; background: var(--block-background-fill); color: var(--body-text-color); }
.rank-card:focus-visible { outline: 2px solid var(--color-accent); }
.rank-card.held { opacity: .75; border-style: dashed; }
.rank-handle { touch-action: none; cursor: grab; user-select: none; padding: .5rem .75rem; font-weight: 700;
  border-right: 1px solid var(--border-color-primary); display: flex; flex-direction: column; align-items: center; }
.rank-handle::after { content: "⠿"; font-weight: 400; opacity: .6; }
.rank-body { padding: .5rem .75rem; min-width: 0; }
.rank-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 60vh; overflow: auto; }
.rank-text.empty { font-style: italic; opacity: .7; }
.rank-who { font-weight: 600; margin-top: .25rem; }
.rank-numbers { display: flex; flex-wrap: wrap; gap: .25rem; margin-top: .5rem; align-items: center; }
.rank-numbers button { min-width: 2.5rem; min-height: 2.25rem; border: 1px solid var(--border-color-primary);
  border-radius: .375rem; background: transparent; color: inherit; cursor: pointer; }
.rank-numbers button[aria-pressed="true"] { background: var(--button-primary-background-fill);
  color: var(--button-primary-text-color); }
.rank-state { min-height: 1.5em; opacity: .8; margin: .5rem 0 0; }
"""

SCRIPT = r"""
const list = element.querySelector('.rank-cards'), state = element.querySelector('.rank-state');
let places = [], order = [], open = false;

function make(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
const replies = () => (props.value && props.value.replies) || [];
const label = index => replies()[index].label;
const whole = () => places.every(place => place !== null);
const dense = () => {
  const kinds = [...new Set(places.filter(place => place !== null))].sort((a, b) => a - b);
  places = places.map(place => place === null ? null : kinds.indexOf(place) + 1);
};
function changed() {
  if (whole()) order = [...order].sort((a, b) => places[a] - places[b]);
  props.value = {...props.value, places: [...places]};
  draw();
}
function give(index, place) {
  if (!open) return;
  places[index] = places[index] === place ? null : place;
  changed();
}
function move(index, to) {
  if (!open) return;
  const rest = order.filter(other => other !== index);
  to = Math.max(0, Math.min(rest.length, to));
  const before = rest[to - 1], after = rest[to];
  const joins = before !== undefined && after !== undefined && places[before] !== null
    && places[before] === places[after];
  const ranks = [];
  let rank = 0;
  rest.forEach((other, at) => {
    const tied = at > 0 && places[other] !== null && places[other] === places[rest[at - 1]];
    if (at === to && !joins) rank += 1;
    if (!tied) rank += 1;
    ranks[at] = rank;
  });
  const own = joins ? ranks[to - 1] : to === 0 ? 1 : ranks[to - 1] + 1;
  rest.forEach((other, at) => { places[other] = ranks[at]; });
  places[index] = own;
  rest.splice(to, 0, index);
  order = rest;
  dense();
  changed();
}
function drag(card, index, event) {
  if (!open || event.button > 0) return;
  event.preventDefault();
  card.classList.add('held');
  const end = new AbortController(), until = {signal: end.signal};
  // On the document: a card that moves in the list loses its hold on the pointer.
  document.addEventListener('pointermove', e => {
    const edge = e.clientY < 60 ? -12 : e.clientY > innerHeight - 60 ? 12 : 0;
    if (edge) scrollBy(0, edge);
    const next = [...list.children].find(other => {
      const box = other.getBoundingClientRect();
      return other !== card && e.clientY < box.top + box.height / 2;
    });
    if (next ? card.nextSibling !== next : list.lastChild !== card) list.insertBefore(card, next || null);
  }, until);
  document.addEventListener('pointerup', () => {
    end.abort();
    move(index, [...list.children].indexOf(card));
  }, until);
  document.addEventListener('pointercancel', () => {
    end.abort();
    draw();
  }, until);
}
function keys(index, event) {
  if (event.target !== event.currentTarget || event.ctrlKey || event.metaKey || event.altKey) return;
  const number = Number(event.key), at = order.indexOf(index);
  if (number >= 1 && number <= replies().length) give(index, number);
  else if (event.key === 'ArrowUp') move(index, at - 1);
  else if (event.key === 'ArrowDown') move(index, at + 1);
  else return;
  event.preventDefault();
}
function card(index) {
  const reply = replies()[index], made = make('li', 'rank-card');
  made.tabIndex = 0;
  made.dataset.label = reply.label;
  made.setAttribute('aria-label', 'reply ' + reply.label);
  made.addEventListener('keydown', event => keys(index, event));
  const handle = make('div', 'rank-handle', reply.label);
  handle.title = 'drag to its place';
  handle.addEventListener('pointerdown', event => drag(made, index, event));
  const body = make('div', 'rank-body');
  const said = reply.text.trim();
  body.append(said ? make('div', 'rank-text', reply.text) : make('div', 'rank-text empty', 'an empty reply'));
  if (reply.who) body.append(make('div', 'rank-who', reply.who));
  const numbers = make('div', 'rank-numbers');
  numbers.append(make('span', '', 'place'));
  for (let place = 1; place <= replies().length; place++) {
    const button = make('button', '', String(place));
    button.type = 'button';
    button.disabled = !open;
    button.setAttribute('aria-label', 'reply ' + reply.label + ': place ' + place);
    button.setAttribute('aria-pressed', String(places[index] === place));
    button.addEventListener('click', () => give(index, place));
    numbers.append(button);
  }
  body.append(numbers);
  made.append(handle, body);
  return made;
}
function summary() {
  if (!replies().length) return '';
  if (places.every(place => place === null)) return open ? 'Drag the replies into order, or give each its place.' : '';
  const left = order.filter(index => places[index] === null);
  if (left.length) return 'No place yet: ' + left.map(label).join(', ');
  return order.map((index, at) => (at === 0 ? '' : places[index] === places[order[at - 1]] ? ' = ' : ' > ')
    + label(index)).join('');
}
function draw() {
  const active = element.contains(document.activeElement) ? document.activeElement : null;
  const own = active && active.closest('.rank-card');
  const focused = own && [own.dataset.label, active === own ? null : active.getAttribute('aria-label')];
  element.querySelector('.rank-prompt').textContent = (props.value && props.value.prompt) || '';
  list.replaceChildren(...order.map(card));
  state.textContent = summary();
  const again = focused && [...list.children].find(made => made.dataset.label === focused[0]);
  if (again) (focused[1] ? again.querySelector('[aria-label="' + focused[1] + '"]') : again).focus();
}
function load() {
  places = replies().map((reply, index) => (props.value.places || [])[index] ?? null);
  order = replies().map((reply, index) => index);
  open = Boolean(props.value && props.value.open);
  if (places.length && whole()) order.sort((a, b) => places[a] - places[b]);
  draw();
}
watch('value', load);
load();
"""


def prompt_text(prompt: list[dict]) -> str:
    """The turns as text; a lone question without its role."""
    if len(prompt) == 1:
        return printable(prompt[0]["content"])
    return "\n".join(printable(f"{turn['role']}: {turn.get('content') or ''}") for turn in prompt)


def cards(item: Item, places: list[int] | None = None, *, reveal: bool = False) -> dict:
    """What the browser is told: labels and texts; who wrote what only where `reveal`, when nothing can be changed."""
    replies = [
        {"label": label, "text": printable(text)} | ({"who": model} if reveal else {})
        for label, (model, text) in zip(LABELS, item.shown, strict=False)
    ]
    places = [None] * len(replies) if places is None else places
    return {"prompt": prompt_text(item.prompt), "replies": replies, "places": places, "open": not reveal}
