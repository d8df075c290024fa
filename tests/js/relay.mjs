// The module as it is served, at the address in RELAY_JS. As a data URL, because a Node that knows
// neither its type nor http: modules takes a file called .js for something else.

const response = await fetch(process.env.RELAY_JS);
const source = await response.text();
export const { watch, parser, Refused, Unreachable } = await import(
  `data:text/javascript,${encodeURIComponent(source)}`
);
