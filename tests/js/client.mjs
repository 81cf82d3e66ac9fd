// A stock Socket.IO client, driven by JSON lines: what tests/gateway/test_js_client.py and the end-to-end tests use.
//
//   node client.mjs URL CONVERSATION_ID [--user U] [--token T] [--after CURSOR] [--tail N]
//                   [--count N] [--path /socket.io/]
//
// Everything heard is printed as one JSON line, {"event": NAME, "data": PAYLOAD}; `connect`, `disconnect` (with its
// reason) and `connect_error` (message and data) among it. With --count it ends by itself, well, after that many log
// entries. Standard input takes commands, one JSON object a line:
//
//   {"emit": "message", "data": {"message_id": "m1", "data": {"text": "hi"}}, "id": 7}
//     sends an event; its acknowledgement is printed as {"ack": 7, "data": ANSWER}, or
//     {"ack": 7, "error": REASON} if none comes within 20 s
//   {"close": true}
//     disconnects and ends; so does the end of standard input
//
// The auth object is a function, so that every reconnection goes on after the last log entry that was seen.

import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { io } from "socket.io-client";

const ACK_TIMEOUT_MS = 20_000;

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    user: { type: "string" },
    token: { type: "string" },
    after: { type: "string" },
    tail: { type: "string" },
    count: { type: "string" },
    path: { type: "string", default: "/socket.io/" },
  },
});
const [url, conversationId] = positionals;
if (conversationId === undefined) {
  console.error("usage: node client.mjs URL CONVERSATION_ID [options]");
  process.exit(2);
}

const print = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const wanted = options.count === undefined ? Infinity : Number(options.count);
let cursor = options.after;
let entries = 0;

const socket = io(url, {
  path: options.path,
  transports: ["websocket"],
  auth: (send) =>
    send({
      conversation_id: conversationId,
      user_id: options.user,
      token: options.token,
      after: cursor,
      tail: options.tail === undefined ? undefined : Number(options.tail),
    }),
});

const input = createInterface({ input: process.stdin });

const end = () => {
  socket.disconnect();
  input.close();
  // Nothing is left to be done but to write what was printed.
  process.stdin.destroy();
};

socket.on("connect", () => print({ event: "connect", data: { id: socket.id } }));
socket.on("disconnect", (reason) => print({ event: "disconnect", data: { reason } }));
socket.on("connect_error", (error) =>
  print({ event: "connect_error", data: { message: error.message, data: error.data ?? null } }),
);
socket.onAny((event, data) => {
  print({ event, data: data ?? null });
  if (event === "resync") {
    cursor = undefined;
  }
  if (event === "event") {
    cursor = data.cursor;
    entries += 1;
    if (entries >= wanted) {
      end();
    }
  }
});

input.on("line", async (line) => {
  const command = JSON.parse(line);
  if (command.close) {
    end();
    return;
  }
  try {
    const answer = await socket.timeout(ACK_TIMEOUT_MS).emitWithAck(command.emit, command.data);
    print({ ack: command.id, data: answer ?? null });
  } catch (error) {
    print({ ack: command.id, error: error.message });
  }
});
input.on("close", () => {
  if (wanted === Infinity) {
    socket.disconnect();
  }
});
