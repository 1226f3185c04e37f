"""Votes on disk: what was confirmed stands, whatever killed the process, and is what a reward model learns from.

Run: pytest tests/test_votes.py
"""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from posttrain.board.votes import Item, Votes
from posttrain.data import DataConfig, load_rows
from posttrain.errors import UserError
from posttrain.ranking_rows import encode_rankings

PROMPT = [{"role": "user", "content": "What is 2+2?"}]
ITEM = Item(PROMPT, [("sft", "five"), ("ppo", "four"), ("grpo", "four!")], seed=7, settings={"temperature": 1.0})
# Votes as fast as it can and names each id once it is confirmed.
VOTER = """
import sys
from posttrain.board.votes import Item, Votes
votes = Votes(sys.argv[1])
item = Item([{"role": "user", "content": "What is 2+2?"}], [("sft", "five " * 300), ("ppo", "four")])
for number in range(int(sys.argv[2])):
    print(votes.vote(item, [1, 0], labeller=sys.argv[3]), flush=True)
"""


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_on(folder) -> list[dict]:
    """As recipes/reward.py reads them, without an adapter."""
    config = DataConfig(dataset_name=str(folder / "votes.jsonl"))
    return load_rows(config, "train", 0, ("prompt",))[0]


def test_a_vote_is_a_ranking_row_with_its_circumstances(tmp_path, tokenizer):
    votes = Votes(tmp_path / "votes")
    found = votes.vote(ITEM, [5, 2, 2], labeller=" Ada ", comment="two are right", seconds=3.5)
    (row,) = trained_on(tmp_path / "votes")
    told = {key: row[key] for key in ("id", "models", "ranks", "shown", "labeller", "comment", "seconds", "seed")}
    assert told == {
        "id": found, "models": ["ppo", "grpo", "sft"], "ranks": [0, 0, 1], "shown": [1, 2, 0], "labeller": "Ada",
        "comment": "two are right", "seconds": 3.5, "seed": 7,
    }  # fmt: skip
    assert [reply[0]["content"] for reply in row["completions"]] == ["four", "four!", "five"]
    (ranking,), _ = encode_rankings(tokenizer, [row], 256)
    assert ranking.ranks == [0, 0, 1] and "four" in tokenizer.decode(ranking.sequences[0])


def test_skips_and_cancelled_votes_are_not_learned_from(tmp_path):
    votes = Votes(tmp_path)
    first, second = votes.vote(ITEM, [0, 1, 2]), votes.vote(ITEM, [2, 1, 0])
    votes.skip(ITEM, "all wrong", comment="none is an answer")
    votes.cancel(second)
    assert [row["id"] for row in trained_on(tmp_path)] == [first] == [vote["id"] for vote in votes.read()]
    assert [line["event"] for line in lines(tmp_path / "votes.log")] == ["vote", "vote", "skip", "cancel"]
    assert votes.counts() == {"votes": 2, "skips": 1, "cancels": 1, "standing": 1, "rows": 1}
    with pytest.raises(UserError, match="cancelled already"):
        votes.cancel(second)
    with pytest.raises(UserError, match="no such vote"):
        votes.cancel("1234")
    with pytest.raises(UserError, match="expected a file that ends in"):  # the log itself is no data set
        load_rows(DataConfig(dataset_name=str(tmp_path / "votes.log"), on_bad_row="skip"), "train", 0, ("prompt",))
    folder = DataConfig(dataset_name=str(tmp_path))
    assert load_rows(folder, "train", 0, ("prompt",))[0] == trained_on(tmp_path)


def test_replies_that_no_stage_can_read_are_rated_but_not_learned_from(tmp_path):
    votes = Votes(tmp_path)
    votes.vote(Item(PROMPT, [("a", "yes"), ("b", " "), ("c", "no")]), [0, 1, 2])
    votes.vote(Item(PROMPT, [("a", "yes"), ("b", "")]), [0, 1])
    votes.vote(Item(PROMPT, [("a", "yes"), ("b", "nul \0 inside")]), [0, 1])
    votes.vote(Item(PROMPT, [("a", "yes"), ("b", "half \ud800 a pair")]), [0, 1], comment="\udc00")
    assert [row["models"] for row in trained_on(tmp_path)] == [["a", "c"]]
    assert trained_on(tmp_path)[0]["ranks"] == [0, 1] and len(votes.read()) == 4
    assert votes.read()[3]["shown"][1]["text"] == "half \ud800 a pair"
    assert Votes(tmp_path).notes == []


@pytest.mark.parametrize(
    "places", [[0, 1], [0, 1, 2, 3], [0, 1, -1], [0, 1, 1.5], [0, 1, True], [0, 1, None], "012", None]
)
def test_what_is_no_ranking_is_refused(tmp_path, places):
    with pytest.raises(UserError, match="places: found"):
        Votes(tmp_path).vote(ITEM, places)
    assert (tmp_path / "votes.log").read_bytes() == (tmp_path / "votes.jsonl").read_bytes() == b""


def test_long_comments_and_links_are_refused(tmp_path):
    with pytest.raises(UserError, match="comment: 2,001 characters"):
        Votes(tmp_path / "a").skip(ITEM, "unclear", comment="x" * 2001)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/votes.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        Votes(tmp_path / "b")
    assert not (tmp_path / "elsewhere").exists()


def test_a_cut_last_line_is_set_aside_and_said(tmp_path):
    votes = Votes(tmp_path)
    kept = votes.vote(ITEM, [0, 1, 2])
    whole = (tmp_path / "votes.log").read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 2):
        (tmp_path / "votes.log").write_bytes(whole + whole[:cut])
        again = Votes(tmp_path)
        assert f"its {cut} bytes" in again.notes[0] and (tmp_path / "votes.log").read_bytes() == whole
        assert (tmp_path / "votes.cut").read_bytes().endswith(whole[:cut] + b"\n")
        assert [row["id"] for row in trained_on(tmp_path)] == [kept]
    (tmp_path / "votes.log").write_bytes(whole + whole[:9])
    votes.skip(ITEM, "unclear")  # another process died while this one was open
    assert [line["event"] for line in lines(tmp_path / "votes.log")] == ["vote", "skip"] and votes.notes
    (tmp_path / "votes.log").write_bytes(whole + whole[:9])
    assert [vote["id"] for vote in votes.read()] == [kept]
    (tmp_path / "votes.log").write_bytes(whole[:-1])  # only the line end is missing: nothing is lost
    assert Votes(tmp_path).read()[0]["id"] == kept and (tmp_path / "votes.log").read_bytes() == whole


def test_a_damaged_line_is_named_and_nothing_is_written(tmp_path):
    Votes(tmp_path).vote(ITEM, [0, 1, 2])
    log = tmp_path / "votes.log"
    whole = log.read_bytes()
    for line, words in (
        (b"{nonsense\n", "votes.log:2: not valid JSON"),
        (b'{"event": "vote"}\n', "votes.log:2: no line"),
    ):
        log.write_bytes(whole + line + whole)
        before = (tmp_path / "votes.jsonl").read_bytes()
        with pytest.raises(UserError, match=words):
            Votes(tmp_path)
        assert log.read_bytes() == whole + line + whole and (tmp_path / "votes.jsonl").read_bytes() == before


def test_sigkill_at_any_point_of_a_vote_or_its_undoing(kill_everywhere):
    folders = kill_everywhere("""
        from posttrain.board.votes import Item, Votes
        item = Item([{"role": "user", "content": "What?"}], [("a", "this"), ("b", "that")])

        def before(folder):
            Votes(folder).vote(item, [0, 1], comment="old")

        def action(folder):
            votes = Votes(folder)
            number = votes.vote(item, [1, 0], comment="new")
            (folder / "confirmed").write_text(number)
            votes.cancel(number)
            votes.vote(item, [1, 1], comment="last")
    """)
    assert len(folders) > 10
    stood = set()
    for folder in folders:
        votes = Votes(folder)
        comments = [vote["comment"] for vote in votes.read()]
        assert [row["comment"] for row in trained_on(folder)] == comments and comments[0] == "old"
        events = [line["event"] for line in lines(folder / "votes.log")]
        if (folder / "confirmed").exists():
            assert "new" in comments or "cancel" in events
        stood.add(tuple(comments))
    assert stood == {("old",), ("old", "new"), ("old", "last")}


def test_processes_vote_at_once_and_one_is_killed(tmp_path):
    """Every id that a process printed stands in both files, once and whole."""
    running = {}
    for name, count in (("killed", 100_000), ("a", 40), ("b", 40)):
        with open(tmp_path / f"{name}.said", "w") as said:
            running[name] = subprocess.Popen([sys.executable, "-c", VOTER, tmp_path, str(count), name], stdout=said)
    while (tmp_path / "killed.said").stat().st_size < 33 * 20:
        assert running["killed"].poll() is None
        time.sleep(0.01)
    running["killed"].send_signal(signal.SIGKILL)
    assert [process.wait(timeout=60) for process in running.values()] == [-signal.SIGKILL, 0, 0]
    confirmed = {line for name in running for line in (tmp_path / f"{name}.said").read_text().split()}
    votes = Votes(tmp_path)
    standing = [vote["id"] for vote in votes.read()]
    assert len(confirmed) >= 100 and len(set(standing)) == len(standing) <= len(confirmed) + 1
    assert confirmed <= set(standing) == {row["id"] for row in trained_on(tmp_path)}


def test_a_full_disk_leaves_both_files_as_they_were(tmp_path):
    """RLIMIT_FSIZE lets a process write a part of a line, as a full disk does."""
    script = """
        import resource, signal, sys
        from posttrain.board.votes import Item, Votes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        votes = Votes(sys.argv[1])
        item = Item([{"role": "user", "content": "What?"}], [("a", "this " * 50), ("b", "that " * 50)])
        votes.vote(item, [0, 1])
        log, rows = (open(f"{sys.argv[1]}/votes.{end}", "rb").read() for end in ("log", "jsonl"))
        for limit in (len(log) + 100, len(rows) + len(log) // 2, len(log) * 2 - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                votes.vote(item, [1, 0])
            except OSError as error:
                print(error)
            assert open(f"{sys.argv[1]}/votes.log", "rb").read() == log
            assert open(f"{sys.argv[1]}/votes.jsonl", "rb").read() == rows
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        votes.vote(item, [1, 0])
    """
    from conftest import run_script

    done = run_script(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could be written") == 3 and len(trained_on(tmp_path)) == 2


def test_threads_of_one_board_vote_at_once(tmp_path):
    votes = Votes(tmp_path)
    threads = [threading.Thread(target=lambda: [votes.vote(ITEM, [0, 1, 2]) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({row["id"] for row in trained_on(tmp_path)}) == 40
