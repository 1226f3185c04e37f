"""Ratings of stages from votes: Bradley-Terry by maximum likelihood, in Elo points, with intervals.

In: votes as `Votes.read` gives them. Out: `rate(votes)`, a dict of ratings, win rates and what length and position
did, as rating_view.py shows them in the board and `posttrain ratings RUN` in a terminal.

The model is Davidson's (1970), which adds ties to Bradley and Terry (1952): with strengths p = exp(theta),

    P(i beats j) = p_i / D,    P(tie) = nu sqrt(p_i p_j) / D,    D = p_i + p_j + nu sqrt(p_i p_j).

Rao and Kupper (1967) make a tie a matter of a threshold; Davidson's is an exponential family, so that its likelihood
is concave and a tie counts as half a win: stages come in the order of their points where all met equally often.
Without ties it is Bradley-Terry. A ranking of K replies counts as its K (K - 1) / 2 pairs: under Plackett-Luce each of
them follows Bradley-Terry (Luce 1959), so the estimate is consistent; the pairs of a ranking are not independent, so
intervals come from drawing prompts anew, with all their votes. A normal prior on theta and log nu, PRIOR wide, keeps a
stage that never lost at a finite rating; after a few dozen votes it does not matter.
"""

from dataclasses import dataclass

import numpy as np

POINTS = 400 / np.log(10)  # Elo points of a unit of theta: 400 points are odds of 10 to 1 (Elo 1978)
MEAN = 1000.0  # of all stages
PRIOR = 2.0  # standard deviation of theta, 347 points
RESAMPLES = 1000


@dataclass(frozen=True)
class Comparisons:
    """Pairs of different models by prompt. wins (C, M, M): row beat column; ties (C, M, M): symmetric, each tie in
    both halves; lengths, firsts (C, 2): pairs won by the longer reply (by the one shown first), and how many."""

    models: list[str]
    wins: np.ndarray
    ties: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray


def compare(votes: list[dict]) -> Comparisons:
    """Votes (`prompt`, `shown`, `places`) as counts; a cluster is a prompt, whatever labellers voted on it."""
    names = _told_apart(votes)
    models = sorted(set(names.values()))
    prompts: dict[str, int] = {}
    where = [prompts.setdefault(repr(vote["prompt"]), len(prompts)) for vote in votes]
    wins, ties = (np.zeros((len(prompts), len(models), len(models))) for _ in range(2))
    lengths, firsts = np.zeros((len(prompts), 2)), np.zeros((len(prompts), 2))
    for cluster, vote in zip(where, votes, strict=True):
        shown, places = vote["shown"], vote["places"]
        numbers = [models.index(names[reply["model"], _weights(vote, reply["model"])]) for reply in shown]
        sizes = [len(reply["text"]) for reply in shown]
        for a in range(len(shown)):
            for b in range(a + 1, len(shown)):
                if places[a] == places[b]:
                    if numbers[a] != numbers[b]:
                        ties[cluster, [numbers[a], numbers[b]], [numbers[b], numbers[a]]] += 1
                    continue
                better, worse = (a, b) if places[a] < places[b] else (b, a)
                if numbers[a] != numbers[b]:
                    wins[cluster, numbers[better], numbers[worse]] += 1
                firsts[cluster] += better == a, 1
                if sizes[a] != sizes[b]:
                    lengths[cluster] += sizes[better] > sizes[worse], 1
    return Comparisons(models, wins, ties, lengths, firsts)


def _weights(vote: dict, model: str) -> str:
    """The SHA-256 of a model's weights when it was voted on; "" where that is not known."""
    facts = vote.get("settings", {}).get("models", {}).get(model, {})
    return " ".join(sorted(facts.get("sha256", {}).values()))


def _told_apart(votes: list[dict]) -> dict[tuple[str, str], str]:
    """(name, weights) -> its name here: a stage trained anew under its old name is another player."""
    seen = {(reply["model"], _weights(vote, reply["model"])): None for vote in votes for reply in vote["shown"]}
    several = {name for name, _ in seen if sum(other == name for other, _ in seen) > 1}
    return {(name, sha): f"{name} ({sha[:6] or '?'})" if name in several else name for name, sha in seen}


def fit(wins: np.ndarray, ties: np.ndarray, prior: float = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """(theta (..., M) with mean 0, nu (...)) that maximize Davidson's likelihood by Newton's method.

    wins, ties: (..., M, M) as in `Comparisons`, summed. prior: standard deviation, `math.inf` for none; without one
    a stage that never lost has no maximum and ends at some large rating. nu is 0 where nothing was tied.
    """
    num = wins.shape[-1]
    games = wins + wins.swapaxes(-1, -2) + ties  # (..., M, M), symmetric
    points = (wins + ties / 2).sum(-1)  # (..., M)
    tied = ties.sum((-1, -2)) / 2  # (...)
    free = tied > 0
    theta, log_nu = np.zeros(points.shape), np.zeros(tied.shape)
    for _ in range(200):
        gap = theta[..., :, None] - theta[..., None, :]
        nu = np.where(free, np.exp(log_nu), 0.0)[..., None, None]
        parts = np.exp(gap / 2), np.exp(-gap / 2), np.broadcast_to(nu, gap.shape)
        total = sum(parts)
        win, loss, tie = (part / total for part in parts)
        lean = (win - loss) / 2  # mean of the pair's statistic: 1/2 won, -1/2 lost, 0 tied
        slope = points - (games * (win + tie / 2)).sum(-1) - theta / prior**2
        slope_nu = np.where(free, tied - (games * tie).sum((-1, -2)) / 2 - log_nu / prior**2, 0.0)
        spread = games * ((win + loss) / 4 - lean**2)  # information about theta_i - theta_j
        hessian = np.zeros((*tied.shape, num + 1, num + 1))
        hessian[..., :num, :num] = -spread + 1.0  # the ones fix the mean, which games say nothing about, at 0
        index = np.arange(num)
        hessian[..., index, index] += spread.sum(-1) + 1 / prior**2
        mixed = np.where(free[..., None], -(games * tie * lean).sum(-1), 0.0)
        hessian[..., :num, num] = hessian[..., num, :num] = mixed
        about_nu = (games * tie * (1 - tie)).sum((-1, -2)) / 2 + 1 / prior**2
        hessian[..., num, num] = np.where(free, about_nu, 1.0)
        step = np.linalg.solve(hessian, np.concatenate([slope, slope_nu[..., None]], -1)[..., None])[..., 0]
        step = np.clip(step, -1.0, 1.0)  # far from the maximum Newton's step may overshoot
        step[..., :num] -= step[..., :num].mean(-1, keepdims=True)
        theta, log_nu = theta + step[..., :num], log_nu + step[..., num]
        if np.abs(step).max(initial=0.0) < 1e-8:
            break
    return theta, np.where(free, np.exp(log_nu), 0.0)


def rate(votes: list[dict], prior: float = PRIOR) -> dict:
    """Ratings of all models that `votes` compare, best first, and what stands beside them.

    models: `{"model", "rating": {value, low, high, n}, "wins", "losses", "ties"}`, n pairs, the 95 % interval by
    bootstrap over prompts, None for fewer than two; matrix: model -> other -> win rate (ties half) or None; `groups`:
    more than one where no chain of votes links all models, so that ratings across groups mean nothing; `nu`;
    `longer`, `first`: share of decided pairs won by the longer reply and by the one shown first.
    """
    found = compare(votes)
    wins, ties = found.wins.sum(0), found.ties.sum(0)
    games = wins + wins.T + ties
    met = [i for i in range(len(found.models)) if games[i].any()]
    names = [found.models[i] for i in met]
    picked = np.ix_(met, met)
    theta, nu = fit(wins[picked], ties[picked], prior) if met else (np.zeros(0), np.zeros(()))
    low, high = _interval(found.wins[:, *picked], found.ties[:, *picked], prior) if met else (theta, theta)
    clusters = len(found.wins)
    models = []
    for place in np.argsort(-theta, kind="stable"):
        i = met[place]
        ends = (low[place], high[place]) if clusters > 1 else (None, None)
        scale = [None if value is None else float(MEAN + POINTS * value) for value in (theta[place], *ends)]
        rating = dict(zip(("value", "low", "high"), scale, strict=True)) | {"n": int(games[i].sum()), "unit": "Elo"}
        counted = {"wins": int(wins[i].sum()), "losses": int(wins[:, i].sum()), "ties": int(ties[i].sum())}
        models.append({"model": found.models[i], "rating": rating} | counted)
    with np.errstate(invalid="ignore"):
        rates = (wins + ties / 2) / games
    matrix = {
        a: {b: None if np.isnan(rates[i, j]) else float(rates[i, j]) for j, b in zip(met, names, strict=True)}
        for i, a in zip(met, names, strict=True)
    }
    return {
        "models": models, "matrix": matrix, "groups": _groups(games[picked], names), "nu": float(nu),
        "votes": len(votes), "prompts": clusters, "pairs": int(games.sum() / 2),
        "longer": _share(found.lengths), "first": _share(found.firsts),
    }  # fmt: skip


def _interval(wins: np.ndarray, ties: np.ndarray, prior: float) -> np.ndarray:
    """(2, M): 2.5 % and 97.5 % percentiles of theta over RESAMPLES draws of as many prompts, always the same draws."""
    size, num = len(wins), wins.shape[-1]
    counts = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)  # (R, C)
    drawn = [(counts @ part.reshape(size, -1)).reshape(RESAMPLES, num, num) for part in (wins, ties)]
    return np.percentile(fit(*drawn, prior)[0], (2.5, 97.5), axis=0)


def _share(parts: np.ndarray) -> dict | None:
    """parts (C, 2), hits and pairs of each prompt -> their share, its interval over prompts; None without pairs."""
    if not parts[:, 1].any():
        return None
    import torch

    from posttrain.bootstrap import bootstrapped

    found = bootstrapped(torch.from_numpy(parts), lambda sums: sums[..., 0] / sums[..., 1], "%")
    return found | {"n": int(parts[:, 1].sum())}


def _groups(games: np.ndarray, names: list[str]) -> list[list[str]]:
    """Models linked by comparisons, directly or through others."""
    reach = np.linalg.matrix_power((games > 0) + np.eye(len(names)), max(1, len(names))) > 0
    linked = (tuple(name for name, there in zip(names, row, strict=True) if there) for row in reach)
    return [list(group) for group in dict.fromkeys(linked)]
