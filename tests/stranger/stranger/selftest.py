"""Tests of the checker: a good trace is kept, and each way of spoiling it is named by its rule."""

import copy

from .checker import RULES, Expected, check

SECOND = 1_000_000_000


def good_trace() -> tuple[list[dict], Expected]:
    """Two users, three devices, and everything that a run has, made by hand."""
    events: list[dict] = []
    t = 0

    def at(ev, step=SECOND // 100, **fields):
        nonlocal t
        t += step
        events.append({"t": t, "ev": ev, **fields})

    devices = {"u0/a": "careful", "u1/a": "careful", "u1/b": "plain", "u2/m": "mute"}
    for dev in devices:
        at("welcome", dev=dev, sess=f"s-{dev}", ep=7, gen=0, seq=0, chain=1, again=False)
    at("fault", on=True, kind="kill", target="purger")
    seqs = dict.fromkeys(("u0", "u1", "u2"), 0)
    for n in range(30):
        user = ("u0", "u1")[n % 2]
        part, off = n % 2, n // 2
        name = f"m{n}"
        at(
            "send",
            id=name,
            topic="t",
            life=0,
            users=[user],
            device=None,
            h=f"h{n}",
            collapse=None,
            ttl=0,
            receipts=["accepted", "acked"],
            bad=None,
        )
        at("prod", id=name, st="ok", topic="t", life=0, part=part, off=off)
        at("rcpt", kind="accepted", id=name, user=user, device=None, seq=None, code=None)
        seqs[user] += 1
        for dev in devices:
            if dev.startswith(user):
                about = {"dev": dev, "sess": f"s-{dev}", "ep": 7, "gen": 0, "seq": seqs[user], "id": name}
                at("recv", **about, last=seqs[user] - 1)
                at("show", **about, h=f"h{n}")
                at("ack", dev=dev, sess=f"s-{dev}", ep=7, gen=0, seq=seqs[user])
                at("rcpt", kind="acked", id=name, user=user, device=dev[-1], seq=seqs[user], code=None)
    at(
        "send",
        id="bad",
        topic="t",
        life=0,
        users=[],
        device=None,
        h="",
        collapse=None,
        ttl=0,
        receipts=[],
        bad="bad_json",
    )
    at("prod", id="bad", st="ok", topic="t", life=0, part=0, off=15)
    at("dead", id="bad", code="bad_json", reason="", off="15")
    at(
        "send",
        id="mute",
        topic="t",
        life=0,
        users=["u2"],
        device=None,
        h="hm",
        collapse=None,
        ttl=0,
        receipts=[],
        bad=None,
    )
    at("prod", id="mute", st="ok", topic="t", life=0, part=1, off=15)
    for n, wait in enumerate((0, 0.5, 1, 2, 4, 8)):
        about = {"dev": "u2/m", "sess": "s-u2/m", "ep": 7, "gen": 0, "seq": 1, "id": "mute"}
        at("recv", int(wait * SECOND), **about, last=min(n, 1))
        if n == 0:
            at("show", **about, h="hm")
    at("close", 16 * SECOND, dev="u2/m", sess="s-u2/m", code=4001, by="node")
    at("fault", on=False, kind="kill", target="purger")
    at("exit", proc="purger-1", code=0)
    at("close", dev="u0/a", sess="s-u0/a", code=4000, by="node")
    at("commit", topic="t", life=0, part=0, off=16)
    at("commit", topic="t", life=0, part=1, off=16)
    at("mark", what="heal")
    at("mark", what="quiet")
    at("size", when="quiet", keys=20, users=3, rss={"purger-1": 30.0})
    for dev, kind in devices.items():
        at("device", dev=dev, user=dev[:2], kind=kind)
    return events, Expected(faults=1, shown=30, flows=0.9)


def _find(events, ev, **fields):
    return next(e for e in events if e["ev"] == ev and all(e.get(k) == v for k, v in fields.items()))


def _drop(events, *found):
    for e in found:
        events.remove(e)


def _move(events, event, t):
    event["t"] = t


def _lost(events):
    for ev in ("recv", "show"):
        _drop(events, _find(events, ev, dev="u0/a", id="m28"))
    events[:] = [e for e in events if not (e["ev"] == "rcpt" and e["id"] == "m28" and e["kind"] == "acked")]
    _drop(events, _find(events, "ack", dev="u0/a", seq=15))


def _lost_before_registering(events):
    """A message that a user had waiting before the first device of theirs came."""
    late = _find(events, "welcome", dev="u0/a")
    send = _find(events, "send", id="m0")
    late["t"] = send["t"] + 1
    _drop(events, _find(events, "show", dev="u0/a", id="m0"), _find(events, "recv", dev="u0/a", id="m0"))
    late["seq"] = 1
    _drop(events, _find(events, "rcpt", id="m0", kind="acked"))


def _stuck(events):
    show = _find(events, "show", dev="u0/a", id="m28")
    events.append({"t": show["t"] - 1, "ev": "mark", "what": "late"})
    for e in [e for e in events if e["ev"] == "show" and e["t"] > show["t"]]:
        e["t"] = show["t"] - 2
    events.sort(key=lambda e: e["t"])


def _uncommitted(events):
    _find(events, "commit", part=1)["off"] = 15


def _again(events, acked):
    show = copy.deepcopy(_find(events, "show", dev="u0/a", id="m4"))
    last = _find(events, "show", dev="u0/a", id="m28")
    recv = copy.deepcopy(_find(events, "recv", dev="u0/a", id="m4"))
    if not acked:
        events[:] = [e for e in events if not (e["ev"] == "ack" and e["dev"] == "u0/a")]
    show["seq"] = recv["seq"] = 16
    recv["t"], show["t"] = last["t"] + 1, last["t"] + 2
    recv["ep"] = 8
    events += [
        {
            "t": last["t"],
            "ev": "welcome",
            "dev": "u0/a",
            "sess": "s2",
            "ep": 8,
            "gen": 0,
            "seq": 15,
            "chain": 1,
            "again": True,
        },
        recv,
        show,
    ]
    events.sort(key=lambda e: e["t"])


def _swap(events, ev):
    a, b = _find(events, ev, dev="u0/a", id="m4"), _find(events, ev, dev="u0/a", id="m6")
    for key in ("id", "h") if ev == "show" else ("id",):
        a[key], b[key] = b[key], a[key]


def _reordered(events):
    _swap(events, "show")
    _swap(events, "recv")


def _gap(events):
    for ev in ("recv", "show"):
        for e in events:
            if e["ev"] == ev and e["dev"] == "u0/a" and e["seq"] >= 15:
                e["seq"] += 1


def _diverged(events):
    for ev in ("recv", "show"):
        for e in events:
            if e["ev"] == ev and e["dev"] == "u1/b" and e["seq"] in (3, 4):
                e["seq"] = 7 - e["seq"]
    a, b = (_find(events, "recv", dev="u1/b", seq=s) for s in (3, 4))
    a["t"], b["t"] = b["t"], a["t"]
    events.sort(key=lambda e: e["t"])


def _set(ev, changes, **which):
    def mutate(events):
        _find(events, ev, **which).update(changes)

    return mutate


def _add(ev, after="mark", **fields):
    def mutate(events):
        events.append({"t": _find(events, after)["t"] + 1, "ev": ev, **fields})
        events.sort(key=lambda e: e["t"])

    return mutate


def _seventh(events):
    last = [e for e in events if e["ev"] == "recv" and e["dev"] == "u2/m"][-1]
    events.append({**last, "t": last["t"] + 16 * SECOND})
    events.sort(key=lambda e: e["t"])


def _too_soon(events):
    times = [e for e in events if e["ev"] == "recv" and e["dev"] == "u2/m"]
    times[-1]["t"] = times[-2]["t"] + SECOND
    events.sort(key=lambda e: e["t"])


def _few(events):
    events[:] = [e for e in events if not (e["ev"] == "fault")]


def _empty(events):
    events[:] = [e for e in events if e["ev"] in ("fault", "mark", "device", "commit")]


def _starved(events):
    """The fault lasts longer, and nothing comes before it is over."""
    on, off = _find(events, "fault", on=True), _find(events, "fault", on=False)
    on["t"] -= 5 * SECOND
    off["t"] = _find(events, "send", id="m12")["t"] + 2 * SECOND
    for e in events:
        if e["ev"] not in ("fault", "send", "prod", "welcome") and e["t"] < off["t"] + SECOND:
            e["t"] += 3 * SECOND
    events.sort(key=lambda e: e["t"])


def _more_than_told(events):
    _lost(events)
    _add("skip", dev="u1/a", sess="s", ep=7, frm=15, to=17, why="evicted")(events)


MUTANTS = [
    ("lost", "a device never shows one", _lost),
    ("lost", "what waited for a user's first device never comes", _lost_before_registering),
    ("lost", "another device than was told to skip", _more_than_told),
    ("stuck", "one arrives only when the device connects again", _stuck),
    ("stuck", "one offset is not committed", _uncommitted),
    ("starved", "nothing arrives while a fault lasts", _starved),
    ("repeated", "one is shown again, not acknowledged", lambda e: _again(e, False)),
    ("acked", "one is shown again, acknowledged", lambda e: _again(e, True)),
    ("reordered", "two change places", _reordered),
    ("gap", "a seq is passed over", _gap),
    ("invented", "nobody produced it", _set("show", {"id": "m999"}, dev="u0/a", id="m4")),
    ("invented", "another body", _set("show", {"h": "other"}, dev="u0/a", id="m4")),
    ("wrong", "another user's", _set("send", {"users": ["u9"]}, id="m4")),
    ("wrong", "another device's", _set("send", {"device": "z"}, id="m5")),
    ("wrong", "a record that was to be refused", _set("send", {"bad": "bad_json"}, id="m4")),
    ("diverged", "two devices have two ids at one seq", _diverged),
    ("skipped", "a skip without a cause", _add("skip", dev="u0/a", sess="s", ep=7, frm=15, to=17, why="evicted")),
    ("skipped", "a skip without a reason", _add("skip", dev="u0/a", sess="s", ep=7, frm=15, to=17, why="")),
    ("resends", "a seventh sending", _seventh),
    ("resends", "a re-send too soon", _too_soon),
    ("resends", "no close behind the last", _set("close", {"code": 4000}, dev="u2/m")),
    ("closed", "replaced by nobody", _set("close", {"code": 4502}, dev="u0/a")),
    ("closed", "a node blames WebSocket", _set("close", {"code": 1002}, dev="u0/a")),
    ("closed", "one that acknowledges is closed for not doing so", _set("close", {"code": 4001}, dev="u0/a")),
    ("refused", "a good record in the dead letters", _add("dead", id="m4", code="bad_json", reason="", off="2")),
    ("untold", "a bad record without a dead letter", lambda e: _drop(e, _find(e, "dead"))),
    ("untold", "a dead letter with another code", _set("dead", {"code": "no_body"}, id="bad")),
    ("untold", "no accepted receipt", lambda e: _drop(e, _find(e, "rcpt", id="m4", kind="accepted"))),
    (
        "untrue",
        "an acked receipt of nobody",
        _add("rcpt", kind="acked", id="m4", user="u1", device="a", seq=3, code=None),
    ),
    (
        "expired",
        "shown behind its time",
        lambda e: (
            _set("send", {"ttl": 1}, id="mute")(e),
            _move(e, _find(e, "send", id="mute"), 0),
            _move(e, _find(e, "show", id="mute"), 40 * SECOND),
        ),
    ),
    ("growth", "keys without end", _set("size", {"keys": 5000})),
    ("growth", "memory without end", _set("size", {"rss": {"purger-1": 900.0}})),
    ("died", "a process of its own accord", _add("died", proc="access-1")),
    ("exit", "a drain that fails", _set("exit", {"code": 3})),
    ("vacuous", "no faults", _few),
    ("vacuous", "no messages", _empty),
    ("vacuous", "no end", lambda e: _drop(e, *[x for x in e if x["ev"] == "mark"])),
]


def selftest() -> list[str]:
    """What is wrong with the checker; empty if it names each mutant by its rule and the good trace by none."""
    wrong = []
    events, expected = good_trace()
    verdict = check(events, expected)
    if not verdict.kept:
        wrong.append(f"the good trace is said to be {verdict.found}")
    for rule, what, mutate in MUTANTS:
        events, expected = good_trace()
        mutate(events)
        found = check(events, expected).found
        if rule not in found:
            wrong.append(f"{rule}: {what}: not found (found {sorted(found)})")
        # A mutant may break what hangs on it as well, but most break one rule only.
    for rule in set(RULES) - {rule for rule, _, _ in MUTANTS}:
        wrong.append(f"no mutant for {rule}")
    return wrong
