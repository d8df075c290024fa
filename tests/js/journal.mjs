// `node journal.mjs URL` watches and writes one line of JSON for each thing that it is told.

import { watch } from "./relay.mjs";

const tell = (what) => (value) => console.log(JSON.stringify([what, value ?? null]));

await watch(process.argv[2], {
  onText: tell("text"),
  onReset: tell("reset"),
  onDone: tell("done"),
  onEvent: tell("event"),
  onComment: tell("comment"),
  onOpen: tell("open"),
  onLost: tell("lost"),
});
