#!/usr/bin/env python3
"""A business and a device in one script: produce pushes to Kafka, receive and acknowledge them.

    python3 -m venv env && env/bin/pip install -r requirements.txt    # Debian: python3-venv
    env/bin/python push_and_receive.py --user alice --token "$(barid token --user alice)"

It uses no code of Barid: the records and frames below follow docs/protocol.md.
"""

import argparse
import asyncio
import json
import time

import confluent_kafka
import websockets
from websockets.asyncio.client import connect


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brokers", default="127.0.0.1:9092", help="Kafka, host:port")
    parser.add_argument("--url", default="ws://127.0.0.1:7080/v1/connect", help="an access node")
    parser.add_argument("--token", required=True, help="a token from `barid token`")
    parser.add_argument("--topic", default="barid.push")
    parser.add_argument("--app", default="demo")
    parser.add_argument("--user", default="alice")
    parser.add_argument("--device", default="python")
    return parser.parse_args()


def records(app, user):
    """Return three messages, one for each kind of body."""
    now = time.time_ns()
    to = {"user": user}
    return [
        {"id": f"greeting-{now}", "app": app, "to": to, "text": "hello"},
        {"id": f"order-{now}", "app": app, "to": to, "json": {"order": 7, "total": "12.50"}},
        {"id": f"bytes-{now}", "app": app, "to": to, "data": "AAECAw==", "ttlSeconds": 3600},
    ]


def produce(brokers, topic, user, pushes):
    """Act as the business. The user as the Kafka key keeps the order of a user's messages."""
    producer = confluent_kafka.Producer({"bootstrap.servers": brokers, "enable.idempotence": True})
    for push in pushes:
        producer.produce(topic, key=user, value=json.dumps(push))
    if producer.flush(20):
        raise SystemExit("Kafka did not accept the records")


async def receive(socket, wanted):
    """Act as the device: handle each message once and in order, then acknowledge it."""
    handled = 0  # the last handled seq
    async for text in socket:
        # A frame is an object with one key, its kind.
        ((kind, frame),) = json.loads(text).items()
        if kind == "deliver" and not frame.get("mailbox"):  # others are not acknowledged
            for message in frame["messages"]:
                if message["seq"] <= handled:
                    continue  # a re-send that crossed the acknowledgement
                handled = message["seq"]
                body = next(message[k] for k in ("text", "json", "data") if k in message)
                print(f"received {message['seq']} {message['id']} {json.dumps(body)}", flush=True)
                wanted.discard(message["id"])
            # Always name the generation: after a reset the same seq may be another message.
            generation = frame.get("generation", 0)
            await socket.send(json.dumps({"ack": {"seq": handled, "generation": generation}}))
        elif kind == "skip":
            handled = max(handled, frame["to"])  # skips may be repeated
        elif kind == "welcome":
            # The position of this device; Welcome is sent again if positions start anew.
            own = (p for p in frame.get("positions", []) if not p.get("mailbox"))
            handled = next(own, {}).get("seq", 0)
        elif kind == "error" and frame.get("code", 0):  # 0: a warning, the connection stays open
            raise SystemExit(f"error {frame.get('code', 0)}: {frame.get('text', '')}")
        if not wanted:
            return


async def main():
    o = options()
    pushes = records(o.app, o.user)
    headers = {"Authorization": f"Bearer {o.token}"}
    async with connect(o.url, subprotocols=["barid.v1.json"], additional_headers=headers) as socket:
        await socket.send(json.dumps({"hello": {"device": o.device}}))
        await asyncio.to_thread(produce, o.brokers, o.topic, o.user, pushes)
        await asyncio.wait_for(receive(socket, {push["id"] for push in pushes}), 30)
        # Leaving the block closes the connection after the last acknowledgement is sent.
    print("all received and acknowledged")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except websockets.InvalidStatus as refused:
        reason = refused.response.body.decode().strip()
        raise SystemExit(f"refused by the node: {refused.response.status_code} {reason}")
    except websockets.ConnectionClosed as closed:
        raise SystemExit(f"closed by the node: {closed}")
    except asyncio.TimeoutError:
        raise SystemExit("not everything arrived within 30 s; is the token that of --user?")
    except OSError as error:
        raise SystemExit(error)
