"""Says from the traces alone which promises of docs/protocol.md a run kept. It knows nothing of how the run was
made: `python -m stranger check DIRECTORY` reads them again."""

import collections
import dataclasses
import json
from pathlib import Path

from .trace import read

RULES = {
    "lost": "committed, neither refused nor replaced, and a device of its audience never showed it",
    "stuck": "arrived only on a new connection long after the last fault, or its offset was never committed",
    "repeated": "an application that remembers 500 ids was shown one twice",
    "starved": "too little of what was produced in a fault's time arrived within it",
    "acked": "shown again after this device had acknowledged it",
    "reordered": "shown behind a message that was produced after it to the same partition",
    "gap": "a seq was passed over without a skip",
    "invented": "an id that nobody produced, or another body than was produced",
    "wrong": "shown to a device that it was not for",
    "diverged": "two ids at one epoch and seq of a mailbox, though Redis forgot nothing",
    "skipped": "a skip for a reason that this run gave no cause for",
    "resends": "sent more than six times on a connection, or sooner than the back-off, or never closed for it",
    "closed": "a close code that says `do not come back`, or blames a device that did as it should",
    "refused": "a valid record in the dead letters, or a refused receipt for it",
    "untold": "a bad record without its dead letter and refused receipt, or an asked receipt that never came",
    "untrue": "an acked receipt for a message that this device never showed",
    "expired": "shown though its time to live was over",
    "growth": "more keys in Redis, or more memory in a role, at the end than such a run may leave",
    "died": "a process ended that nobody had ended",
    "exit": "a drained process did not end with 0",
    "vacuous": "too few messages, or no fault, to say anything",
}


@dataclasses.dataclass
class Expected:
    """What a scenario gives cause for, beside what every run must keep."""

    faults: int = 1
    shown: int = 80
    forgets: bool = False
    skips: tuple[str, ...] = ("otherDevice", "collapsed", "acknowledged")
    # The share of messages that must arrive while a fault lasts: of those whom it does not concern.
    flows: float = 0.0
    retry_base_ms: int = 500
    keys_a_user: float = 12
    rss_mb: float = 200
    # Rules that this scenario cannot keep, with the reason why that is no fault.
    waived: tuple[str, ...] = ()


@dataclasses.dataclass
class Verdict:
    messages: int
    shown: int
    closes: int
    found: dict[str, list[str]]
    again: int
    # From produce to the application, of devices that were connected throughout, seconds.
    median_s: float
    slowest_s: float

    @property
    def kept(self) -> bool:
        return not self.found

    def count(self, rule: str) -> int:
        return len(self.found.get(rule, ()))


def check(events: list[dict], expected: Expected) -> Verdict:
    return _Check(events, expected).run()


class _Check:
    def __init__(self, events, expected):
        self.expected = expected
        self.found: dict[str, list[str]] = collections.defaultdict(list)
        by = collections.defaultdict(list)
        for event in events:
            by[event["ev"]].append(event)
        self.by = by
        self.sent = {e["id"]: e for e in by["send"]}
        # The first record of an id; a second one of the same id is a duplicate, and is stored once.
        self.taken: dict[str, dict] = {}
        for e in by["prod"]:
            if e["st"] == "ok" and e["off"] <= self.taken.get(e["id"], e)["off"]:
                self.taken[e["id"]] = e
        self.device = {e["dev"]: e for e in by["device"]}
        self.of_user = collections.defaultdict(set)
        for e in by["device"]:
            self.of_user[e["user"]].add(e["dev"])
        self.first_welcome: dict[str, int] = {}
        for e in by["welcome"]:
            self.first_welcome.setdefault(e["dev"], e["t"])
        self.shows = collections.defaultdict(dict)
        for e in by["show"]:
            self.shows[e["dev"]].setdefault(e["id"], e)
        marks = {e["what"]: e["t"] for e in by["mark"]}
        self.late = marks.get("late")
        self.dead = {e["id"] for e in by["dead"]}
        self.committed = {(e["topic"], e["life"], e["part"]): e["off"] for e in by["commit"]}

    def say(self, rule: str, text: str) -> None:
        if rule not in self.expected.waived:
            self.found[rule].append(text)

    def run(self) -> Verdict:
        for rule in (
            self.arrival,
            self.repeats,
            self.order,
            self.gaps,
            self.contents,
            self.histories,
            self.skips,
            self.resends,
            self.closes,
            self.answers,
            self.expiry,
            self.size,
            self.flow,
            self.processes,
            self.vacuity,
        ):
            rule()
        shown = len(self.by["show"])
        again = len(self.by["recv"]) - shown
        closes = sum(e["by"] in ("node", "accident") for e in self.by["close"])
        good = sum(1 for i in self.taken if not self.sent[i]["bad"])
        return Verdict(good, shown, closes, dict(self.found), again, *self.delays())

    def delays(self) -> tuple[float, float]:
        over = min((e["t"] for e in self.by["over"]), default=1 << 63)
        away = {e["dev"] for e in self.by["close"] if e["by"] in ("device", "scenario") and e["t"] < over}
        begun = min((e["t"] for e in self.by["begin"]), default=0)
        steady = {d for d in self.device if d not in away and self.first_welcome.get(d, over) <= begun}
        took = sorted(
            (e["t"] - self.sent[e["id"]]["t"]) / 1e9
            for e in self.by["show"]
            if e["dev"] in steady and e["id"] in self.sent
        )
        return (took[len(took) // 2], took[-1]) if took else (0.0, 0.0)

    def owed(self, send: dict) -> set[str]:
        """Devices that must show it: those that had registered, or, where the user had none, all that came."""
        owed = set()
        for user in send["users"]:
            devices = {d for d in self.of_user[user] if send["device"] in (None, d.split("/")[1])}
            registered = {d for d in devices if self.first_welcome.get(d, 1 << 63) <= send["t"]}
            everyone = {d for d in self.of_user[user] if self.first_welcome.get(d, 1 << 63) <= send["t"]}
            owed |= registered if everyone else devices
        return owed

    def arrival(self):
        groups = collections.defaultdict(list)
        for i, send in self.sent.items():
            if send["collapse"] and i in self.taken:
                groups[send["users"][0], send["collapse"]].append(self.taken[i])
        # Positions that a device was told to do without, where the scenario gives cause for that.
        told: collections.Counter = collections.Counter()
        for e in self.by["skip"]:
            if e["why"] in set(self.expected.skips) & {"evicted", "expired"}:
                told[e["dev"]] += e["to"] - e["frm"]
        for at in self.by["prod"]:
            if at["st"] == "ok" and not self._committed(at) and (at["topic"], at["life"]) == self._latest(at["topic"]):
                self.say("stuck", f"{at['id']}: {at['topic']}/{at['part']}@{at['off']} not committed")
        for i, at in self.taken.items():
            send = self.sent[i]
            committed = self._committed(at)
            if send["bad"] or i in self.dead:
                continue
            # A newer one of the same key stands for it; in another partition it cannot be told which is newer.
            if send["collapse"] and any(
                o["id"] != i and (o["part"] != at["part"] or o["off"] > at["off"])
                for o in groups[send["users"][0], send["collapse"]]
            ):
                continue
            for dev in sorted(self.owed(send)):
                show = self.shows[dev].get(i)
                if self.device[dev]["kind"] == "mute":
                    continue
                if show is None and (send["ttl"] or not committed):
                    continue
                if show is None and told[dev] > 0:
                    told[dev] -= 1
                elif show is None:
                    self.say("lost", f"{i} ({at['topic']}/{at['part']}@{at['off']}) never shown to {dev}")
                elif self.late and show["t"] > self.late:
                    self.say("stuck", f"{i} shown to {dev} only on a new connection")

    def _committed(self, at):
        return at["off"] < self.committed.get((at["topic"], at["life"], at["part"]), 0)

    def _latest(self, topic):
        return topic, max(e["life"] for e in self.taken.values() if e["topic"] == topic)

    def repeats(self):
        acked = collections.defaultdict(set)
        seen = collections.defaultdict(set)
        open_ = collections.defaultdict(dict)
        for e in self._merged("show", "ack", "welcome"):
            dev = e["dev"]
            if e["ev"] == "welcome":
                open_[dev] = {}
            elif e["ev"] == "ack":
                acked[dev] |= {i for s, i in open_[dev].items() if s <= e["seq"]}
            else:
                if e["id"] in seen[dev]:
                    rule = "acked" if e["id"] in acked[dev] else "repeated"
                    self.say(rule, f"{e['id']} shown to {dev} again, as seq {e['seq']} of {e['sess']}")
                seen[dev].add(e["id"])
                open_[dev][e["seq"]] = e["id"]

    def order(self):
        highest: dict[tuple, tuple[int, str]] = {}
        shown = set()
        for e in self.by["show"]:
            at = self.taken.get(e["id"])
            # What came twice is said to be repeated; it does not count as disorder, too.
            if at is None or (e["dev"], e["id"]) in shown:
                continue
            shown.add((e["dev"], e["id"]))
            key = (e["dev"], at["topic"], at["life"], at["part"])
            if key in highest and at["off"] < highest[key][0]:
                self.say(
                    "reordered",
                    f"{e['id']} (offset {at['off']}) shown to {e['dev']} behind {highest[key][1]} "
                    f"(offset {highest[key][0]})",
                )
            else:
                highest[key] = (at["off"], e["id"])

    def gaps(self):
        at: dict[str, int] = {}
        for e in self._merged("welcome", "recv", "skip"):
            dev = e["dev"]
            if e["ev"] == "welcome":
                at[dev] = e["seq"]
            elif e["ev"] == "skip":
                at[dev] = max(at.get(dev, 0), e["to"])
            elif e["seq"] > at.get(dev, 0):
                if e["seq"] != at.get(dev, 0) + 1:
                    self.say("gap", f"{dev} on {e['sess']}: seq {e['seq']} behind {at.get(dev, 0)}")
                at[dev] = e["seq"]

    def contents(self):
        for e in self.by["show"]:
            send = self.sent.get(e["id"])
            if send is None:
                self.say("invented", f"{e['id']} shown to {e['dev']}: nobody produced it")
                continue
            if send["bad"]:
                self.say("wrong", f"{e['id']} shown to {e['dev']}: it is {send['bad']}")
            elif e["h"] != send["h"]:
                self.say("invented", f"{e['id']} shown to {e['dev']} with another body")
            user, name = e["dev"].split("/")
            if user not in send["users"] or send["device"] not in (None, name):
                self.say("wrong", f"{e['id']} for {send['users']} {send['device'] or ''} shown to {e['dev']}")

    def histories(self):
        if self.expected.forgets:
            return
        ids: dict[tuple, str] = {}
        for e in self.by["recv"]:
            key = (e["dev"].split("/")[0], e["ep"], e["seq"])
            if ids.setdefault(key, e["id"]) != e["id"]:
                self.say("diverged", f"{key[0]} epoch {key[1]} seq {key[2]}: {ids[key]} and {e['id']} ({e['dev']})")

    def skips(self):
        for e in self.by["skip"]:
            if e["why"] not in self.expected.skips:
                self.say("skipped", f"{e['dev']}: {e['frm'] + 1} to {e['to']} as {e['why'] or 'nothing'}")

    def resends(self):
        """Of devices that never acknowledge: the times at which a seq came on one connection."""
        times = collections.defaultdict(list)
        for e in self.by["recv"]:
            if self.device.get(e["dev"], {}).get("kind") == "mute":
                times[e["dev"], e["sess"], e["seq"]].append(e["t"] / 1e9)
        base = self.expected.retry_base_ms / 1000
        for (dev, sess, seq), at in times.items():
            if len(at) > 6:
                self.say("resends", f"{dev} on {sess}: seq {seq} was sent {len(at)} times")
            for n, (a, b) in enumerate(zip(at, at[1:])):
                # ± 20 %, and what a busy machine adds to either end.
                if b - a < base * 2**n * 0.8 - 0.3:
                    self.say("resends", f"{dev} on {sess}: seq {seq} again after {b - a:.1f} s, the {n + 1}. time")
        full = {(dev, sess) for (dev, sess, _), at in times.items() if len(at) >= 6}
        ended = {(e["dev"], e["sess"]) for e in self.by["close"] if e["code"] == 4001}
        for dev, sess in full - ended:
            self.say("resends", f"{dev} on {sess}: sent six times and not closed with 4001")

    def closes(self):
        for e in self.by["close"]:
            mute = self.device.get(e["dev"], {}).get("kind") == "mute"
            # 4000 to 4499 ask a device to come again, which faults are cause enough for; 4001 blames it.
            code, good = e["code"], e["code"] < 4500 and e["code"] not in (1002, 1007)
            if e["by"] == "node" and (not good or (code == 4001 and not mute)):
                self.say("closed", f"{e['dev']} with {code}")

    def answers(self):
        refused = {e["id"] for e in self.by["rcpt"] if e["kind"] == "refused"}
        codes = {e["id"]: e["code"] for e in self.by["dead"]}
        accepted = {(e["id"]) for e in self.by["rcpt"] if e["kind"] in ("accepted", "duplicate")}
        for i in sorted((self.dead | refused) & set(self.sent)):
            if not self.sent[i]["bad"]:
                self.say("refused", f"{i} is in the dead letters: {codes.get(i)}")
        for i, at in self.taken.items():
            send = self.sent[i]
            if not self._committed(at):
                continue
            if send["bad"] and codes.get(i) != send["bad"]:
                self.say("untold", f"{i} is {send['bad']}, and the dead letters have it as {codes.get(i)}")
            if not send["bad"] and "accepted" in send["receipts"] and i not in accepted and i not in self.dead:
                self.say("untold", f"{i} was committed, and no accepted receipt came")
        for e in self.by["rcpt"]:
            if e["kind"] == "acked" and e["device"] and f"{e['user']}/{e['device']}" in self.device:
                if e["id"] not in self.shows[f"{e['user']}/{e['device']}"]:
                    self.say("untrue", f"{e['id']}: acked receipt of {e['user']}/{e['device']}, who never showed it")

    def expiry(self):
        for e in self.by["show"]:
            send = self.sent.get(e["id"])
            # Life begins with acceptance, some seconds after `send` at most in such a run.
            if send and send["ttl"]:
                after = (e["t"] - send["t"]) / 1e9
                if after > send["ttl"] + 15:
                    self.say("expired", f"{e['id']} of {send['ttl']} s shown to {e['dev']} after {after:.0f} s")

    def size(self):
        sizes = {e["when"]: e for e in self.by["size"]}
        end = sizes.get("quiet")
        if end is None:
            return
        most = end["users"] * self.expected.keys_a_user + 600
        if end["keys"] > most:
            self.say("growth", f"{end['keys']} keys in Redis for {end['users']} users (at most {most:.0f})")
        for name, mb in end["rss"].items():
            if mb > self.expected.rss_mb:
                self.say("growth", f"{name} holds {mb} MB (at most {self.expected.rss_mb:.0f})")

    def flow(self):
        if not self.expected.flows:
            return
        begun = None
        first = {}
        for shows in self.shows.values():
            for i, e in shows.items():
                first[i] = min(e["t"], first.get(i, e["t"]))
        for e in self.by["fault"]:
            if e["on"]:
                begun = e
                continue
            # What it takes until everybody has noticed, and what is on its way at the end, does not count.
            low, high = begun["t"] + 3_000_000_000, e["t"] - 1_000_000_000
            sent = [i for i, s in self.sent.items() if low < s["t"] < high and i in self.taken and not s["bad"]]
            came = [i for i in sent if first.get(i, e["t"]) < e["t"]]
            if len(came) < self.expected.flows * len(sent):
                self.say("starved", f"{e['kind']} {e['target']}: {len(came)} of {len(sent)}")

    def processes(self):
        for e in self.by["died"]:
            self.say("died", f"{e['proc']}: see its log")
        for e in self.by["exit"]:
            if e["code"] != 0:
                self.say("exit", f"{e['proc']} ended with {e['code']}")

    def vacuity(self):
        faults = sum(1 for e in self.by["fault"] if e["on"])
        if faults < self.expected.faults:
            self.say("vacuous", f"{faults} faults, {self.expected.faults} at least")
        if len(self.by["show"]) < self.expected.shown:
            self.say("vacuous", f"{len(self.by['show'])} messages shown, {self.expected.shown} at least")
        if not self.by["mark"] or not self.by["device"] or not self.by["commit"]:
            self.say("vacuous", "the run did not come to its end")

    def _merged(self, *kinds):
        return sorted((e for k in kinds for e in self.by[k]), key=lambda e: e["t"])


def check_directory(directory: Path) -> Verdict:
    """Checks what a run left in a directory, as it was expected then."""
    expected = json.loads((directory / "expected.json").read_text())
    return check(read(directory), Expected(**{k: tuple(v) if isinstance(v, list) else v for k, v in expected.items()}))
