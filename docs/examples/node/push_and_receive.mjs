#!/usr/bin/env node
// A business and a device in one script: produce pushes to Kafka, receive and acknowledge them.
//
//     npm ci
//     node push_and_receive.mjs --user alice --token "$(barid token --user alice)"
//
// It uses no code of Barid: the records and frames below follow docs/protocol.md.

import { once } from "node:events";
import { text } from "node:stream/consumers";
import { parseArgs } from "node:util";
import kafkajs from "kafkajs";
import WebSocket from "ws";

const { values: o } = parseArgs({
  options: {
    brokers: { type: "string", default: "127.0.0.1:9092" }, // Kafka, host:port
    url: { type: "string", default: "ws://127.0.0.1:7080/v1/connect" }, // an access node
    token: { type: "string", default: "" }, // a token from `barid token`
    topic: { type: "string", default: "barid.push" },
    app: { type: "string", default: "demo" },
    user: { type: "string", default: "alice" },
    device: { type: "string", default: "node" },
  },
});

// Returns three messages, one for each kind of body.
function records(app, user) {
  const now = Date.now();
  const to = { user };
  return [
    { id: `greeting-${now}`, app, to, text: "hello" },
    { id: `order-${now}`, app, to, json: { order: 7, total: "12.50" } },
    { id: `bytes-${now}`, app, to, data: "AAECAw==", ttlSeconds: 3600 },
  ];
}

// Acts as the business. The user as the Kafka key keeps the order of a user's messages. A retry may produce a
// record twice: Barid drops the second one, which has the same id.
async function produce(brokers, topic, user, pushes) {
  const kafka = new kafkajs.Kafka({ brokers: brokers.split(","), logLevel: kafkajs.logLevel.NOTHING });
  const producer = kafka.producer({ createPartitioner: kafkajs.Partitioners.DefaultPartitioner });
  try {
    await producer.connect();
    const messages = pushes.map((push) => ({ key: user, value: JSON.stringify(push) }));
    await producer.send({ topic, messages });
  } catch (error) {
    throw new Error(`Kafka did not accept the records: ${error.message}`);
  } finally {
    await producer.disconnect();
  }
}

// Connects to an access node; a refusal is an error with the node's reason.
async function connect(url, token) {
  const headers = { Authorization: `Bearer ${token}` };
  const socket = new WebSocket(url, ["barid.v1.json"], { headers });
  const refused = new Promise((_, reject) =>
    socket.on("unexpected-response", async (_request, response) =>
      reject(new Error(`refused by the node: ${response.statusCode} ${(await text(response)).trim()}`)),
    ),
  );
  await Promise.race([once(socket, "open"), refused]);
  return socket;
}

// Acts as the device: handles each message once and in order, then acknowledges it.
function receive(socket, wanted) {
  let handled = 0; // the last handled seq
  const handle = {
    deliver(frame) {
      if (frame.mailbox) return; // for everyone or a group: not in this user's order, not acknowledged
      for (const message of frame.messages) {
        if (message.seq <= handled) continue; // a re-send that crossed the acknowledgement
        handled = message.seq;
        const body = message.text ?? message.data ?? message.json;
        console.log(`received ${message.seq} ${message.id} ${JSON.stringify(body)}`);
        wanted.delete(message.id);
      }
      // Always name the generation: after a reset the same seq may be another message.
      const generation = frame.generation ?? 0;
      socket.send(JSON.stringify({ ack: { seq: handled, generation } }));
    },
    skip(frame) {
      handled = Math.max(handled, frame.to); // skips may be repeated
    },
    welcome(frame) {
      // The position of this device; Welcome is sent again if positions start anew.
      handled = frame.positions?.find((position) => !position.mailbox)?.seq ?? 0;
    },
    error(frame) {
      // 0: a warning, the connection stays open
      if (frame.code) throw new Error(`error ${frame.code}: ${frame.text ?? ""}`);
    },
  };
  return new Promise((resolve, reject) => {
    socket.on("close", (code, reason) => reject(new Error(`closed by the node: ${code} ${reason}`)));
    socket.on("error", reject);
    socket.on("message", (data) => {
      try {
        // A frame is an object with one key, its kind; kinds that a client does not know are ignored.
        const [[kind, frame]] = Object.entries(JSON.parse(data));
        if (Object.hasOwn(handle, kind)) handle[kind](frame);
        if (wanted.size === 0) resolve();
      } catch (error) {
        reject(error);
      }
    });
    const late = () => reject(new Error("not everything arrived within 30 s; is the token that of --user?"));
    setTimeout(late, 30_000).unref();
  });
}

async function main() {
  if (!o.token) throw new Error("--token is missing; `barid token --user alice` prints one");
  const pushes = records(o.app, o.user);
  const socket = await connect(o.url, o.token);
  const received = receive(socket, new Set(pushes.map((push) => push.id)));
  socket.send(JSON.stringify({ hello: { device: o.device } }));
  await Promise.all([received, produce(o.brokers, o.topic, o.user, pushes)]);
  socket.close(); // after the last acknowledgement is sent
  console.log("all received and acknowledged");
}

main().catch((error) => {
  console.error(error.message);
  process.exit(1);
});
